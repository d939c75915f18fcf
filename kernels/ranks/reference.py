"""The outputs and the values of every rank in plain torch. Any device; exact in float64; autograd does the backward pass.

Shapes: R ranks, H heads, V channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_skip(o: Tensor, v: Tensor, z: Tensor, D: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """sum_r out_r * (o_r + D v_scale_r v) * SiLU(z_scale_r z); o [.., R, H, V], v, z [.., H, V], D [H].

    scales: of v, z and the output, [H, R, V] each; or none, which are 1. One rounding, at the end.
    """
    wide = reduce(torch.promote_types, (o.dtype, v.dtype, z.dtype, D.dtype))
    values, gates = v.to(wide).unsqueeze(-3), z.to(wide).unsqueeze(-3)
    if scales:
        values, gates = values * scales[0].transpose(0, 1), gates * scales[1].transpose(0, 1)
    y = (o.to(wide) + D.unsqueeze(-1) * values) * F.silu(gates)
    return (y * scales[2].transpose(0, 1) if scales else y).sum(-3).to(v.dtype)


def rank_values(v: Tensor, scale: Tensor) -> Tensor:
    """v [.., H, V] times scale [H, R, V], [.., R, H, V] in v's dtype. One rounding, at the end."""
    return (v.to(scale.dtype).unsqueeze(-3) * scale.transpose(0, 1)).to(v.dtype)
