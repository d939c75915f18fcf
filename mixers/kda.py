"""Kimi Delta Attention: channel-wise decay, one scalar gate for erase and write (arXiv 2510.26692)."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from mixers.delta import DeltaMixer, Gates
from mixers.layers import DeltaGates


@final
class KimiDeltaAttention(DeltaMixer):
    """S_t = (I - beta k k^T) Diag(exp g) S_{t-1} + beta k v^T: decay per key channel, beta per value head; else as `gdn2`.

    Settings: `DeltaMixer`'s.
    """

    def make_gates(self) -> None:
        self.beta_proj = self.linear(self.d_model, self.num_v_heads)
        self.f_proj = self.low_rank(self.d_model, self.k_width)
        self.decay = DeltaGates(self.num_heads, self.head_dim)

    def gate_layers(self) -> list[nn.Module]:
        return [self.f_proj[0], self.beta_proj]

    def gates_of(self, *outputs: Tensor) -> Gates:
        hidden, beta = outputs
        g, beta, _ = self.decay(self.f_proj[1](hidden), beta)
        return Gates(g, beta.unsqueeze(-1), beta.unsqueeze(-1))
