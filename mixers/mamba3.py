"""Mamba-3: exponential-trapezoidal steps, rotated keys and queries, MIMO of rank R, on the delta rule without erase. Derivation: mamba3.md.

Shapes: B batch, T tokens, N sequences, R ranks, G groups, H heads (a multiple of G), K d_state, V head_dim, A angles, I = H * V = expand * d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import delta_rule, delta_rule_step, rank_values
from kernels.rotary.reference import running_sum, turns
from mixers import mamba_ssm
from mixers.base import SequenceMixer, at_least, boolean, divides, linear_flops, load_named, positive
from mixers.delta import delta_rule_flops
from mixers.errors import ConfigError
from mixers.layers import MIXER_GAIN, Linear, Skip, xavier
from mixers.mamba3_layers import HeadRMSNorm, PerRank, Rotary, Steps, StepSize, Turned, first_tokens, last_tokens, later_weights, unseen, written
from mixers.mamba_ssm import Backend, Resolved
from mixers.state import CACHES, zero_cache, zero_state

MAMBA_SSM = {  # the parameters of mamba_ssm.modules.mamba3.Mamba3, each of one shape with ours; those of other settings are absent in both
    "in_proj.weight": "in_proj.weight",
    "dt_bias": "step_size.dt_bias",
    "B_bias": "rotary.B_bias",
    "C_bias": "rotary.C_bias",
    "B_norm.weight": "B_norm.weight",
    "C_norm.weight": "C_norm.weight",
    "mimo_x": "mimo_x.weight",
    "mimo_z": "mimo_z.weight",
    "mimo_o": "mimo_o.weight",
    "D": "skip.D",
    "norm.weight": "norm.weight",
    "out_proj.weight": "out_proj.weight",
}
# What backend "auto" is on a GPU with mamba-ssm, by the largest d_state of a class; tests/test_mamba_auto.py holds it against docs/benchmarks
AUTO: dict[int, Resolved] = {64: "delta", 128: "delta"}


class Mamba3State(NamedTuple):
    """What Mamba-3 carries: the state u before the last token's write, and that token, whose weight comes with the next one."""

    u: Tensor  # [N, H, K, V] at least float32
    k: Tensor  # [N, R, H, K] the last token's rotated keys
    v: Tensor  # [N, H, V] the last token's values
    zeta: Tensor  # [N, H] what the last token weighs in its own state, at least float32
    angle: Tensor  # [N, H, A] angles summed so far, modulo 2 pi, at least float32


