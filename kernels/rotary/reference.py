"""Keys and queries turned by running angles, in plain torch. Any device; exact in float64; autograd does the backward pass.

Shapes: B batch, T tokens, N sequences (B, or the number of packed documents), R ranks, G groups, H heads, K channels, A angles.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.varlen import positions


def rotary_keys(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    theta: Tensor,
    delta: Tensor,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    neighbours: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.rotary.api.rotary_keys`."""
    angle = running_sum(turns(theta, delta), first, cu_seqlens)
    q, k = (_turned(x, bias, angle, neighbours).to(dtype) for x, bias in ((C, C_bias), (B, B_bias)))
    return q, k, angle[:, -1] if cu_seqlens is None else angle[0].index_select(0, cu_seqlens[1:].long() - 1)


def turns(theta: Tensor, delta: Tensor) -> Tensor:
    """pi tanh(theta) Delta, by which keys and queries turn from the token before: theta [.., A], delta [.., H] -> [.., H, A] in delta's dtype."""
    return math.pi * theta.to(delta.dtype).tanh().unsqueeze(-2) * delta.unsqueeze(-1)


def _turned(x: Tensor, bias: Tensor, angle: Tensor, neighbours: bool) -> Tensor:
    """x [.., R, G, K] plus bias [H, R, K], turned: [.., R, H, K]."""
    heads = x.to(angle.dtype).unsqueeze(-2) + bias.transpose(0, 1).unflatten(1, (x.shape[-2], -1))  # [.., R, G, H / G, K]
    return rotate_pairs(heads.flatten(-3, -2), angle, neighbours=neighbours)


def rotate_pairs(x: Tensor, angle: Tensor, *, neighbours: bool) -> Tensor:
    """Channel pairs of x [.., R, H, K] turned by angle [.., H, A]: pairs (2i, 2i+1) if `neighbours`, else (i, i + K/2); those behind A stay."""
    angle = F.pad(angle, (0, x.shape[-1] // 2 - angle.shape[-1])).unsqueeze(-3)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else x.chunk(2, -1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)


def wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi]; small angles keep their digits."""
    return angle - 2 * math.pi * (angle.detach() / (2 * math.pi)).round()


def running_sum(x: Tensor, first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """first + x_1 + ... + x_t in every sequence, modulo 2 pi: x [B, T, ..], first [N, ..] (None: zero) -> [B, T, ..] in x's dtype.

    Summed in float64: float32 would be off by 1e-3 rad after a few thousand tokens. Every turn is reduced before it is added, so that one of many
    circles takes no digits of those behind it.
    """
    wide, first = wrapped(x.double()), None if first is None else wrapped(first.double())
    if cu_seqlens is None:
        total = wide.cumsum(1)
        return wrapped(total if first is None else first.unsqueeze(1) + total).to(x.dtype)
    if first is not None:
        wide = wide.index_add(1, cu_seqlens[:-1].long(), first.unsqueeze(0))
    inside: Tensor = _DocumentSum.apply(wide, cu_seqlens)  # type: ignore[no-untyped-call]
    return wrapped(inside).to(x.dtype)


class _DocumentSum(torch.autograd.Function):
    """Running sums inside packed documents x [1, T, ..], to the bit those of each document alone: no sum holds a number of another document, not even
    one that is subtracted again. Nothing is read on the host, and neither direction needs atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, cu_seqlens: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cu_seqlens)
        total, position, reach = x.clone(), positions(x.shape[1], cu_seqlens, x.device), 1
        while reach < x.shape[1]:  # every sum has the last `reach` tokens of its document; it takes over those before them
            inside = (position[reach:] >= reach).view(-1, *[1] * (x.ndim - 2))
            total[:, reach:] += total[:, :-reach].where(inside, 0.0)  # a product with zero would keep a NaN
            reach *= 2
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (cu_seqlens,) = ctx.saved_tensors
        total: Tensor = _DocumentSum.apply(grad.flip(1), grad.shape[1] - cu_seqlens.flip(0))  # type: ignore[no-untyped-call]
        return total.flip(1), None
