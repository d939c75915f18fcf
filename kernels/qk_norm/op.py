"""The kernels as torch operators: opaque to the compiler, differentiable, with shapes known without running.

Only the inputs are saved: the length is a sum over a row that the backward pass reads anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.autograd import differentiable


@torch.library.custom_op("lightning_mixers::l2_norm", mutates_args=())
def l2_norm(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k of length 1, each in its tensor's shape and dtype, contiguous."""
    from kernels.qk_norm import forward

    with torch.cuda.device_of(q):  # Triton launches on the current device
        return forward.l2_norm(q, k)


@torch.library.custom_op("lightning_mixers::l2_norm_backward", mutates_args=())
def l2_norm_backward(dq_unit: Tensor, dk_unit: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, each in its tensor's dtype."""
    from kernels.qk_norm import backward

    with torch.cuda.device_of(q):
        return backward.l2_norm(dq_unit, dk_unit, q, k)


@l2_norm.register_fake
def _(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@l2_norm_backward.register_fake
def _(dq_unit: Tensor, dk_unit: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dq_unit: Tensor, dk_unit: Tensor) -> tuple[Tensor, Tensor]:
    dq, dk = l2_norm_backward(dq_unit, dk_unit, *ctx.saved_tensors)
    return dq, dk


run = differentiable(l2_norm, _setup, _backward)