@final
class Mamba3(SequenceMixer[Mamba3State]):
    """h_t = a_t h_{t-1} + a_t (1 - lambda_t) Delta_t x_{t-1} + lambda_t Delta_t x_t, o_{t,r} = h_t^T q_{t,r} + D v_{t,r}, with a_t = exp(A_t Delta_t)
    and x_t = sum_r k_{t,r} v_{t,r}^T.

    One input projection gives z, v, B, C, and per head Delta, A and lambda. Keys and queries are RMSNorm(B) and RMSNorm(C) plus a bias, turned by the
    running sum of pi tanh(theta) Delta; no convolution. The output is o * SiLU(z), projected. With mimo_rank R > 1, v, z and o have a scale
    [R, head_dim] a head each, and the R outputs are summed.

    Args:
        d_model: width of the input and the output.
        expand: the heads' channels together are expand * d_model.
        head_dim: channels V of a head, a divisor of expand * d_model.
        d_state: size K of keys and queries, even: a head's state is d_state * head_dim numbers.
        num_groups: groups of heads that share B and C before the bias, a divisor of the number of heads.
        mimo_rank: keys, values and queries a token; 1 is SISO, the paper's MIMO has 4.
        rope_fraction: share of d_state that is rotated, above 0 and at most 1.
        out_norm: RMSNorm of every head's outputs before the gate.
        norm_eps: epsilon of the norms.
        dt_min: least Delta at the start, which is log-uniform.
        dt_max: largest Delta at the start.
        dt_floor: Delta at the start is raised to it.
        a_floor: -A is at least this.
        backend: delta (`kernels.delta_rule`), mamba_ssm (that package's SISO kernels in bfloat16; a decode step stays with delta), or auto (`AUTO`).
    """

    def __init__(
        self,
        d_model: int,
        expand: int = 2,
        head_dim: int = 64,
        d_state: int = 64,
        num_groups: int = 1,
        mimo_rank: int = 1,
        rope_fraction: float = 0.5,
        out_norm: bool = False,
        norm_eps: float = 1e-5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        a_floor: float = 1e-4,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(d_model)
        at_least(1, expand=expand, head_dim=head_dim, d_state=d_state, num_groups=num_groups, mimo_rank=mimo_rank)
        self.width = expand * d_model
        divides("head_dim", head_dim, self.width, f"expand * d_model = {self.width} channels")
        self.num_heads, self.head_dim, self.d_state, self.num_groups = self.width // head_dim, head_dim, d_state, num_groups
        divides("num_groups", num_groups, self.num_heads, f"the {self.num_heads} heads (expand * d_model / head_dim)")
        if d_state % 2:
            raise ConfigError(f"d_state: must be even (channels are rotated in pairs), got {d_state}")
        self.mimo_rank, self.rope_fraction = mimo_rank, rope_fraction
        is_number = isinstance(rope_fraction, (int, float)) and not isinstance(rope_fraction, bool)
        self.num_angles = int(d_state * rope_fraction) // 2 if is_number and 0 < rope_fraction <= 1 else 0
        if not self.num_angles:
            raise ConfigError(f"rope_fraction: must be in [{2 / d_state:g}, 1] (one pair of {d_state} channels at least), got {rope_fraction!r}")
        boolean(out_norm=out_norm)
        positive(norm_eps=norm_eps, dt_min=dt_min, dt_max=dt_max, dt_floor=dt_floor, a_floor=a_floor)
        if dt_min > dt_max:
            raise ConfigError(f"dt_min: must be at most dt_max = {dt_max:g}, got {dt_min:g}")
        if dt_floor > dt_max:
            raise ConfigError(f"dt_floor: must be at most dt_max = {dt_max:g}, got {dt_floor:g}: every Delta would start there")
        refusal = mamba_ssm.siso_refusal(head_dim, d_state, mimo_rank, self.num_angles)
        self.kernels = mamba_ssm.choose(backend, AUTO, d_state, refusal, mamba_ssm.SISO_DTYPES)
        shared, init = mimo_rank * num_groups * d_state, xavier(MIXER_GAIN)
        self.parts = [self.width, self.width, shared, shared, *[self.num_heads] * 3, self.num_angles]  # z, v, B, C, f, a, trap, theta
        self.in_proj = Linear(d_model, sum(self.parts), init=init)
        self.step_size = StepSize(self.num_heads, dt_min, dt_max, dt_floor, a_floor)
        self.B_norm, self.C_norm = HeadRMSNorm(d_state, norm_eps), HeadRMSNorm(d_state, norm_eps)
        self.rotary = Rotary(self.num_heads, mimo_rank, d_state)
        starts = (1 / mimo_rank, 1.0, 1 / mimo_rank)
        scales = [nn.Identity() if mimo_rank == 1 else PerRank(self.num_heads, mimo_rank, head_dim, start) for start in starts]
        self.mimo_x, self.mimo_z, self.mimo_o = scales
        self.skip = Skip(self.num_heads)
        self.norm = HeadRMSNorm(self.width, norm_eps) if out_norm else nn.Identity()
        self.out_proj = Linear(self.width, d_model, init=init)

    def forward(self, x_BTD: Tensor, state: Mamba3State | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Mamba3State | None]:
        self.check_input(x_BTD, state, cu_seqlens)
        z, v, B, C, raw = self._project(x_BTD)
        sequences, v_ranks = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, self._ranks(v)
        backend = self.kernels.resolve(v.device, v.dtype, sequences)
        o, after = self.recurrence(backend, v, v_ranks, B, C, raw, state, cu_seqlens)
        return self._output(o, v, z), after

    def recurrence(
        self,
        backend: Resolved,
        v: Tensor,
        v_ranks: Tensor,
        B: Tensor,
        C: Tensor,
        raw: list[Tensor],
        state: Mamba3State | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Mamba3State | None]:
        """What a backend computes: the steps, rotation and recurrence, o [B, T, R, H, V].

        Args:
            backend: delta, or mamba_ssm where it can run.
            v: [B, T, H, V].
            v_ranks: it, scaled for every rank, [B, T, R, H, V].
            B, C: normalised, [B, T, R, G, K].
            raw: f, a, trap [B, T, H] and theta [B, T, A] of the projection.
            state, cu_seqlens: as in `forward`.
        """
        steps = self.step_size(*raw)
        if backend == "mamba_ssm":
            return self._mamba_ssm(v, B, C, raw, steps, state, cu_seqlens)
        return self._delta(v, v_ranks, B, C, steps, state, cu_seqlens)

    def _delta(
        self, v: Tensor, v_ranks: Tensor, B: Tensor, C: Tensor, steps: Steps, state: Mamba3State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Mamba3State | None]:
        q, k, angle = self._keys(B, C, steps, None if state is None else state.angle, cu_seqlens, v.dtype)
        w, u = later_weights(steps.zeta, steps.behind, cu_seqlens), None
        if state is not None:  # the carried token in u, with what it weighs for the first one here
            u = state.u + written(state.zeta + first_tokens(steps.behind, cu_seqlens), state.k.to(v.dtype), self._ranks(state.v.to(v.dtype)))
        gates = steps.g.unsqueeze(-1), None, w.unsqueeze(-1)
        o, u = delta_rule(q, k, v_ranks, *gates, own=steps.zeta.unsqueeze(-1), scale=1.0, state=u, cu_seqlens=cu_seqlens)
        if state is None:
            return o, None
        kept = [*(last_tokens(x, cu_seqlens) for x in (k, v, steps.zeta)), angle]
        return o, Mamba3State(u, *(x.to(old.dtype) for x, old in zip(kept, state[1:], strict=True)))

    def _mamba_ssm(
        self, v: Tensor, B: Tensor, C: Tensor, raw: list[Tensor], steps: Steps, state: Mamba3State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Mamba3State | None]:
        q_bias, k_bias = (bias.squeeze(1) for bias in self.rotary(None)[:2])
        inputs = mamba_ssm.SisoInputs(C.squeeze(-3), B.squeeze(-3), v, steps.g, steps.delta, raw[2], raw[3], q_bias, k_bias)
        if state is None:
            return mamba_ssm.siso(inputs, None, cu_seqlens)[0].unsqueeze(-3), None
        h = state.u + written(state.zeta, state.k, state.v.unsqueeze(1))  # there the last token is in the state
        o, after = mamba_ssm.siso(inputs, mamba_ssm.SisoState(state.angle, h, state.k.squeeze(1), state.v), cu_seqlens)
        assert after is not None
        angle = running_sum(turns(steps.theta, steps.delta), state.angle, cu_seqlens)  # theirs is rounded to bfloat16
        kept = [after.k.unsqueeze(1), *(last_tokens(x, cu_seqlens) for x in (v, steps.zeta, angle))]
        k, v, zeta, angle = (x.to(old.dtype) for x, old in zip(kept, state[1:], strict=True))
        return o.unsqueeze(-3), Mamba3State(after.h - written(zeta, k, v.unsqueeze(1)), k, v, zeta, angle)

    def check_state(self, state: tuple[Tensor, ...] | None, sequences: int) -> None:
        super().check_state(state, sequences)
        if state is None:
            return
        H, K, V, R = self.num_heads, self.d_state, self.head_dim, self.mimo_rank
        shapes = {"u": (H, K, V), "k": (R, H, K), "v": (H, V), "zeta": (H,), "angle": (H, self.num_angles)}
        wide = torch.promote_types(self.in_proj.weight.dtype, torch.float32)  # what sums are kept in
        for (name, shape), x in zip(shapes.items(), state, strict=True):
            dtypes = CACHES if name in ("k", "v") else (wide,)
            if x.shape[1:] != shape or x.dtype not in dtypes:
                kind = "floating-point" if len(dtypes) > 1 else str(wide)
                raise ValueError(f"Mamba3: the state's {name} must be {kind} of shape {[sequences, *shape]}, got {x.dtype} of {list(x.shape)}")

    def step(self, x_BD: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
        self.check_step(x_BD, state)
        z, v, B, C, raw = self._project(x_BD)
        steps = self.step_size(*raw)
        one = steps._replace(theta=steps.theta.unsqueeze(1), delta=steps.delta.unsqueeze(1))  # a sequence of one token
        q, k, angle = self._keys(B.unsqueeze(1), C.unsqueeze(1), one, state.angle, None, v.dtype)
        q, k = q.squeeze(1), k.squeeze(1)
        k_prev, v_prev = state.k.to(v.dtype), self._ranks(state.v.to(v.dtype))
        w, v_ranks = steps.g.exp() * (state.zeta + steps.behind), self._ranks(v)
        u, rows = state.u, []
        for r in range(self.mimo_rank):
            g = None if r else steps.g.unsqueeze(-1)
            o, u = delta_rule_step(q[:, r], k_prev[:, r], v_prev[:, r], g, None, w.unsqueeze(-1), scale=1.0, state=u)
            rows.append(o)
        o = torch.stack(rows, 1) + unseen(q, k, v_ranks, steps.zeta, k_prev, v_prev, w)
        kept = (x.to(old.dtype) for x, old in zip((k, v, steps.zeta, angle), state[1:], strict=True))
        return self._output(o, v, z), Mamba3State(u, *kept)

    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,  # noqa: ARG002 (the state has one size)
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba3State:
        like, heads = self.in_proj.weight, (batch_size, self.num_heads)
        u = zero_state(like, (*heads, self.d_state, self.head_dim), device, dtype)
        cache = zero_cache(like, (batch_size, self.mimo_rank, self.num_heads, self.d_state), device, dtype)
        angle = u.new_zeros(*heads, self.num_angles)
        return Mamba3State(u, cache, cache.new_zeros(*heads, self.head_dim), u.new_zeros(heads), angle)

    def state_numel(self, tokens: int) -> int:  # noqa: ARG002 (the state has one size)
        return self.num_heads * (self.d_state * self.head_dim + self.mimo_rank * self.d_state + self.head_dim + 1 + self.num_angles)

    def flops(self, tokens: int) -> int:
        rank, sizes = self.mimo_rank, self.d_state + self.head_dim
        rule = delta_rule_flops(tokens * rank, self.num_heads, self.d_state, self.head_dim, erase=False)
        return linear_flops(self, tokens) + rule + 2 * tokens * self.num_heads * rank * rank * sizes  # a token's own: q . k and its product with v

    def load_mamba_ssm(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes the weights of a `mamba_ssm.modules.mamba3.Mamba3` of the same sizes (`headdim`, `ngroups` and `is_outproj_norm` are its names).
        One with `is_mimo=True` and rank 1 has scales that rank 1 has not here.

        Raises:
            ConfigError: a tensor that is missing, does not fit or is one that this layer does not have; nothing is changed then.
        """
        load_named(self, state_dict, MAMBA_SSM, "mamba_ssm")

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """z and v [.., H, V], normalised B and C [.., R, G, K], and what the steps are computed from: f, a, trap, theta."""
        z, v, B, C, *raw = self.in_proj(x).split(self.parts, -1)
        z, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (z, v))
        B, C = (t.unflatten(-1, (self.mimo_rank, self.num_groups, -1)) for t in (B, C))
        return z, v, self.B_norm(B), self.C_norm(C), raw

    def _keys(
        self, B: Tensor, C: Tensor, steps: Steps, first: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, R, H, K] and the last angle of each sequence, from B and C [B, T, R, G, K] and the angle before."""
        first = None if first is None else first.to(steps.delta.dtype)
        q, k, angle = self.rotary(Turned(B, C, steps.theta, steps.delta, first, cu_seqlens, dtype))
        return q, k, angle

    def _scales(self) -> list[Tensor]:
        """What values, gates and outputs are multiplied by for every rank, [H, R, V] each; none for one rank."""
        return [module() for module in (self.mimo_x, self.mimo_z, self.mimo_o) if isinstance(module, PerRank)]

    def _ranks(self, v: Tensor) -> Tensor:
        """v [.., H, V] scaled for every rank, [.., R, H, V], in v's dtype."""
        return rank_values(v, self.mimo_x()) if isinstance(self.mimo_x, PerRank) else v.unsqueeze(-3)

    def _output(self, o: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """o [.., R, H, V], v, z [.., H, V] -> [.., d_model]."""
        if isinstance(self.norm, HeadRMSNorm):  # between the skip connection and the gate: more than the fused op does
            o = o.to(torch.promote_types(o.dtype, torch.float32))
            gate = F.silu(self.mimo_z(z.unsqueeze(-3).to(o.dtype)))
            y = self.mimo_o(self.norm(self.skip(o, self._ranks(v))) * gate).sum(-3).to(v.dtype)
        else:
            y = self.skip(o, v, z, self._scales())
        out: Tensor = self.out_proj(y.flatten(-2))
        return out
