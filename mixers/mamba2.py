"""Mamba-2: scalar decay a head, keys and queries shared by groups of heads, no erase (arXiv 2405.21060).

Shapes: B batch, T tokens, N sequences, G groups, H heads (a multiple of G), S d_state, P head_dim, I = H * P = expand * d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import causal_conv1d, causal_conv1d_step, delta_rule, delta_rule_step, gated_rms_norm
from mixers import mamba_ssm
from mixers.base import SequenceMixer, at_least, divides, linear_flops, load_named, positive
from mixers.delta import delta_rule_flops
from mixers.layers import MIXER_GAIN, DecayModule, Linear, Skip, xavier
from mixers.mamba_ssm import Backend, Resolved
from mixers.state import DeltaState, zero_cache, zero_state

MAMBA_SSM = {  # the parameters of mamba_ssm.modules.mamba2.Mamba2, each of one shape with ours
    "in_proj.weight": "in_proj.weight",
    "conv1d.weight": "conv1d.weight",
    "conv1d.bias": "conv1d.bias",
    "dt_bias": "step_size.delta",
    "A_log": "step_size.a",
    "D": "skip.D",
    "norm.weight": "norm.weight",
    "out_proj.weight": "out_proj.weight",
}
# What backend "auto" is on a GPU with mamba-ssm, by the largest d_state of a class; tests/test_mamba_auto.py holds it against docs/benchmarks
AUTO: dict[int, Resolved] = {64: "delta", 128: "delta"}


@final
class StepSize(DecayModule):
    """The step size Delta = softplus(f + delta) of each head and its log-decay -exp(a) * Delta. Args: `DecayModule`'s."""

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f [.., H] -> g <= 0 and Delta, [.., H, 1] each, and the rate -exp(a) [H], in at least float32."""
        rate, dt = -self.a.exp(), F.softplus(f.to(self.delta.dtype) + self.delta)
        return (rate * dt).unsqueeze(-1), dt.unsqueeze(-1), rate


@final
class BiasedConv(nn.Module):
    """Causal depthwise convolution with a bias, then SiLU.

    Args:
        channels: channels.
        size: taps.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))  # torch's Conv1d has this axis
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5  # torch's Conv1d: uniform in +- 1 / sqrt(fan_in)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, channels], state [N, size-1, channels] -> y and the new state, in the dtype of the one before."""
        y, new = causal_conv1d(x, self.weight.squeeze(1), self.bias, activation="silu", state=state, cu_seqlens=cu_seqlens)
        return y, new if state is None else new.to(state.dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, channels], state [B, size-1, channels] -> y and the new state, in the dtype of the one before."""
        y, new = causal_conv1d_step(x, self.weight.squeeze(1), self.bias, activation="silu", state=state)
        return y, new.to(state.dtype)


@final
class GroupRMSNorm(nn.Module):
    """RMSNorm over each of `groups` slices of the last axis.

    Args:
        size: channels.
        groups: slices that are normalised each for itself.
        eps: added to the mean of the squares.
    """

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., size] -> x's shape and dtype; computed in at least float32."""
        parts = zip(x.chunk(self.groups, -1), self.weight.chunk(self.groups), strict=True)
        normed = [gated_rms_norm(part, None, weight, self.eps) for part, weight in parts]
        return normed[0] if self.groups == 1 else torch.cat(normed, -1)


