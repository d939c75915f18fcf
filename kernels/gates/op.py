"""The kernels as torch operators: opaque to the compiler, differentiable, with shapes known without running.

A gate that is absent is a tensor of width 0 here. Saved are g, which the delta rule saves anyway, in place of f and delta; and the logits b and w.
Their gates are not: rounded to 16 bits they do not give the derivative back near 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.autograd import differentiable


@torch.library.custom_op("lightning_mixers::delta_gates", mutates_args=())
def delta_gates(f: Tensor, a: Tensor, delta: Tensor, b: Tensor, w: Tensor, b_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """g [.., H, C] float32, b and w in their logits' dtypes."""
    from kernels.gates import forward

    with torch.cuda.device_of(f):  # Triton launches on the current device
        return forward.gates(f, a, delta, b, w, b_scale)


@delta_gates.register_fake
def _(f: Tensor, a: Tensor, delta: Tensor, b: Tensor, w: Tensor, b_scale: float) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    heads = a.shape[0]
    g = f.new_empty((*f.shape[:-1], heads, f.shape[-1] // heads), dtype=torch.float32)
    return g, b.new_empty(b.shape), w.new_empty(w.shape)


@torch.library.custom_op("lightning_mixers::delta_gates_backward", mutates_args=())
def delta_gates_backward(
    dg: Tensor, db: Tensor, dw: Tensor, g: Tensor, a: Tensor, b: Tensor, w: Tensor, b_scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of f (in `dtype`), a, delta, b, w, each in its tensor's dtype."""
    from kernels.gates import backward

    with torch.cuda.device_of(g):
        return backward.gates(dg, db, dw, g, a, b, w, b_scale, dtype)


@delta_gates_backward.register_fake
def _(
    dg: Tensor,  # noqa: ARG001
    db: Tensor,  # noqa: ARG001
    dw: Tensor,  # noqa: ARG001
    g: Tensor,
    a: Tensor,
    b: Tensor,
    w: Tensor,
    b_scale: float,  # noqa: ARG001
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width = g.shape[-2] * g.shape[-1]
    df = g.new_empty((*g.shape[:-2], width), dtype=dtype)
    return df, a.new_empty(a.shape), g.new_empty(width), b.new_empty(b.shape), w.new_empty(w.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    f, a, _, b, w, ctx.b_scale = inputs
    ctx.dtype = f.dtype
    ctx.save_for_backward(output[0], a, b, w)


def _backward(ctx: Any, dg: Tensor, db: Tensor, dw: Tensor) -> tuple[Tensor | None, ...]:
    return (*delta_gates_backward(dg, db, dw, *ctx.saved_tensors, ctx.b_scale, ctx.dtype), None)


run = differentiable(delta_gates, _setup, _backward)
