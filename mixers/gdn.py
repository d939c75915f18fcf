"""Gated DeltaNet: scalar decay, one scalar gate for erase and write (arXiv 2412.06464)."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from mixers.delta import DeltaMixer, Gates
from mixers.layers import DeltaGates


@final
class GatedDeltaNet(DeltaMixer):
    """S_t = exp(g) (I - beta k k^T) S_{t-1} + beta k v^T: decay and beta per value head; else as `gdn2`. Settings: `DeltaMixer`'s."""

    def make_gates(self) -> None:
        self.beta_proj = self.linear(self.d_model, self.num_v_heads)
        self.f_proj = self.linear(self.d_model, self.num_v_heads)
        self.decay = DeltaGates(self.num_v_heads, 1)

    def gate_layers(self) -> list[nn.Module]:
        return [self.f_proj, self.beta_proj]

    def gates_of(self, *outputs: Tensor) -> Gates:
        g, beta, _ = self.decay(*outputs)
        return Gates(g, beta.unsqueeze(-1), beta.unsqueeze(-1))