@final
class Mamba2(SequenceMixer[DeltaState]):
    """S_t = exp(-exp(a) Delta) S_{t-1} + Delta B x^T, o = S^T C + D x, with Delta = softplus(f + delta) a number per head.

    One input projection gives the gate, x, B, C and f; x, B and C go through a short convolution and SiLU. The output is RMSNorm(o * SiLU(gate)),
    projected. On `kernels.delta_rule`: queries C, keys B, values x, decay -exp(a) Delta, write gate Delta, no erase gate.

    Args:
        d_model: width of the input and the output.
        expand: the heads' channels together are expand * d_model.
        head_dim: channels of a head, a divisor of expand * d_model.
        d_state: size of the keys and queries: a head's state is d_state * head_dim numbers.
        num_groups: groups of heads that share keys and queries (and the output norm), a divisor of the number of heads.
        conv_size: taps of the short convolution.
        norm_eps: epsilon of the output norm.
        backend: delta (`kernels.delta_rule`), mamba_ssm (that package's SSD kernels; a decode step stays with delta), or auto (`AUTO`).
    """

    def __init__(
        self,
        d_model: int,
        expand: int = 2,
        head_dim: int = 64,
        d_state: int = 64,
        num_groups: int = 1,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(d_model)
        at_least(1, expand=expand, head_dim=head_dim, d_state=d_state, num_groups=num_groups)
        positive(norm_eps=norm_eps)
        at_least(2, conv_size=conv_size)
        self.width = expand * d_model
        divides("head_dim", head_dim, self.width, f"expand * d_model = {self.width} channels")
        self.num_heads, self.head_dim, self.d_state, self.num_groups = self.width // head_dim, head_dim, d_state, num_groups
        divides("num_groups", num_groups, self.num_heads, f"the {self.num_heads} heads (expand * d_model / head_dim)")
        self.kernels = mamba_ssm.choose(backend, AUTO, d_state, mamba_ssm.ssd_refusal(head_dim, d_state), mamba_ssm.SSD_DTYPES)
        conv_width = self.width + 2 * num_groups * d_state
        init = xavier(MIXER_GAIN)
        self.in_proj = Linear(d_model, self.width + conv_width + self.num_heads, init=init)  # gate; x, B, C; f
        self.conv1d = BiasedConv(conv_width, conv_size)
        self.step_size = StepSize(self.num_heads, 1)
        self.skip = Skip(self.num_heads)
        self.norm = GroupRMSNorm(self.width, num_groups, norm_eps)
        self.out_proj = Linear(self.width, d_model, init=init)

    def forward(self, x_BTD: Tensor, state: DeltaState | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, DeltaState | None]:
        self.check_input(x_BTD, state, cu_seqlens)
        gate, mixed, f = self._project(x_BTD)
        mixed, conv = self.conv1d(mixed, None if state is None else state.conv, cu_seqlens)
        q, k, v = self._heads(mixed)
        g, dt, rate = self.step_size(f)
        before = None if state is None else state.S
        chunks = v.shape[0] * -(-v.shape[1] // mamba_ssm.SSD_CHUNK)
        if self.kernels.resolve(v.device, v.dtype, chunks, "chunks") == "mamba_ssm":
            o, S = mamba_ssm.ssd(q, k, v, dt.squeeze(-1), rate, before, cu_seqlens)
        else:
            o, S = delta_rule(q, k, v, g, None, dt, scale=1.0, state=before, cu_seqlens=cu_seqlens)
        return self._output(o, v, gate), None if state is None or S is None else DeltaState(S, conv)

    def step(self, x_BD: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        self.check_step(x_BD, state)
        gate, mixed, f = self._project(x_BD)
        mixed, conv = self.conv1d.step(mixed, state.conv)
        q, k, v = self._heads(mixed)
        g, dt, _ = self.step_size(f)
        o, S = delta_rule_step(q, k, v, g, None, dt, scale=1.0, state=state.S)
        return self._output(o, v, gate), DeltaState(S, conv)

    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,  # noqa: ARG002 (the state has one size)
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeltaState:
        like = self.conv1d.weight
        S = zero_state(like, (batch_size, self.num_heads, self.d_state, self.head_dim), device, dtype)
        return DeltaState(S, zero_cache(like, (batch_size, like.shape[2] - 1, like.shape[0]), device, dtype))

    def state_numel(self, tokens: int) -> int:  # noqa: ARG002 (the state has one size)
        channels, _, taps = self.conv1d.weight.shape
        return self.num_heads * self.d_state * self.head_dim + (taps - 1) * channels

    def flops(self, tokens: int) -> int:
        rule = delta_rule_flops(tokens, self.num_heads, self.d_state, self.head_dim, erase=False)
        return linear_flops(self, tokens) + 2 * tokens * self.conv1d.weight.numel() + rule

    def load_mamba_ssm(self, state_dict: Mapping[str, Tensor]) -> None:
        """Takes the weights of a `mamba_ssm.modules.mamba2.Mamba2` of the same sizes (its `headdim`, `d_state`, `ngroups`, `d_conv`, `expand`)
        and its defaults otherwise: weights do not say whether a layer had `norm_before_gate=True` or a `dt_limit`, and this one has neither.

        Raises:
            ConfigError: a tensor that is missing, has another shape or is one that this layer does not have; nothing is changed then.
        """
        load_named(self, state_dict, MAMBA_SSM, "mamba_ssm")

    def _project(self, x: Tensor) -> list[Tensor]:
        """The gate [.., I], what the convolution reads, and f [.., H]."""
        return list(self.in_proj(x).split([self.width, self.conv1d.weight.shape[0], self.num_heads], -1))

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = self.num_groups * self.d_state
        x, B, C = mixed.split([self.width, shared, shared], -1)
        groups = (self.num_groups, self.d_state)
        return C.unflatten(-1, groups), B.unflatten(-1, groups), x.unflatten(-1, (self.num_heads, self.head_dim))

    def _output(self, o: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        gated = self.skip(o.unsqueeze(-3), x, gate.unflatten(-1, (self.num_heads, self.head_dim)))  # (o + D x) SiLU(gate), of one rank
        out: Tensor = self.out_proj(self.norm(gated.flatten(-2)))
        return out
