"""Launches the backward kernels, and sums what their programs leave. Shapes: as in `forward.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rotary.forward import as_tokens, documents, power, sizes_of, warps
from kernels.rotary.tiles import CHUNK, TILES


def rotary_keys(
    dq: Tensor, dk: Tensor, dlast: Tensor, B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, delta: Tensor, cu_seqlens: Tensor | None,
    tanh: Tensor, starts: Tensor, last_fixed: Tensor, neighbours: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """See `kernels.rotary.op.rotary_keys_backward`."""
    from kernels.rotary._triton.backward import rotary_backward
    from kernels.rotary._triton.carries import carry_back, turn_gradients

    s = sizes_of(B, B_bias, tanh.shape[-1], cu_seqlens)
    cu, document = documents(cu_seqlens, s)
    dq, dk, dlast, delta, B_bias, C_bias = (x.contiguous() for x in (dq, dk, dlast, delta, B_bias, C_bias))
    programs, tokens, packed = s.rows * s.chunks, s.rows * s.tokens, cu is not None
    key = dq.device, dq.element_size(), power(s.angles)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, device=dq.device, dtype=torch.float32)

    tile = TILES.pick("backward", *key)
    blocks = s.head_blocks(tile)
    of_inputs = [scratch(blocks // s.groups, tokens, s.rank, s.groups, s.channels) for _ in "BC"]
    of_biases = [scratch(programs, s.rank, s.heads, s.channels) for _ in "BC"]
    dtanh, ddelta = scratch(s.rank * blocks, tokens, s.angles), scratch(s.rank, tokens, s.heads)
    sums, firsts = scratch(s.rank, programs, s.heads, s.angles), scratch(s.rank if packed else 0, s.sequences, s.heads, s.angles)
    rows = as_tokens(B), as_tokens(C)
    rotary_backward[programs, blocks, s.rank](
        *(dq, dk, dlast, *rows, B_bias, C_bias, tanh, delta, cu, document, starts, last_fixed, *of_inputs, *of_biases, dtanh, ddelta, sums, firsts),
        *(tokens, s.tokens, s.chunks, s.sequences, rows[0].stride(0), rows[1].stride(0)),
        NEIGHBOURS=neighbours,
        PACKED=packed,
        **s.constants(tile),
    )

    carries = scratch(programs, s.heads, s.angles)
    dfirst = firsts.sum(0) if packed else scratch(s.sequences, s.heads, s.angles)
    tile = TILES.pick("carries", *key)
    block, columns = tile.blocks["COLUMNS"], s.heads * s.angles
    carry_back[s.rows, -(-columns // block)](
        *(sums, carries, dfirst, cu, document, s.tokens, s.chunks),
        HA=columns, CHUNK=CHUNK, R=s.rank, BLOCK=block, HAS_FIRST=True, PACKED=packed, **warps(tile),
    )  # fmt: skip
    dtheta, delta_gradient = torch.empty(tanh.shape, device=dq.device, dtype=dtype), torch.empty_like(delta)
    tile, size = TILES.pick("gradients", *key), max(16, power(s.angles))  # a product needs 16
    turn_gradients[(programs,)](
        *(dtanh, ddelta, carries, tanh, delta, cu, document, dtheta, delta_gradient, tokens, s.tokens, s.chunks),
        H=s.heads, A=s.angles, CHUNK=CHUNK, R=s.rank, PARTS=s.rank * blocks, HB=max(16, tile.blocks["ANGLES"] // size), BA=size, PACKED=packed,
        **warps(tile),
    )  # fmt: skip
    dB, dC = ((x.squeeze(0) if x.shape[0] == 1 else x.sum(0)).view(like.shape).to(like.dtype) for x, like in zip(of_inputs, (B, C), strict=True))
    dB_bias, dC_bias = (x.sum(0).transpose(0, 1).contiguous() for x in of_biases)
    return [dB, dC, dB_bias, dC_bias, dtheta, delta_gradient, dfirst]
