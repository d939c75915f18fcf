"""Launches the backward kernels, and sums what their programs leave of the parameters' gradients.

Shapes: as in `forward.py`; P row blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ranks.forward import by_rank, by_token, launch, strides

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def gated_skip(dy: Tensor, o: Tensor, v: Tensor, z: Tensor, D: Tensor, v_scale: Tensor, z_scale: Tensor, out_scale: Tensor) -> Gradients:
    """See `kernels.ranks.op.gated_skip_backward`."""
    from kernels.ranks._triton.backward import gated_skip_backward

    shape, tokens = o.shape, o.shape[:-3].numel()
    do, dv, dz = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (o, v, z))
    o, dy, v, z = by_rank(o, tokens), *(by_token(x, tokens) for x in (dy, v, z))
    blocks, grid, options = launch("backward", v, shape)
    dD = torch.empty(blocks, *shape[-2:], device=v.device, dtype=torch.float32)
    of_scales = [torch.empty(blocks, *x.shape, device=v.device, dtype=torch.float32) for x in (v_scale, z_scale, out_scale)]
    align, steps = strides(dy.stride(0), o.stride(0), o.stride(1), v.stride(0), z.stride(0))
    scales = (x.contiguous() for x in (D, v_scale, z_scale, out_scale))
    gated_skip_backward[grid](*(dy, o, v, z, *scales, do, dv, dz, dD, *of_scales, tokens, *steps), SCALED=v_scale.numel() > 0, ALIGN=align, **options)
    dv_scale, dz_scale, dout_scale = (x.sum(0) for x in of_scales)
    return do, dv, dz, dD.sum((0, 2)), dv_scale, dz_scale, dout_scale


def rank_values(dy: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.ranks.op.rank_values_backward`."""
    from kernels.ranks._triton.ranks import rank_values_backward

    shape, tokens = dy.shape, dy.shape[:-3].numel()
    dv = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    dy, v = by_rank(dy, tokens), by_token(v, tokens)
    blocks, grid, options = launch("ranks_backward", v, shape)
    dscale = torch.empty(blocks, *scale.shape, device=v.device, dtype=torch.float32)
    align, steps = strides(dy.stride(0), dy.stride(1), v.stride(0))
    rank_values_backward[grid](dy, v, scale.contiguous(), dv, dscale, tokens, *steps, ALIGN=align, **options)
    return dv, dscale.sum(0)
