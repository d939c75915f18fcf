"""Launches the forward kernel.

Shapes: M tokens (all axes but the last two), H heads (the last axis but one), size channels; R = M * H rows are normalised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.conv1d.reference import NORM_EPS
from kernels.gated_norm.forward import as_heads
from kernels.qk_norm.tiles import TILES


def launch(kernel: str, q: Tensor) -> tuple[int, dict[str, Any]]:
    """How many programs a kernel runs for q [.., size], and its keyword arguments."""
    size = q.shape[-1]
    block = 1 << (size - 1).bit_length()
    tile = TILES.pick(kernel, q.device, q.element_size(), block)
    rows = tile.blocks["TILE"] // block
    return -(-(q.numel() // size) // rows), {"SIZE": size, "BS": block, **tile.options()}


def l2_norm(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.qk_norm.op.l2_norm`."""
    from kernels.qk_norm._triton.forward import l2_norm_forward

    q_unit, k_unit = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k))
    programs, options = launch("forward", q)
    heads, (q, k) = as_heads(q, k)
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1)
    l2_norm_forward[(programs,)](q, k, q_unit, k_unit, q.shape[0] * heads, *strides, NORM_EPS, H=heads, **options)
    return q_unit, k_unit
