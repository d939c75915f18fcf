"""Launches the forward kernel.

Shapes: M tokens (all leading axes), H heads, C channels a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gates.tiles import TILES

MAX_COLUMNS = 1024  # of a program


class Launch(NamedTuple):
    """How a kernel runs over the columns of f, b and w."""

    row_blocks: int
    grid: tuple[int]  # row blocks times column blocks: those of f, then of b, then of w
    options: dict[str, int]


def launch(kernel: str, f: Tensor, b: Tensor, w: Tensor, itemsize: int) -> Launch:
    """The launch for f (or g), b and w of shape [M, width] each; a width may be 0. `itemsize`: that of f."""
    widths = [x.shape[1] for x in (f, b, w)]
    size = min(MAX_COLUMNS, 1 << (max(widths) - 1).bit_length())
    tile = TILES.pick(kernel, f.device, itemsize, size)
    columns = min(tile.blocks["COLUMNS"], size)
    step = tile.blocks["TILE"] // columns
    rows = max(tile.blocks["ROWS"], step)
    blocks = -(-f.shape[0] // rows)
    options = {"BR": step, "BC": columns, "ROWS": rows, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Launch(blocks, (blocks * sum(-(-width // columns) for width in widths),), options)


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
    _, grid, options = launch("forward", f, b, w, f.element_size())
    gates_forward[grid](
        *(f, a.contiguous(), delta.contiguous(), b, w, g, b_out, w_out, tokens),
        *(f.stride(0), b.stride(0), w.stride(0), f.shape[1], b.shape[1], w.shape[1], b_scale),
        C=g.shape[-1],
        **options,
    )
    return g, b_out, w_out
