"""The convolution's kernels as torch operators: what a compiler and autograd see. Nothing but the inputs is kept for the backward pass.

A `norm_size` of 0 means no norm. An absent gradient is an empty tensor, since an operator returns tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels.conv1d.backward import empty_gradients

MAX_TAPS = 8
MAX_NORM_SIZE = 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, norm_size: int | None) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, and they compute in float32"
    for name, t in (("weight", weight), ("bias", bias), ("state", state)):
        if t is not None and t.dtype not in (*DTYPES, torch.float64):
            return f"{name} is {t.dtype}"
    if weight.shape[1] > MAX_TAPS:
        return f"{weight.shape[1]} taps are more than {MAX_TAPS}"
    if norm_size is not None and norm_size > MAX_NORM_SIZE:
        return f"norm_size = {norm_size} is above {MAX_NORM_SIZE}"
    return None


def divisible(parts: Sequence[int], norm_size: int) -> bool:
    """Whether the kernels can put y into tensors of these widths: at most three, between whole norm groups."""
    return len(parts) == 1 or (len(parts) <= 3 and norm_size > 0 and not any(edge % norm_size for edge in accumulate(parts[:-1])))


@torch.library.custom_op("lightning_mixers::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, silu: bool, norm_size: int, norm_channels: int,
    parts: list[int],
) -> list[Tensor]:  # fmt: skip
    """As `kernels.causal_conv1d`: y [B, T, D] in tensors of these widths (`divisible`), and the new state [N, W-1, D], all in x's dtype."""
    from kernels.conv1d.forward import forward

    return forward(x, weight, bias, state, cu_seqlens, silu=silu, norm_size=norm_size, norm_channels=norm_channels, parts=parts)


@torch.library.custom_op("lightning_mixers::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    dy: list[Tensor],
    d_new_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    norm_size: int,
    norm_channels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and state, each in its dtype."""
    from kernels.conv1d.backward import backward

    return backward(dy, d_new_state, x, weight, bias, state, cu_seqlens, silu=silu, norm_size=norm_size, norm_channels=norm_channels)


@torch.library.custom_op("lightning_mixers::causal_conv1d_step", mutates_args=())
def causal_conv1d_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool, norm_size: int, norm_channels: int
) -> tuple[Tensor, Tensor]:
    """As `kernels.causal_conv1d_step`: y [B, D] and the new state [B, W-1, D], both in x's dtype."""
    from kernels.conv1d.forward import step

    return step(x, weight, bias, state, silu=silu, norm_size=norm_size, norm_channels=norm_channels)


@causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, _bias: Any, _state: Any, cu_seqlens: Tensor | None, *rest: Any) -> list[Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    new_state = x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])
    return [*(x.new_empty(*x.shape[:2], width) for width in rest[-1]), new_state]


@causal_conv1d_backward.register_fake
def _(_dy: Any, _d_new: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(x, weight, bias, state)


@causal_conv1d_step.register_fake
def _(x: Tensor, _weight: Any, _bias: Any, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(state.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 (torch passes it by name)
    *tensors, ctx.silu, ctx.norm_size, ctx.norm_channels, ctx.parts = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    *dy, d_new_state = gradients
    given = [x.new_zeros(1, 1, 1).expand(*x.shape[:2], width) if d is None else d for d, width in zip(dy, ctx.parts, strict=True)]
    found = causal_conv1d_backward(given, d_new_state, x, weight, bias, state, cu_seqlens, ctx.silu, ctx.norm_size, ctx.norm_channels)
    needed = (gradient if needs else None for gradient, needs in zip(found, ctx.needs_input_grad, strict=False))
    return (*needed, None, None, None, None, None)


def _step_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _setup_context(ctx, (*inputs, None), output)


def _step_backward(ctx: Any, dy: Tensor | None, d_new_state: Tensor | None) -> tuple[Any, ...]:
    """A step is a sequence of one token."""
    x, weight, bias, state = ctx.saved_tensors
    x = x.unsqueeze(1)
    dy = x.new_zeros(x.shape) if dy is None else dy.unsqueeze(1)
    dx, *found = causal_conv1d_backward([dy], d_new_state, x, weight, bias, state, None, ctx.silu, ctx.norm_size, ctx.norm_channels)
    needed = (gradient if needs else None for gradient, needs in zip((dx.squeeze(1), *found), ctx.needs_input_grad, strict=False))
    return (*needed, None, None, None)


causal_conv1d.register_autograd(_backward, setup_context=_setup_context)
causal_conv1d_step.register_autograd(_step_backward, setup_context=_step_setup_context)
