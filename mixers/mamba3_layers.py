"""What Mamba-3 does around the recurrence: the shift by a token, running angles, rotation, what a token's rows do not see of each other, and the
modules that own its parameters. Equations: mamba3.md.

Shapes: B batch, T tokens, N sequences (B, or the number of packed documents), R ranks, G groups, H heads, K key size, V value size, A angles.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.layers import FP32Module, fp32_parameter, inverse_softplus


def shifted(x: Tensor, first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, ..] one token later; row n of `first` [N, ..] stands at the start of sequence n (None: zeros)."""
    if cu_seqlens is None:
        head = torch.zeros_like(x[:, :1]) if first is None else first.unsqueeze(1).to(x.dtype)
        return torch.cat([head, x[:, :-1]], 1)
    starts = cu_seqlens[:-1].long()
    head = x.new_zeros(starts.numel(), *x.shape[2:]) if first is None else first.to(x.dtype)
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1).index_copy(1, starts, head.unsqueeze(0))


def last_tokens(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last token of every sequence: x [B, T, ..] -> [N, ..]."""
    return x[:, -1] if cu_seqlens is None else x[0].index_select(0, cu_seqlens[1:].long() - 1)


class _DocumentSum(torch.autograd.Function):
    """Running sums inside packed documents. Both directions only gather: autograd's own backward would add to the documents' starts with atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ends)
        total = _pad_tokens(x.cumsum(1), 1, 0)
        return total[:, 1:] - total.index_select(1, starts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (ends,) = ctx.saved_tensors
        total = _pad_tokens(grad.flip(1).cumsum(1).flip(1), 0, 1)
        return total[:, :-1] - total.index_select(1, ends), None, None


def _pad_tokens(x: Tensor, before: int, behind: int) -> Tensor:
    return F.pad(x, (*[0, 0] * (x.ndim - 2), before, behind))


def running_sum(x: Tensor, first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """first + x_1 + ... + x_t in every sequence, modulo 2 pi: x [B, T, ..], first [N, ..] (None: zero) -> [B, T, ..] in x's dtype.

    Summed in float64: float32 would be off by 1e-3 rad after a few thousand tokens, and more where documents are packed.
    """
    wide = x.double()
    if cu_seqlens is None:
        total = wide.cumsum(1)
        return wrapped(total if first is None else first.unsqueeze(1) + total).to(x.dtype)
    ends = cu_seqlens.long()
    if first is not None:
        wide = wide.index_add(1, ends[:-1], first.unsqueeze(0).double())
    document = torch.searchsorted(ends[1:], torch.arange(x.shape[1], device=x.device), right=True)
    inside: Tensor = _DocumentSum.apply(wide, ends[document], ends[document + 1])  # type: ignore[no-untyped-call]
    return wrapped(inside).to(x.dtype)


def wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi]; small angles keep their digits."""
    return angle - 2 * math.pi * (angle / (2 * math.pi)).round()


def rotate_pairs(x: Tensor, angle: Tensor, *, neighbours: bool) -> Tensor:
    """Channel pairs of x [.., R, H, K] turned by angle [.., H, A]: pairs (2i, 2i+1) if `neighbours`, else (i, i + K/2); those behind A stay."""
    angle = F.pad(angle, (0, x.shape[-1] // 2 - angle.shape[-1])).unsqueeze(-3)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else x.chunk(2, -1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)


def unseen(q: Tensor, k: Tensor, v: Tensor, zeta: Tensor, k_prev: Tensor, v_prev: Tensor, w: Tensor) -> Tensor:
    """What the rows of u lack of h, read by q (mamba3.md, equation 9): zeta (q . k) v of the same token, and w (q . k_prev) v_prev of later rows.

    q, k, k_prev [.., R, H, K], v, v_prev [.., R, H, V], zeta, w [.., H] -> [.., R, H, V], all in at least float32.
    """
    wide = zeta.dtype
    q, k, v = (x.to(wide) for x in (q, k, v))
    if q.shape[-3] == 1:
        return (zeta.unsqueeze(-2).unsqueeze(-1) * (q * k).sum(-1, keepdim=True)) * v
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, k_prev, v_prev = (x.to(wide).transpose(-3, -2) for x in (q, k, v, k_prev, v_prev))
        own = zeta[..., None, None] * (q @ k.mT)
        before = w[..., None, None] * (q @ k_prev.mT).triu(1)
        return (own @ v + before @ v_prev).transpose(-3, -2)


class Steps(NamedTuple):
    """The discretisation of each token and head, [.., H] each in at least float32 (mamba3.md, section 1)."""

    g: Tensor  # log-decay A Delta < 0
    zeta: Tensor  # weight of the token itself, lambda Delta
    behind: Tensor  # weight of the token before it, before the decay, (1 - lambda) Delta
    turn: Tensor  # [.., H, A] angle by which keys and queries turn from the token before
    delta: Tensor  # step size Delta, the sum of zeta and behind


@final
class StepSize(FP32Module):
    """Delta = softplus(f + dt_bias), A = -max(softplus(a), a_floor), lambda = sigmoid(trap), turn = pi tanh(theta) Delta.

    Starts with softplus(dt_bias) log-uniform in [dt_min, dt_max], floor dt_floor.
    """

    def __init__(self, heads: int, dt_min: float, dt_max: float, dt_floor: float, a_floor: float) -> None:
        super().__init__()
        self.dt_min, self.dt_max, self.dt_floor, self.a_floor = dt_min, dt_max, dt_floor, a_floor
        self.dt_bias = fp32_parameter(heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            dt = self.dt_bias.uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp_().clamp_min_(self.dt_floor)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def initial_ranges(self) -> dict[str, tuple[float, float]]:
        least, most = (max(dt, self.dt_floor) for dt in (self.dt_min, self.dt_max))
        return {"dt_bias": (inverse_softplus(least), inverse_softplus(most))}

    def forward(self, f: Tensor, a: Tensor, trap: Tensor, theta: Tensor) -> Steps:
        """f, a, trap [.., H], theta [.., A]."""
        f, a, trap, theta = (x.to(self.dt_bias.dtype) for x in (f, a, trap, theta))
        delta = F.softplus(f + self.dt_bias)
        g = -F.softplus(a).clamp_min(self.a_floor) * delta
        turn = math.pi * theta.tanh().unsqueeze(-2) * delta.unsqueeze(-1)
        return Steps(g, trap.sigmoid() * delta, (-trap).sigmoid() * delta, turn, delta)


@final
class Rotary(FP32Module):
    """Keys and queries of every head and rank: the groups' B and C plus a bias (1 at first), turned by the running angle."""

    def __init__(self, heads: int, rank: int, size: int) -> None:
        super().__init__()
        self.rank = rank
        self.B_bias, self.C_bias = fp32_parameter(heads, rank, size), fp32_parameter(heads, rank, size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.B_bias)
        nn.init.ones_(self.C_bias)

    def forward(self, B: Tensor, C: Tensor, angle: Tensor | None) -> tuple[Tensor, Tensor]:
        """B, C [.., R, G, K] in at least float32, angle [.., H, A] -> q, k [.., R, H, K]. No angle: the biases of q and k alone, [H, R, K]."""
        if angle is None:  # for kernels that add them and turn the sums themselves
            return self.C_bias, self.B_bias
        k, q = (self._turned(x, bias, angle) for x, bias in ((B, self.B_bias), (C, self.C_bias)))
        return q, k

    def _turned(self, x: Tensor, bias: Tensor, angle: Tensor) -> Tensor:
        heads = x.unsqueeze(-2) + bias.transpose(0, 1).unflatten(1, (x.shape[-2], -1))  # [.., R, G, H / G, K]
        return rotate_pairs(heads.flatten(-3, -2), angle, neighbours=self.rank == 1)


def written(zeta: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """zeta k v^T of rank 1: zeta [N, H], k [N, 1, H, K], v [N, H, V] -> [N, H, K, V] in at least float32."""
    wide = zeta.dtype
    return zeta[..., None, None] * k.squeeze(1).to(wide).unsqueeze(-1) * v.to(wide).unsqueeze(-2)


@final
class PerRank(FP32Module):
    """x [.., R or 1, H, V] times a weight [H, R, V], in at least float32."""

    def __init__(self, heads: int, rank: int, size: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = fp32_parameter(heads, rank, size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.transpose(0, 1)


@final
class HeadRMSNorm(nn.Module):
    """RMSNorm of x [.., heads, size] over `size` with a weight [heads * size], or [size] shared by all heads; to at least float32."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight.to(x.dtype).view(-1, x.shape[-1])
