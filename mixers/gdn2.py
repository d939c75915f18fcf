"""Gated DeltaNet-2: erase and write decoupled, every gate channel-wise (arXiv 2605.22791)."""

from __future__ import annotations

from typing import Literal, final, get_args

from torch import Tensor, nn

from mixers.base import boolean
from mixers.delta import DeltaMixer, Gates
from mixers.errors import unknown
from mixers.layers import DeltaGates

Gate = Literal["channel", "scalar"]


@final
class GatedDeltaNet2(DeltaMixer):
    """S_t = (I - k (b * k)^T) Diag(exp g) S_{t-1} + k (w * v)^T with a gate per channel: b, g on the key axis, w on the value axis.

    Args:
        d_model: width of the input and the output.
        num_heads: key heads H.
        head_dim: key size K of a head.
        num_v_heads: value heads, a multiple of num_heads; null: num_heads.
        v_head_dim: value size V of a head; null: head_dim.
        conv_size: taps of the short convolution.
        norm_eps: epsilon of the output norm.
        erase: one gate a channel, or its mean over a head's channels (same parameter count; Table 5).
        write: one gate a channel, or its mean over a head's channels (same parameter count; Table 5).
        allow_neg_eigval: erase gate in [0, 2] instead of [0, 1] (Table 5).
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
        erase: Gate = "channel",
        write: Gate = "channel",
        allow_neg_eigval: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, num_v_heads, v_head_dim, conv_size, norm_eps)
        boolean(allow_neg_eigval=allow_neg_eigval)
        for name, gate in (("erase", erase), ("write", write)):
            if gate not in get_args(Gate):
                raise unknown(name, "gate", gate, get_args(Gate))
        self.erase, self.write, self.allow_neg_eigval = erase, write, allow_neg_eigval

    def make_gates(self) -> None:
        self.b_proj = self.linear(self.d_model, self.k_width)
        self.w_proj = self.linear(self.d_model, self.v_width)
        self.f_proj = self.low_rank(self.d_model, self.k_width)
        self.decay = DeltaGates(self.num_heads, self.head_dim)

    def gate_layers(self) -> list[nn.Module]:
        return [self.f_proj[0], self.b_proj, self.w_proj]

    def gates_of(self, *outputs: Tensor) -> Gates:
        hidden, b, w = outputs
        g, b, w = self.decay(self.f_proj[1](hidden), b, w, b_scale=2.0 if self.allow_neg_eigval else 1.0)
        b, w = b.unflatten(-1, (self.num_heads, -1)), w.unflatten(-1, (self.num_v_heads, -1))
        if self.erase == "scalar":
            b = b.mean(-1, keepdim=True)
        if self.write == "scalar":
            w = w.mean(-1, keepdim=True)
        return Gates(g, b, w)
