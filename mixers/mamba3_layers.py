"""What Mamba-3 does around the recurrence: what each token weighs, what the rows of a step do not see of each other, and the modules that own its
parameters. Equations: mamba3.md.

Shapes: B batch, T tokens, N sequences (B, or the number of packed documents), R ranks, G groups, H heads, K key size, V value size, A angles.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import rotary_keys
from mixers.layers import FP32Module, fp32_parameter, inverse_softplus


def later_weights(zeta: Tensor, behind: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What a token weighs for later ones, zeta_t + behind_{t+1} (equation 6); 0 at the end of a sequence, whose last token is not in u. [B, T, H]."""
    w = F.pad(zeta[:, :-1] + behind[:, 1:], (0, 0, 0, 1))
    return w if cu_seqlens is None else w.index_fill(1, cu_seqlens[1:].long() - 1, 0.0)


def first_tokens(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The first token of every sequence: x [B, T, ..] -> [N, ..]."""
    return x[:, 0] if cu_seqlens is None else x[0].index_select(0, cu_seqlens[:-1].long())


def last_tokens(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last one: x [B, T, ..] -> [N, ..]."""
    return x[:, -1] if cu_seqlens is None else x[0].index_select(0, cu_seqlens[1:].long() - 1)


def written(weight: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """weight sum_r k_r v_r^T: weight [N, H], k [N, R, H, K], v [N, R, H, V] -> [N, H, K, V] in at least float32."""
    wide = weight.dtype
    return ((weight[:, None, :, None] * k.to(wide)).unsqueeze(-1) * v.to(wide).unsqueeze(-2)).sum(1)


def unseen(q: Tensor, k: Tensor, v: Tensor, zeta: Tensor, k_prev: Tensor, v_prev: Tensor, w: Tensor) -> Tensor:
    """What the rows of a step lack of h, read by q (mamba3.md, equation 9): zeta (q . k) v of the token, and w (q . k_prev) v_prev of later rows.

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
    theta: Tensor  # [.., A] keys and queries turn by pi tanh(theta) Delta from the token before
    delta: Tensor  # step size Delta, the sum of zeta and behind


@final
class StepSize(FP32Module):
    """Delta = softplus(f + dt_bias), A = -max(softplus(a), a_floor), lambda = sigmoid(trap).

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
        f, a, trap = (x.to(self.dt_bias.dtype) for x in (f, a, trap))
        delta = F.softplus(f + self.dt_bias)
        g = -F.softplus(a).clamp_min(self.a_floor) * delta
        return Steps(g, trap.sigmoid() * delta, (-trap).sigmoid() * delta, theta, delta)


class Turned(NamedTuple):
    """What keys and queries are made of beside their biases."""

    B: Tensor  # [B, T, R, G, K] normalised
    C: Tensor
    theta: Tensor  # [B, T, A]
    delta: Tensor  # [B, T, H]
    first: Tensor | None  # [N, H, A] angle before the first token
    cu_seqlens: Tensor | None
    dtype: torch.dtype  # of q and k


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

    def forward(self, x: Turned | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, k [B, T, R, H, K] and the last angles [N, H, A]. None: the biases of q and k alone, [H, R, K], for kernels that add them themselves."""
        if x is None:
            return self.C_bias, self.B_bias, None
        B, C, theta, delta, first, cu_seqlens, dtype = x
        pairs, biases = self.rank == 1, (self.B_bias, self.C_bias)
        return rotary_keys(B, C, *biases, theta, delta, first=first, cu_seqlens=cu_seqlens, neighbours=pairs, dtype=dtype)


@final
class PerRank(FP32Module):
    """x [.., R or 1, H, V] times a weight [H, R, V], in at least float32; without x the weight, for kernels that multiply."""

    def __init__(self, heads: int, rank: int, size: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = fp32_parameter(heads, rank, size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.weight if x is None else x * self.weight.transpose(0, 1)


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
