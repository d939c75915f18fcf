"""Launches the forward kernel.

Shapes: M tokens (all leading axes), H heads, C channels a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gates.tiles import TILES
from kernels.tiles import Tile

MAX_COLUMNS = 1024  # of a program: a warp's lanes read 16 bytes each, four warps side by side


class Launch(NamedTuple):
    """How a kernel runs over the columns of f, b and w."""

    grid: tuple[int, int]  # row blocks, column blocks of f, then of b, then of w
    columns: int
    tile: Tile


def launch(kernel: str, f: Tensor, b: Tensor, w: Tensor, itemsize: int) -> Launch:
    """The launch for f (or g), b and w of shape [M, width] each; a width may be 0. `itemsize`: that of f."""
    widths = [x.shape[1] for x in (f, b, w)]
    columns = min(MAX_COLUMNS, 1 << (max(widths) - 1).bit_length())
    tile = TILES.pick(kernel, f.device, itemsize, columns)
    rows = max(tile.blocks["ROWS"], tile.blocks["TILE"] // columns)
    return Launch((-(-f.shape[0] // rows), sum(-(-width // columns) for width in widths)), columns, tile)


def as_rows(x: Tensor, tokens: int) -> Tensor:
    """x [.., width] as [M, width] with adjacent columns: a view where the layout allows it."""
    x = x.reshape(tokens, x.shape[-1])
    return x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()


def gates(f: Tensor, a: Tensor, delta: Tensor, b: Tensor, w: Tensor, b_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.gates.op.delta_gates`."""
    from kernels.gates._triton.forward import gates_forward

    heads, tokens = a.shape[0], f.shape[:-1].numel()
    g = torch.empty(*f.shape[:-1], heads, f.shape[-1] // heads, device=f.device, dtype=torch.float32)
    b_out, w_out = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (b, w))
    f, b, w = (as_rows(x, tokens) for x in (f, b, w))
    grid, columns, tile = launch("forward", f, b, w, f.element_size())
    gates_forward[grid](
        *(f, a.contiguous(), delta.contiguous(), b, w, g, b_out, w_out, tokens),
        *(f.stride(0), b.stride(0), w.stride(0), f.shape[1], b.shape[1], w.shape[1], b_scale),
        C=g.shape[-1],
        BC=columns,
        **tile.options(),
    )
    return g, b_out, w_out
