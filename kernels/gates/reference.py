"""The gates in plain torch. Any device; exact in float64; autograd does the backward pass.

Shapes: H heads, C channels a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gates(f: Tensor, a: Tensor, delta: Tensor, b: Tensor | None, w: Tensor | None, b_scale: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """g = -exp(a) * softplus(f + delta) [.., H, C] in a's dtype; b_scale * sigmoid(b) and sigmoid(w) in their logits' dtypes."""
    dt = F.softplus(f.to(delta.dtype) + delta).unflatten(-1, (a.shape[0], -1))
    return -a.exp().unsqueeze(-1) * dt, _sigmoid(b, b_scale), _sigmoid(w, 1.0)


def _sigmoid(x: Tensor | None, scale: float) -> Tensor | None:
    """One rounding to x's dtype, at the end."""
    if x is None:
        return None
    y = x.to(torch.promote_types(x.dtype, torch.float32)).sigmoid()
    return (y if scale == 1.0 else scale * y).to(x.dtype)
