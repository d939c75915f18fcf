"""The kernels as torch operators: opaque to the compiler, differentiable, with shapes known without running.

Without the ranks' scales these are tensors of no rank here. Only the inputs are saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.autograd import differentiable

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("lightning_mixers::gated_skip", mutates_args=())
def gated_skip(o: Tensor, v: Tensor, z: Tensor, D: Tensor, v_scale: Tensor, z_scale: Tensor, out_scale: Tensor) -> Tensor:
    """y, v's shape and dtype, contiguous."""
    from kernels.ranks import forward

    with torch.cuda.device_of(v):  # Triton launches on the current device
        return forward.gated_skip(o, v, z, D, v_scale, z_scale, out_scale)


@gated_skip.register_fake
def _(o: Tensor, v: Tensor, z: Tensor, D: Tensor, v_scale: Tensor, z_scale: Tensor, out_scale: Tensor) -> Tensor:  # noqa: ARG001
    return v.new_empty(v.shape)


@torch.library.custom_op("lightning_mixers::gated_skip_backward", mutates_args=())
def gated_skip_backward(
    dy: Tensor, o: Tensor, v: Tensor, z: Tensor, D: Tensor, v_scale: Tensor, z_scale: Tensor, out_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all but dy, each in its tensor's dtype."""
    from kernels.ranks import backward

    with torch.cuda.device_of(v):
        return backward.gated_skip(dy, o, v, z, D, v_scale, z_scale, out_scale)


@gated_skip_backward.register_fake
def _(dy: Tensor, *inputs: Tensor) -> Gradients:  # noqa: ARG001
    o, v, z, D, v_scale, z_scale, out_scale = (x.new_empty(x.shape) for x in inputs)
    return o, v, z, D, v_scale, z_scale, out_scale


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Gradients:
    gradients: Gradients = gated_skip_backward(dy, *ctx.saved_tensors)
    return gradients


run = differentiable(gated_skip, _setup, _backward)


@torch.library.custom_op("lightning_mixers::rank_values", mutates_args=())
def rank_values(v: Tensor, scale: Tensor) -> Tensor:
    """v scaled for every rank, [.., R, H, V] in v's dtype, contiguous."""
    from kernels.ranks import forward

    with torch.cuda.device_of(v):
        return forward.rank_values(v, scale)


@rank_values.register_fake
def _(v: Tensor, scale: Tensor) -> Tensor:
    heads, ranks, size = scale.shape
    return v.new_empty(*v.shape[:-2], ranks, heads, size)


@torch.library.custom_op("lightning_mixers::rank_values_backward", mutates_args=())
def rank_values_backward(dy: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of v and of the scale, each in its tensor's dtype."""
    from kernels.ranks import backward

    with torch.cuda.device_of(v):
        return backward.rank_values(dy, v, scale)


@rank_values_backward.register_fake
def _(dy: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return v.new_empty(v.shape), scale.new_empty(scale.shape)


def _backward_of_ranks(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dv, dscale = rank_values_backward(dy, *ctx.saved_tensors)
    return dv, dscale


run_rank_values = differentiable(rank_values, _setup, _backward_of_ranks)
