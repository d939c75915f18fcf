"""Linear attention: no decay, no erase, a positive feature map and a normaliser (arXiv 2006.16236)."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import delta_rule, delta_rule_step
from mixers.base import SequenceMixer, at_least, default_head_dim, linear_flops
from mixers.delta import delta_rule_flops
from mixers.fan_out import fan_out
from mixers.layers import MIXER_GAIN, Linear, xavier
from mixers.state import RecurrentState, zero_state

EPS = 1e-6  # added to the normaliser


@final
class LinearAttention(SequenceMixer[RecurrentState]):
    """o_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s) over s <= t, phi = elu + 1.

    The sum below the line is a column of the state: the values get a channel that is always 1.

    Args:
        d_model: width of the input and the output.
        num_heads: heads.
        head_dim: key and value size of a head; null: d_model / num_heads.
    """

    def __init__(self, d_model: int, num_heads: int = 4, head_dim: int | None = None) -> None:
        super().__init__(d_model)
        at_least(1, num_heads=num_heads)
        self.num_heads, self.head_dim = num_heads, default_head_dim("head_dim", head_dim, d_model, num_heads)
        width, init = num_heads * self.head_dim, xavier(MIXER_GAIN)
        self.q_proj = Linear(d_model, width, init=init)
        self.k_proj = Linear(d_model, width, init=init)
        self.v_proj = Linear(d_model, width, init=init)
        self.o_proj = Linear(width, d_model, init=init)

    def forward(
        self, x_BTD: Tensor, state: RecurrentState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        self.check_input(x_BTD, state, cu_seqlens)
        S = None if state is None else state.S
        o, S = delta_rule(*self._inputs(x_BTD), scale=1.0, state=S, cu_seqlens=cu_seqlens)
        return self._output(o), None if state is None else RecurrentState(S)

    def step(self, x_BD: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        self.check_step(x_BD, state)
        o, S = delta_rule_step(*self._inputs(x_BD), scale=1.0, state=state.S)
        return self._output(o), RecurrentState(S)

    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,  # noqa: ARG002 (the state has one size)
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RecurrentState:
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim + 1)
        return RecurrentState(zero_state(self.q_proj.weight, shape, device, dtype))

    def state_numel(self, tokens: int) -> int:  # noqa: ARG002 (the state has one size)
        return self.num_heads * self.head_dim * (self.head_dim + 1)

    def flops(self, tokens: int) -> int:
        rule = delta_rule_flops(tokens, self.num_heads, self.head_dim, self.head_dim + 1, erase=False)
        return linear_flops(self, tokens) + rule

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features and values in at least float32: the normaliser is a sum over all tokens."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in fan_out(x, self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        return F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)

    def _output(self, o: Tensor) -> Tensor:
        mixed = o[..., :-1] / (o[..., -1:] + EPS)
        out: Tensor = self.o_proj(mixed.flatten(-2).to(self.o_proj.weight.dtype))
        return out
