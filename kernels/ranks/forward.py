"""Launches the forward kernels.

Shapes: M tokens (all leading axes), R ranks, H heads, V channels a head, W = H * V.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.gates.forward import as_rows
from kernels.ranks.tiles import TILES

MAX_COLUMNS = 512  # of a program: its neighbours read the rest of its rows


class Launch(NamedTuple):
    """How a kernel runs over rows of v."""

    row_blocks: int
    grid: tuple[int]  # row blocks times column blocks
    options: dict[str, Any]


def launch(kernel: str, v: Tensor, shape: torch.Size) -> Launch:
    """The launch for v [M, W], shape [.., R, H, V]."""
    ranks, heads, size = shape[-3:]
    padded = 1 << (ranks - 1).bit_length()
    tile = TILES.pick(kernel, v.device, v.element_size(), padded)
    entries = min(tile.blocks["TILE"], tile.blocks["RANKED"] // padded)
    columns = min(MAX_COLUMNS, entries, 1 << (v.shape[1] - 1).bit_length())
    rows, steps = entries // columns, tile.blocks["STEPS"]
    blocks = -(-v.shape[0] // (rows * steps))
    sizes = {"H": heads, "V": size, "R": ranks, "BR": rows, "BC": columns, "STEPS": steps}
    grid = (blocks * -(-v.shape[1] // columns),)
    return Launch(blocks, grid, {**sizes, "num_warps": tile.num_warps, "num_stages": tile.num_stages})


def by_token(x: Tensor, tokens: int) -> Tensor:
    """x [.., H, V] as [M, W] with adjacent columns: a view where the layout allows it."""
    return as_rows(x.flatten(-2), tokens)


def by_rank(x: Tensor, tokens: int) -> Tensor:
    """x [.., R, H, V] as [M, R, W] likewise."""
    x = x.flatten(-2).reshape(tokens, x.shape[-3], -1)
    return x if x.shape[2] < 2 or x.stride(2) == 1 else x.contiguous()


def strides(*steps: int) -> tuple[int, list[int]]:
    """A power of two that divides all strides, which kernels are compiled for, and the strides divided by it, which they are not."""
    align = math.gcd(16, *steps)
    return align, [step // align for step in steps]


def gated_skip(o: Tensor, v: Tensor, z: Tensor, D: Tensor, v_scale: Tensor, z_scale: Tensor, out_scale: Tensor) -> Tensor:
    """See `kernels.ranks.op.gated_skip`."""
    from kernels.ranks._triton.forward import gated_skip_forward

    shape, tokens = o.shape, o.shape[:-3].numel()
    y = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    o, v, z = by_rank(o, tokens), by_token(v, tokens), by_token(z, tokens)
    _, grid, options = launch("forward", v, shape)
    align, steps = strides(o.stride(0), o.stride(1), v.stride(0), z.stride(0))
    scales = (x.contiguous() for x in (D, v_scale, z_scale, out_scale))
    gated_skip_forward[grid](o, v, z, *scales, y, tokens, *steps, SCALED=v_scale.numel() > 0, ALIGN=align, **options)
    return y


def rank_values(v: Tensor, scale: Tensor) -> Tensor:
    """See `kernels.ranks.op.rank_values`."""
    from kernels.ranks._triton.ranks import rank_values_forward

    heads, ranks, size = scale.shape
    y = torch.empty(*v.shape[:-2], ranks, heads, size, device=v.device, dtype=v.dtype)
    tokens = v.shape[:-2].numel()
    v = by_token(v, tokens)
    _, grid, options = launch("ranks_forward", v, y.shape)
    align, steps = strides(v.stride(0))
    rank_values_forward[grid](v, scale.contiguous(), y, tokens, *steps, ALIGN=align, **options)
    return y
