"""What the delta-rule mixers share: projections, short convolution, L2 norm, gated output norm. They differ in their gates.

Shapes: B batch, T tokens, N sequences, H key heads, HV value heads (a multiple of H), K key size, V value size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import delta_rule, delta_rule_step
from mixers.base import SequenceMixer, at_least, linear_flops, multiple_of, positive
from mixers.fan_out import fan_out
from mixers.layers import MIXER_GAIN, GatedRMSNorm, Linear, ShortConv, xavier
from mixers.state import DeltaState, zero_cache, zero_state


class Gates(NamedTuple):
    """Gates of the delta rule, [.., H or HV, channels or 1] each; see `kernels.delta_rule`."""

    g: Tensor | None  # log-decay
    b: Tensor | None  # erase
    w: Tensor | None  # write


def delta_rule_flops(tokens: int, v_heads: int, k_dim: int, v_dim: int, *, erase: bool) -> int:
    """The recurrence's own count, whatever backend computes it: S'^T e (with erase), k r^T and S^T q, a multiply-add per entry of the state."""
    return 2 * tokens * v_heads * k_dim * v_dim * (3 if erase else 2)


class DeltaMixer(SequenceMixer[DeltaState]):
    """q, k: linear -> short convolution -> SiLU -> L2 norm per head; v: linear -> short convolution -> SiLU; the delta rule with the gates of a
    subclass; RMSNorm per head times SiLU(low-rank gate); output projection. (Gated DeltaNet-2, arXiv 2605.22791, 3.5 and appendix C.1.)

    A subclass says what its gates are: `make_gates` builds their modules, `gate_layers` names those that read x, `gates_of` takes their outputs.

    Args:
        d_model: width of the input and the output.
        num_heads: key heads H.
        head_dim: key size K of a head.
        num_v_heads: value heads, a multiple of num_heads; null: num_heads.
        v_head_dim: value size V of a head; null: head_dim.
        conv_size: taps of the short convolution.
        norm_eps: epsilon of the output norm.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 16,
        head_dim: int = 128,
        num_v_heads: int | None = None,
        v_head_dim: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        at_least(1, num_heads=num_heads, head_dim=head_dim, num_v_heads=self.num_v_heads, v_head_dim=self.v_head_dim)
        at_least(2, conv_size=conv_size)
        multiple_of("num_v_heads", self.num_v_heads, "num_heads", num_heads)
        self.k_width, self.v_width = num_heads * head_dim, self.num_v_heads * self.v_head_dim
        self.q_proj = self.linear(d_model, self.k_width)
        self.k_proj = self.linear(d_model, self.k_width)
        self.v_proj = self.linear(d_model, self.v_width)
        self.conv = ShortConv(2 * self.k_width + self.v_width, conv_size, norm_size=head_dim, norm_channels=2 * self.k_width)
        self.gate_proj = self.low_rank(d_model, self.v_width, bias=True)
        positive(norm_eps=norm_eps)
        self.norm = GatedRMSNorm(self.v_head_dim, norm_eps)
        self.o_proj = self.linear(self.v_width, d_model)
        self.make_gates()

    @staticmethod
    def linear(in_features: int, out_features: int, *, bias: bool = False) -> Linear:
        """A linear layer with the family's initialisation."""
        return Linear(in_features, out_features, init=xavier(MIXER_GAIN), bias=bias)

    def low_rank(self, in_features: int, out_features: int, *, bias: bool = False) -> nn.Sequential:
        """Two linear layers with a value head's width between them."""
        return nn.Sequential(self.linear(in_features, self.v_head_dim), self.linear(self.v_head_dim, out_features, bias=bias))

    @abstractmethod
    def make_gates(self) -> None:
        """Adds the modules of the gates; the sizes are set."""

    @abstractmethod
    def gate_layers(self) -> list[nn.Module]:
        """The linear layers of the gates that read the input."""

    @abstractmethod
    def gates_of(self, *outputs: Tensor) -> Gates:
        """The gates from the outputs of `gate_layers`."""

    def gates(self, x: Tensor) -> Gates:
        """The gates for inputs x [.., d_model]."""
        return self.gates_of(*(layer(x) for layer in self.gate_layers()))

    def forward(self, x_BTD: Tensor, state: DeltaState | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, DeltaState | None]:
        self.check_input(x_BTD, state, cu_seqlens)
        mixed, hidden, *gates = self._read(x_BTD)
        parts, conv = self.conv(mixed, None if state is None else state.conv, cu_seqlens, self._widths)
        q, k, v = self._heads(*parts)
        o, S = delta_rule(q, k, v, *self.gates_of(*gates), state=None if state is None else state.S, cu_seqlens=cu_seqlens)
        return self._output(o, hidden), None if state is None else DeltaState(S, conv)

    def step(self, x_BD: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        self.check_step(x_BD, state)
        mixed, hidden, *gates = self._read(x_BD)
        mixed, conv = self.conv.step(mixed, state.conv)
        q, k, v = self._heads(*mixed.split(self._widths, -1))
        o, S = delta_rule_step(q, k, v, *self.gates_of(*gates), state=state.S)
        return self._output(o, hidden), DeltaState(S, conv)

    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,  # noqa: ARG002 (the state has one size)
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeltaState:
        like = self.conv.weight
        S = zero_state(like, (batch_size, self.num_v_heads, self.head_dim, self.v_head_dim), device, dtype)
        return DeltaState(S, zero_cache(like, (batch_size, like.shape[1] - 1, like.shape[0]), device, dtype))

    def state_numel(self, tokens: int) -> int:  # noqa: ARG002 (the state has one size)
        return self.num_v_heads * self.head_dim * self.v_head_dim + (self.conv.weight.shape[1] - 1) * self.conv.weight.shape[0]

    def flops(self, tokens: int) -> int:
        rule = delta_rule_flops(tokens, self.num_v_heads, self.head_dim, self.v_head_dim, erase=True)
        return linear_flops(self, tokens) + 2 * tokens * self.conv.weight.numel() + rule

    def _read(self, x: Tensor) -> list[Tensor]:
        """What the layers make of the input x [.., d_model]: q, k and v side by side, the hidden layer of the output gate, what `gates_of` takes."""
        return fan_out(x, (self.q_proj, self.k_proj, self.v_proj), self.gate_proj[0], *self.gate_layers())

    @property
    def _widths(self) -> list[int]:
        """Channels of q, k and v side by side."""
        return [self.k_width, self.k_width, self.v_width]

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            q.unflatten(-1, (self.num_heads, -1)),
            k.unflatten(-1, (self.num_heads, -1)),
            v.unflatten(-1, (self.num_v_heads, -1)),
        )

    def _output(self, o: Tensor, hidden: Tensor) -> Tensor:
        gate = self.gate_proj[1](hidden).unflatten(-1, (self.num_v_heads, -1))
        out: Tensor = self.o_proj(self.norm(o, gate).flatten(-2))
        return out
