"""Kimi Delta Attention: channel-wise decay, one scalar gate for erase and write (arXiv 2510.26692)."""

from __future__ import annotations

from typing import final

from torch import Tensor

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

    def gates(self, x: Tensor) -> Gates:
        g, beta, _ = self.decay(self.f_proj(x), self.beta_proj(x))
        return Gates(g, beta.unsqueeze(-1), beta.unsqueeze(-1))
