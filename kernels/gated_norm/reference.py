"""The RMSNorm, gated or not, in plain torch. Any device; exact in float64; autograd does the backward pass."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * SiLU(gate); x, gate [.., size], weight [size]. One rounding, at the end."""
    wide = reduce(torch.promote_types, (x.dtype, x.dtype if gate is None else gate.dtype, weight.dtype, torch.float32))
    if gate is None:
        largest = x.detach().abs().amax(-1, keepdim=True).to(wide).clamp_min(1)  # on which the result does not depend
        small = x.to(wide) / largest
        normed = small * torch.rsqrt(small.square().mean(-1, keepdim=True) + eps / largest.square())
        return (normed * weight.to(wide)).to(x.dtype)
    normed = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    return (normed * F.silu(gate.to(wide))).to(x.dtype)
