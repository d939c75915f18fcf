"""DeltaNet: no decay, one scalar gate for erase and write (arXiv 2406.06484)."""

from __future__ import annotations

from typing import final

from torch import Tensor

from mixers.delta import DeltaMixer, Gates


@final
class DeltaNet(DeltaMixer):
    """S_t = (I - beta k k^T) S_{t-1} + beta k v^T: beta per value head.

    The rest of the layer is `gdn2`'s.

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
        super().__init__(d_model, num_heads, head_dim, num_v_heads, v_head_dim, conv_size, norm_eps)
        self.beta_proj = self.linear(d_model, self.num_v_heads)

    def gates(self, x: Tensor) -> Gates:
        beta = self.beta_proj(x).sigmoid().unsqueeze(-1)
        return Gates(None, beta, beta)
