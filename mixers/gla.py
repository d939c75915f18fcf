"""Gated Linear Attention: channel-wise decay, no erase (arXiv 2312.06635)."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import delta_rule, delta_rule_step
from mixers.base import SequenceMixer, at_least, default_head_dim, linear_flops, positive
from mixers.delta import delta_rule_flops
from mixers.errors import ConfigError
from mixers.fan_out import fan_out
from mixers.layers import MIXER_GAIN, GatedRMSNorm, Linear, xavier
from mixers.state import RecurrentState, zero_state


@final
class GatedLinearAttention(SequenceMixer[RecurrentState]):
    """S_t = Diag(exp g) S_{t-1} + k v^T, o = S^T q / sqrt(K), g = log sigmoid(low-rank(x)) / 16; RMSNorm per head times SiLU(gate).

    Args:
        d_model: width of the input and the output.
        num_heads: heads.
        head_dim: key size of a head; null: d_model / 2 / num_heads.
        v_head_dim: value size of a head; null: d_model / num_heads.
        gate_low_rank: width between the two linear layers of the decay.
        gate_normalizer: the log-sigmoid is divided by it, so that decays start close to 1.
        norm_eps: epsilon of the output norm.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 4,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        gate_low_rank: int = 16,
        gate_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        at_least(1, num_heads=num_heads, gate_low_rank=gate_low_rank)
        self.num_heads, self.gate_normalizer = num_heads, gate_normalizer
        self.head_dim = default_head_dim("head_dim", head_dim, d_model // 2, num_heads)
        self.v_head_dim = default_head_dim("v_head_dim", v_head_dim, d_model, num_heads)
        if gate_normalizer <= 0:
            raise ConfigError(f"gate_normalizer: must be > 0, got {gate_normalizer}")
        k_width, v_width = num_heads * self.head_dim, num_heads * self.v_head_dim
        init = xavier(MIXER_GAIN)
        self.q_proj = Linear(d_model, k_width, init=init)
        self.k_proj = Linear(d_model, k_width, init=init)
        self.v_proj = Linear(d_model, v_width, init=init)
        self.f_proj = nn.Sequential(Linear(d_model, gate_low_rank, init=init), Linear(gate_low_rank, k_width, init=init, bias=True))
        self.gate_proj = Linear(d_model, v_width, init=init)
        positive(norm_eps=norm_eps)
        self.norm = GatedRMSNorm(self.v_head_dim, norm_eps)
        self.o_proj = Linear(v_width, d_model, init=init)

    def forward(
        self, x_BTD: Tensor, state: RecurrentState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x_BTD, state, cu_seqlens)
        S = None if state is None else state.S
        *inputs, gate = self._inputs(x_BTD)
        o, S = delta_rule(*inputs, state=S, cu_seqlens=cu_seqlens)
        return self._output(o, gate), None if state is None else RecurrentState(S)

    def step(self, x_BD: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        self.check_step(x_BD, state)
        *inputs, gate = self._inputs(x_BD)
        o, S = delta_rule_step(*inputs, state=state.S)
        return self._output(o, gate), RecurrentState(S)

    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,  # noqa: ARG002 (the state has one size)
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RecurrentState:
        shape = (batch_size, self.num_heads, self.head_dim, self.v_head_dim)
        return RecurrentState(zero_state(self.q_proj.weight, shape, device, dtype))

    def state_numel(self, tokens: int) -> int:  # noqa: ARG002 (the state has one size)
        return self.num_heads * self.head_dim * self.v_head_dim

    def flops(self, tokens: int) -> int:
        rule = delta_rule_flops(tokens, self.num_heads, self.head_dim, self.v_head_dim, erase=False)
        return linear_flops(self, tokens) + rule

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, g and the gate of the output, [.., heads, their sizes]."""
        q, k, v, gate, hidden = fan_out(x, self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.f_proj[0])
        q, k, v, gate, f = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v, gate, self.f_proj[1](hidden)))
        return q, k, v, F.logsigmoid(f.to(torch.promote_types(f.dtype, torch.float32))) / self.gate_normalizer, gate

    def _output(self, o: Tensor, gate: Tensor) -> Tensor:
        out: Tensor = self.o_proj(self.norm(o, gate).flatten(-2))
        return out
