"""DeltaNet: no decay, one scalar gate for erase and write (arXiv 2406.06484)."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from mixers.delta import DeltaMixer, Gates


@final
class DeltaNet(DeltaMixer):
    """S_t = (I - beta k k^T) S_{t-1} + beta k v^T: beta per value head; else as `gdn2`. Settings: `DeltaMixer`'s."""

    def make_gates(self) -> None:
        self.beta_proj = self.linear(self.d_model, self.num_v_heads)

    def gate_layers(self) -> list[nn.Module]:
        return [self.beta_proj]

    def gates_of(self, *outputs: Tensor) -> Gates:
        beta = outputs[0].sigmoid().unsqueeze(-1)
        return Gates(None, beta, beta)
