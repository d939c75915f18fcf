"""The kernels as torch operators: opaque to the compiler, differentiable, with shapes known without running.

A gate that is absent is a tensor of width 0 here. Only the inputs are saved: everything else is cheaper to compute than to read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    dg: Tensor, db: Tensor, dw: Tensor, f: Tensor, a: Tensor, delta: Tensor, b: Tensor, w: Tensor, b_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of f, a, delta, b, w, each in its tensor's dtype."""
    from kernels.gates import backward

    with torch.cuda.device_of(f):
        return backward.gates(dg, db, dw, f, a, delta, b, w, b_scale)


@delta_gates_backward.register_fake
def _(
    dg: Tensor,  # noqa: ARG001
    db: Tensor,  # noqa: ARG001
    dw: Tensor,  # noqa: ARG001
    f: Tensor,
    a: Tensor,
    delta: Tensor,
    b: Tensor,
    w: Tensor,
    b_scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return f.new_empty(f.shape), a.new_empty(a.shape), delta.new_empty(delta.shape), b.new_empty(b.shape), w.new_empty(w.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.b_scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dg: Tensor, db: Tensor, dw: Tensor) -> tuple[Tensor | None, ...]:
    return (*delta_gates_backward(dg, db, dw, *ctx.saved_tensors, ctx.b_scale), None)


delta_gates.register_autograd(_backward, setup_context=_setup)
