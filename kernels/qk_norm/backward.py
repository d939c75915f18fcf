"""Launches the backward kernel. Shapes: as in `forward.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.conv1d.reference import NORM_EPS
from kernels.gated_norm.forward import as_heads
from kernels.qk_norm.forward import launch


def l2_norm(dq_unit: Tensor, dk_unit: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.qk_norm.op.l2_norm_backward`."""
    from kernels.qk_norm._triton.backward import l2_norm_backward

    dq, dk = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k))
    programs, options = launch("backward", q)
    heads, inputs = as_heads(dq_unit, dk_unit, q, k)
    strides = (stride for x in inputs for stride in x.stride()[:2])
    l2_norm_backward[(programs,)](*inputs, dq, dk, inputs[0].shape[0] * heads, *strides, NORM_EPS, H=heads, **options)
    return dq, dk
