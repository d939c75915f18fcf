"""The kernels as torch operators: opaque to the compiler, differentiable, with shapes known without running.

Only the inputs are saved: the root mean square is a sum over a row that the backward pass reads anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.autograd import differentiable


@torch.library.custom_op("lightning_mixers::gated_rms_norm", mutates_args=())
def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """y, x's shape and dtype, contiguous."""
    from kernels.gated_norm import forward

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return forward.gated_rms_norm(x, gate, weight, eps)


@gated_rms_norm.register_fake
def _(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


@torch.library.custom_op("lightning_mixers::gated_rms_norm_backward", mutates_args=())
def gated_rms_norm_backward(dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """Gradients of x, of the gate if there is one, and of weight, each in its tensor's dtype."""
    from kernels.gated_norm import backward

    with torch.cuda.device_of(x):
        return backward.gated_rms_norm(dy, x, gate, weight, eps)


@gated_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:  # noqa: ARG001
    return [t.new_empty(t.shape) for t in (x, gate, weight) if t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    dx, *dgate, dweight = gated_rms_norm_backward(dy, x, gate, weight, ctx.eps)
    return dx, dgate[0] if dgate else None, dweight, None


run = differentiable(gated_rms_norm, _setup, _backward)
