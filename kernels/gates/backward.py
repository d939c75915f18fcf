"""Launches the backward kernel, and sums what its programs leave of the parameters' gradients.

Shapes: M tokens (all leading axes), P row blocks, H heads, C channels a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gates.forward import as_rows, launch


def gates(
    dg: Tensor, db: Tensor, dw: Tensor, g: Tensor, a: Tensor, b: Tensor, w: Tensor, b_scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.gates.op.delta_gates_backward`."""
    from kernels.gates._triton.backward import gates_backward

    dg, g = dg.flatten(-2), g.flatten(-2)
    tokens, width = g.shape[:-1].numel(), g.shape[-1]
    df = torch.empty(g.shape, device=g.device, dtype=dtype)
    db_in, dw_in = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (b, w))
    dg, db, dw, g, b, w = (as_rows(x, tokens) for x in (dg, db, dw, g.contiguous(), b, w))
    blocks, grid, options = launch("backward", g, b, w, dtype.itemsize)
    partial = torch.empty(blocks, 2, width, device=g.device, dtype=torch.float32)
    gates_backward[grid](
        *(dg, db, dw, g, a.contiguous(), b, w, df, db_in, dw_in, partial, tokens),
        *(dg.stride(0), db.stride(0), dw.stride(0), b.stride(0), w.stride(0)),
        *(width, b.shape[1], w.shape[1], b_scale),
        C=width // a.shape[0],
        STAGES=options["num_stages"],
        **options,
    )
    ddelta, by_channel = partial.sum(0)
    return df, by_channel.view(a.shape[0], -1).sum(1), ddelta, db_in, dw_in
