"""Launches the backward kernel, and sums what its programs leave of the weight's gradient.

Shapes: as in `forward.py`; P programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_norm.forward import as_heads, launch


def gated_rms_norm(dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """See `kernels.gated_norm.op.gated_rms_norm_backward`."""
    from kernels.gated_norm._triton.backward import gated_norm_backward

    found = [torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (x, gate) if t is not None]
    gated = gate is not None
    programs, block, tile = launch("backward", x)
    partial = torch.empty(programs, x.shape[-1], device=x.device, dtype=torch.float32)
    heads, (dy, x, gate) = as_heads(dy, x, x if gate is None else gate)
    gated_norm_backward[(programs,)](
        *(dy, x, gate, weight.contiguous(), found[0], found[-1], partial, x.shape[0] * heads),
        *(dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), gate.stride(0), gate.stride(1), x.shape[2], eps),
        H=heads,
        BS=block,
        GATED=gated,
        STAGES=tile.num_stages,
        **tile.options(),
    )
    return [*found, partial.sum(0).to(weight.dtype)]
