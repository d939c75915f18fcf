"""Launch of the backward kernel, and the sum of its programs' shares."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.conv1d.forward import Rows, constants, edge_constants, edges_of, rows_of, three
from kernels.conv1d.tiles import plan


def backward(
    dy: list[Tensor],
    d_new_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    silu: bool,
    norm_size: int,
    norm_channels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and state (empty for None) in one launch, from those of y's parts; those of the weights come as one share a
    program, and a second launch adds these up in a fixed order."""
    from kernels.conv1d._triton.backward import conv_backward

    batch, tokens, channels = x.shape
    taps = weight.shape[1]
    edges = edges_of([d.shape[2] for d in dy])
    rows, d_rows = rows_of(x), [rows_of(d) for d in dy]
    if any(d.batch != d_rows[0].batch for d in d_rows):  # one distance for all
        d_rows = [Rows(d.contiguous(), tokens, d.shape[2]) for d in dy]
    p = plan("backward", x, taps, norm_size, tokens, edges)
    dx, d_weight, d_bias, d_state = empty_gradients(x, weight, bias, state)
    partial = torch.empty(batch * p.segments, taps + (bias is not None), channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        conv_backward[(p.blocks * batch * p.segments,)](
            rows.x,
            *three([d.x for d in d_rows]),
            d_new_state if d_new_state is None else d_new_state.contiguous(),
            weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            state if state is None else state.contiguous(),
            cu_seqlens if cu_seqlens is None else cu_seqlens.to(x.device).contiguous(),
            dx,
            d_state,
            partial,
            tokens,
            batch if cu_seqlens is None else cu_seqlens.numel() - 1,
            p.segment,
            p.segments,
            rows.batch,
            rows.stride,
            d_rows[0].batch,
            *[d_rows[min(i, len(dy) - 1)].stride for i in range(3)],
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None,
            HAS_D_NEW=d_new_state is not None,
            PACKED=cu_seqlens is not None,
            **edge_constants(edges, channels),
            **constants(p, weight, silu=silu, norm_size=norm_size, norm_channels=norm_channels),
        )
        total = partial.sum(0)
        d_weight.copy_(total[:taps].t())
        if bias is not None:
            d_bias.copy_(total[taps])
    return dx, d_weight, d_bias, d_state


def empty_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unset memory for the gradients."""
    d_bias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    d_state = x.new_empty(0) if state is None else state.new_empty(state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_bias, d_state
