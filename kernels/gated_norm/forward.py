"""Launches the forward kernel.

Shapes: M tokens (all axes but the last two), H heads (the last axis but one), size channels; R = M * H rows are normalised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gated_norm.tiles import TILES
from kernels.tiles import Tile


class Launch(NamedTuple):
    """How a kernel runs over R rows."""

    programs: int
    block: int  # size rounded up to a power of two
    tile: Tile


def launch(kernel: str, x: Tensor) -> Launch:
    """The launch for x [.., size]."""
    size = x.shape[-1]
    block = 1 << (size - 1).bit_length()
    tile = TILES.pick(kernel, x.device, x.element_size(), block)
    if block > tile.blocks["TILE"]:  # one row at a time, 16 numbers a thread
        tile = Tile(max(tile.num_warps, block // 512), tile.num_stages, {**tile.blocks, "TILE": block})
    rows = tile.blocks["TILE"] // block * tile.blocks["STEPS"]
    return Launch(-(-(x.numel() // size) // rows), block, tile)


def as_heads(*tensors: Tensor) -> tuple[int, list[Tensor]]:
    """H and the tensors [.., size] as [M, H, size] with adjacent channels: views where the layouts allow it, H = 1 where all of them allow that."""
    shape = tensors[0].shape
    heads = 1 if len(shape) < 3 or all(_one_stride(x) for x in tensors) else shape[-2]
    rows = [x.reshape(-1, heads, shape[-1]) for x in tensors]
    return heads, [x if shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous() for x in rows]


def _one_stride(x: Tensor) -> bool:
    """Whether the rows of x lie at one distance from each other: all axes but the last can be merged."""
    return x.is_contiguous() or all(x.stride(i) == x.shape[i + 1] * x.stride(i + 1) for i in range(x.ndim - 2))


def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.gated_norm.op.gated_rms_norm`."""
    from kernels.gated_norm._triton.forward import gated_norm_forward

    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    programs, block, tile = launch("forward", x)
    gated = gate is not None
    heads, (x, gate) = as_heads(x, x if gate is None else gate)
    gated_norm_forward[(programs,)](
        *(x, gate, weight.contiguous(), y, x.shape[0] * heads),
        *(x.stride(0), x.stride(1), gate.stride(0), gate.stride(1), x.shape[2], eps),
        H=heads,
        BS=block,
        GATED=gated,
        **tile.options(),
    )
    return y
