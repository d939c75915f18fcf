"""The public functions: check the arguments, choose the implementation, run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.conv1d import op, reference
from kernels.varlen import check_cu_seqlens

Activation = Literal["silu"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    norm_size: int | None = None,
    norm_channels: int | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: backends.Requested = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time, with optional SiLU and per-head L2 norm behind it.

        y_t = bias + sum_{j=0}^{W-1} weight[:, W-1-j] * x_{t-j}

    Args:
        x: [B, T, D], floating.
        weight: [D, W], W >= 2; the last tap meets the current token.
        bias: [D] or None.
        activation: "silu" or None.
        norm_size: divide each group of this many channels (a head) by sqrt(sum of squares + 1e-6), after the activation; None: no norm.
        norm_channels: how many leading channels are normalised (a multiple of `norm_size`); None: all of them.
        state: [N, W-1, D], the inputs just before each sequence, oldest first; N = B or the number of packed sequences; None: zero.
        cu_seqlens: [N+1] integer, strictly increasing from 0 to T: T holds N packed sequences, B is 1, and nothing crosses a boundary.
        backend: "auto" | "triton" | "reference"; see `kernels.backend.resolve`.

    Returns:
        y [B, T, D] and the new state [N, W-1, D], both in x's dtype; sums are taken in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or readable values that do not fit.
        NotImplementedError: `backend="triton"` where it cannot run.
    """
    (y,), new_state = causal_conv1d_parts(
        x,
        weight,
        bias,
        parts=None,
        activation=activation,
        norm_size=norm_size,
        norm_channels=norm_channels,
        state=state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return y, new_state


def causal_conv1d_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    parts: Sequence[int] | None,
    activation: Activation | None = None,
    norm_size: int | None = None,
    norm_channels: int | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: backends.Requested = "auto",
) -> tuple[tuple[Tensor, ...], Tensor]:
    """`causal_conv1d` with y in tensors [B, T, width] of these widths, whose gradients need not be joined again; None: one."""
    _check(x, weight, bias, activation, norm_size, norm_channels, ndim=3)
    parts = [x.shape[-1]] if parts is None else parts
    if min(parts, default=0) < 1 or sum(parts) != x.shape[-1]:
        raise ValueError(f"causal_conv1d: parts must be positive widths with the sum D = {x.shape[-1]}, got {list(parts)}")
    sequences = x.shape[0]
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"causal_conv1d: packed sequences (cu_seqlens) need B = 1, got B = {x.shape[0]}")
        check_cu_seqlens(cu_seqlens, x.shape[1], op="causal_conv1d")
        sequences = cu_seqlens.numel() - 1
    if state is not None:
        _check_state("causal_conv1d", state, sequences, weight, x)
    chosen = backends.resolve("causal_conv1d", backend, x.device, op.refusal(x, weight, bias, state, norm_size))
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "triton":
            epilogue = _epilogue(x, activation, norm_size, norm_channels)
            whole = not op.divisible(parts, epilogue[1])
            *ys, new_state = op.causal_conv1d(x, weight, bias, state, cu_seqlens, *epilogue, [x.shape[-1]] if whole else list(parts))
            return ys[0].split(list(parts), -1) if whole else tuple(ys), new_state
        y, new_state = reference.convolve(x, weight, bias, state, cu_seqlens)
        return reference.epilogue(y, activation, norm_size, norm_channels).to(x.dtype).split(list(parts), -1), new_state


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    norm_size: int | None = None,
    norm_channels: int | None = None,
    state: Tensor,
    backend: backends.Requested = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d`: x [B, D], state [B, W-1, D] -> y [B, D] and the new state; `state` itself is not changed."""
    _check(x, weight, bias, activation, norm_size, norm_channels, ndim=2)
    _check_state("causal_conv1d_step", state, x.shape[0], weight, x)
    chosen = backends.resolve("causal_conv1d_step", backend, x.device, op.refusal(x, weight, bias, state, norm_size))
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "triton":
            y, new_state = op.causal_conv1d_step(x, weight, bias, state, *_epilogue(x, activation, norm_size, norm_channels))
            return y, new_state
        y, new_state = reference.step(x, weight, bias, state)
        return reference.epilogue(y, activation, norm_size, norm_channels).to(x.dtype), new_state


def _epilogue(x: Tensor, activation: Activation | None, norm_size: int | None, norm_channels: int | None) -> tuple[bool, int, int]:
    """The operators' last three arguments."""
    return activation == "silu", norm_size or 0, x.shape[-1] if norm_channels is None else norm_channels


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    norm_size: int | None,
    norm_channels: int | None,
    *,
    ndim: int,
) -> None:
    op = "causal_conv1d" if ndim == 3 else "causal_conv1d_step"
    if x.ndim != ndim or 0 in x.shape:
        raise ValueError(f"{op}: x must have {ndim} axes of at least 1 each, got shape {list(x.shape)}")
    channels = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 2:
        raise ValueError(f"{op}: weight must have shape [D = {channels}, W >= 2], got {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{op}: bias must have shape [D = {channels}], got {list(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation must be 'silu' or None, got {activation!r}")
    normed = channels if norm_channels is None else norm_channels
    if norm_size is None:
        if norm_channels is not None:
            raise ValueError(f"{op}: norm_channels needs norm_size")
    elif norm_size < 1 or not 0 < normed <= channels or normed % norm_size:
        raise ValueError(f"{op}: {normed} of {channels} channels cannot be normalised in groups of {norm_size}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}")


def _check_state(op: str, state: Tensor, sequences: int, weight: Tensor, x: Tensor) -> None:
    expected = (sequences, weight.shape[1] - 1, x.shape[-1])
    if tuple(state.shape) != expected:
        raise ValueError(f"{op}: state must have shape [N, W-1, D] = {list(expected)}, got {list(state.shape)}")
    if not state.is_floating_point():
        raise TypeError(f"{op}: state must be floating, got {state.dtype}")
    if state.device != x.device:
        raise ValueError(f"{op}: state is on {state.device}, x on {x.device}")
