"""The division by the length in plain torch. Any device; exact in float64; autograd does the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.conv1d.reference import NORM_EPS  # one number, wherever queries and keys are normalised


def l2_norm(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """x / sqrt(sum x^2 + eps) over the last axis, of q and of k. One rounding, at the end."""
    return unit(q), unit(k)


def unit(x: Tensor) -> Tensor:
    """x [.., size] divided by its length, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()).to(x.dtype)
