"""Launches the backward kernel, and sums what its programs leave of the parameters' gradients.

Shapes: M tokens (all leading axes), P row blocks, H heads, C channels a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gates.forward import as_rows, launch


def gates(
    dg: Tensor, db: Tensor, dw: Tensor, f: Tensor, a: Tensor, delta: Tensor, b: Tensor, w: Tensor, b_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.gates.op.delta_gates_backward`."""
    from kernels.gates._triton.backward import gates_backward

    tokens, width = f.shape[:-1].numel(), f.shape[-1]
    df, db_in, dw_in = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (f, b, w))
    dg, db, dw, f, b, w = (as_rows(x, tokens) for x in (dg.flatten(-2), db, dw, f, b, w))
    grid, columns, tile = launch("backward", f, b, w)
    partial = torch.empty(grid[0], 2, width, device=f.device, dtype=torch.float32)
    gates_backward[grid](
        *(dg, db, dw, f, a.contiguous(), delta.contiguous(), b, w, df, db_in, dw_in, partial, tokens),
        *(dg.stride(0), db.stride(0), dw.stride(0), f.stride(0), b.stride(0), w.stride(0)),
        *(width, b.shape[1], w.shape[1], b_scale),
        C=width // a.shape[0],
        BC=columns,
        **tile.options(),
    )
    ddelta, by_channel = partial.sum(0)
    return df, by_channel.view(a.shape[0], -1).sum(1), ddelta, db_in, dw_in
