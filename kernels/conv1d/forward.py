"""Launches of the forward kernels."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.conv1d.tiles import Plan, plan


class Rows(NamedTuple):
    """A [B, T, D] tensor whose channels lie side by side: token t of batch row b is row b * batch + t, rows lie `stride` apart."""

    x: Tensor
    batch: int
    stride: int


def rows_of(x: Tensor) -> Rows:
    """`x` as it is where its strides allow that, else a copy."""
    batch, tokens, channels = x.shape
    if x.stride(2) == 1 or channels == 1:
        if tokens == 1:
            return Rows(x, 1, x.stride(0))
        if batch == 1:
            return Rows(x, 0, x.stride(1))
        if x.stride(1) > 0 and x.stride(0) % x.stride(1) == 0:  # a batch stride of its own would be a length in a compile key
            return Rows(x, x.stride(0) // x.stride(1), x.stride(1))
    return Rows(x.contiguous(), tokens, channels)


def edges_of(parts: list[int]) -> list[int]:
    """Where the second and the third part begin."""
    return list(accumulate(parts))[:-1]


def three(parts: list[Tensor]) -> list[Tensor]:
    """For kernels with three pointers; what is missing is not read."""
    return [*parts, *[parts[-1]] * (3 - len(parts))]


def edge_constants(edges: list[int], channels: int) -> dict[str, int]:
    """An edge that is not there lies behind the last channel."""
    first, second = [*edges, channels, channels][:2]
    return {"E1": first, "E2": second}


def constants(plan: Plan, weight: Tensor, *, silu: bool, norm_size: int, norm_channels: int) -> dict[str, object]:
    """The compile-time arguments that all kernels take."""
    groups = norm_channels // norm_size if norm_size else 0
    return {"D": weight.shape[0], "W": weight.shape[1], "NORM_GROUPS": groups, "SILU": silu, **plan.options}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, *, silu: bool, norm_size: int,
    norm_channels: int, parts: list[int],
) -> list[Tensor]:  # fmt: skip
    """The parts of y, [B, T, width] each, and the new state [N, W-1, D], in one launch."""
    from kernels.conv1d._triton.forward import conv_forward

    batch, tokens, channels = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    rows = rows_of(x)
    edges = edges_of(parts)
    p = plan("forward", x, weight.shape[1], norm_size, tokens, edges)
    y = [torch.empty(batch, tokens, width, dtype=x.dtype, device=x.device) for width in parts]
    new_state = torch.empty(sequences, weight.shape[1] - 1, channels, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        conv_forward[(p.blocks * batch * p.segments,)](
            rows.x,
            weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            state if state is None else state.contiguous(),
            cu_seqlens if cu_seqlens is None else cu_seqlens.to(x.device).contiguous(),
            *three(y),
            new_state,
            tokens,
            sequences,
            p.segment,
            p.segments,
            rows.batch,
            rows.stride,
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None,
            PACKED=cu_seqlens is not None,
            **edge_constants(edges, channels),
            **constants(p, weight, silu=silu, norm_size=norm_size, norm_channels=norm_channels),
        )
    return [*y, new_state]


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, silu: bool, norm_size: int, norm_channels: int) -> tuple[Tensor, Tensor]:
    """y [B, D] and the new state [B, W-1, D] for one token x [B, D], in one launch."""
    from kernels.conv1d._triton.step import conv_step

    rows = rows_of(x.unsqueeze(1))
    p = plan("step", x, weight.shape[1], norm_size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_state = torch.empty(state.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        conv_step[(p.blocks * x.shape[0],)](
            rows.x,
            weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            state.contiguous(),
            y,
            new_state,
            rows.stride,
            HAS_BIAS=bias is not None,
            **constants(p, weight, silu=silu, norm_size=norm_size, norm_channels=norm_channels),
        )
    return y, new_state
