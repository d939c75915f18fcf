"""The kernels as torch operators: opaque to the compiler, differentiable, with shapes known without running.

Kept for the backward pass are the inputs, tanh(theta), and the angles before every chunk and behind every sequence; angles between them are summed
again, backwards, which is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.autograd import differentiable
from kernels.rotary.tiles import CHUNK


@torch.library.custom_op("lightning_mixers::rotary_keys", mutates_args=())
def rotary_keys(
    B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, theta: Tensor, delta: Tensor, first: Tensor | None, cu_seqlens: Tensor | None,
    neighbours: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """q, k, last; kept: tanh(theta), the angles before chunks and the last ones in fixed point."""
    from kernels.rotary import forward

    with torch.cuda.device_of(B):  # Triton launches on the current device
        return forward.rotary_keys(B, C, B_bias, C_bias, theta, delta, first, cu_seqlens, neighbours, dtype)


@rotary_keys.register_fake
def _(B, C, B_bias, C_bias, theta, delta, first, cu_seqlens, neighbours, dtype):  # type: ignore[no-untyped-def]  # noqa: ARG001
    batch, tokens, rank, _, size = B.shape
    heads, angles = B_bias.shape[0], theta.shape[-1]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    q, k = (B.new_empty(batch, tokens, rank, heads, size, dtype=dtype) for _ in "qk")
    last = B.new_empty(sequences, heads, angles, dtype=torch.float32)
    starts = B.new_empty(batch, -(-tokens // CHUNK) + 1, heads, angles, dtype=torch.int32)
    return [q, k, last, theta.new_empty(theta.shape, dtype=torch.float32), starts, last.new_empty(last.shape, dtype=torch.int32)]


@torch.library.custom_op("lightning_mixers::rotary_keys_backward", mutates_args=())
def rotary_keys_backward(
    dq: Tensor, dk: Tensor, dlast: Tensor, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, delta: Tensor, cu_seqlens: Tensor | None,
    tanh: Tensor, starts: Tensor, last_fixed: Tensor, neighbours: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Gradients of B, C, their biases, theta (in `dtype`), delta and first."""
    from kernels.rotary import backward

    with torch.cuda.device_of(dq):
        return backward.rotary_keys(dq, dk, dlast, B, C, B_bias, C_bias, delta, cu_seqlens, tanh, starts, last_fixed, neighbours, dtype)


@rotary_keys_backward.register_fake
def _(dq, dk, dlast, B, C, B_bias, C_bias, delta, cu_seqlens, tanh, starts, last_fixed, neighbours, dtype):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return [*(x.new_empty(x.shape) for x in (B, C, B_bias, C_bias)), tanh.new_empty(tanh.shape, dtype=dtype), *map(_like, (delta, dlast))]


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    B, C, B_bias, C_bias, theta, delta, first, cu_seqlens, ctx.neighbours, ctx.q_dtype = inputs
    ctx.dtype, ctx.has_first = theta.dtype, first is not None
    ctx.save_for_backward(B, C, B_bias, C_bias, delta, cu_seqlens, *output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    B, last = saved[0], saved[-1]
    shape = (*B.shape[:3], last.shape[1], B.shape[-1])
    dq, dk = (B.new_zeros(shape, dtype=ctx.q_dtype) if x is None else x for x in gradients[:2])
    dlast = last.new_zeros(last.shape, dtype=torch.float32) if gradients[2] is None else gradients[2]
    *found, dfirst = rotary_keys_backward(dq, dk, dlast, *saved, ctx.neighbours, ctx.dtype)
    return *found, dfirst if ctx.has_first else None, None, None, None


run = differentiable(rotary_keys, _setup, _backward, outputs=3)
