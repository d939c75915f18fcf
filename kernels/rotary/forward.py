"""Launches the forward kernels.

Shapes: M = batch * T tokens, R ranks, G groups, H heads, K channels, A angles, L chunks of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.rotary.tiles import CHUNK, TILES
from kernels.tiles import Tile


def power(n: int) -> int:
    """n rounded up to a power of two."""
    return 1 << (n - 1).bit_length()


class Sizes(NamedTuple):
    """What all kernels are launched by."""

    rows: int
    tokens: int  # of a row
    rank: int
    groups: int
    heads: int
    channels: int
    angles: int
    sequences: int

    @property
    def chunks(self) -> int:
        return -(-self.tokens // CHUNK)

    @property
    def still(self) -> int:
        """The pairs that do not turn, rounded up to a power of two; 0 if there are none."""
        return power(pairs) if (pairs := self.channels // 2 - self.angles) else 0

    def heads_a_program(self, tile: Tile) -> int:
        return min(max(1, tile.blocks["PAIRS"] // (power(self.angles) + self.still)), power(self.heads // self.groups))

    def head_blocks(self, tile: Tile) -> int:
        return self.groups * -(-(self.heads // self.groups) // self.heads_a_program(tile))

    def constants(self, tile: Tile) -> dict[str, Any]:
        """The compile-time arguments of the rotations."""
        return {
            "R": self.rank,
            "G": self.groups,
            "H": self.heads,
            "K": self.channels,
            "A": self.angles,
            "CHUNK": CHUNK,
            "HB": self.heads_a_program(tile),
            "BP": power(self.angles),
            "BX": self.still,
            "VECTOR": tile.blocks["VECTOR"],
            **warps(tile),
        }


def warps(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def sizes_of(B: Tensor, B_bias: Tensor, angles: int, cu_seqlens: Tensor | None) -> Sizes:
    batch, tokens, rank, groups, channels = B.shape
    return Sizes(batch, tokens, rank, groups, B_bias.shape[0], channels, angles, batch if cu_seqlens is None else cu_seqlens.numel() - 1)


def documents(cu_seqlens: Tensor | None, sizes: Sizes) -> tuple[Tensor | None, Tensor | None]:
    """cu_seqlens in int32, and the document of each chunk's first token."""
    if cu_seqlens is None:
        return None, None
    cu = cu_seqlens.to(torch.int32)
    firsts = torch.arange(0, sizes.tokens, CHUNK, device=cu.device, dtype=torch.int32)
    return cu, torch.searchsorted(cu[1:], firsts, right=True, out_int32=True)


def as_tokens(x: Tensor) -> Tensor:
    """x [batch, T, R, G, K] as [M, R * G * K] with adjacent columns: a view where the layout allows it."""
    x = x.reshape(x.shape[0] * x.shape[1], -1)
    return x if x.stride(1) == 1 else x.contiguous()


def rotary_keys(
    B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, theta: Tensor, delta: Tensor, first: Tensor | None, cu_seqlens: Tensor | None,
    neighbours: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """See `kernels.rotary.op.rotary_keys`."""
    from kernels.rotary._triton.forward import rotary_forward
    from kernels.rotary._triton.starts import chunk_starts, turn_sums

    s = sizes_of(B, B_bias, theta.shape[-1], cu_seqlens)
    cu, document = documents(cu_seqlens, s)
    tanh, delta, B_bias, C_bias = theta.float().tanh().contiguous(), delta.contiguous(), B_bias.contiguous(), C_bias.contiguous()
    first = None if first is None else first.contiguous()
    programs, key, given = s.rows * s.chunks, (B.device, dtype.itemsize, power(s.angles)), {"HAS_FIRST": first is not None, "PACKED": cu is not None}

    sums = torch.empty(programs, s.heads, s.angles, device=B.device, dtype=torch.int32)
    tile = TILES.pick("turns", *key)
    block = {"HB": max(1, tile.blocks["ANGLES"] // power(s.angles)), "BA": power(s.angles)}
    turn_sums[programs, -(-s.heads // block["HB"])](
        *(tanh, delta, first, cu, document, sums, s.tokens, s.chunks), H=s.heads, A=s.angles, C=CHUNK, **block, **given, **warps(tile)
    )
    starts = torch.empty(s.rows, s.chunks + 1, s.heads, s.angles, device=B.device, dtype=torch.int32)
    tile = TILES.pick("starts", *key)
    columns = s.heads * s.angles
    chunk_starts[s.rows, -(-columns // tile.blocks["COLUMNS"])](
        *(sums, first, cu, document, starts, s.tokens, s.chunks), HA=columns, C=CHUNK, BLOCK=tile.blocks["COLUMNS"], **given, **warps(tile)
    )

    q, k = (torch.empty(s.rows, s.tokens, s.rank, s.heads, s.channels, device=B.device, dtype=dtype) for _ in "qk")
    last = torch.empty(s.sequences, s.heads, s.angles, device=B.device, dtype=torch.float32)
    last_fixed = torch.empty_like(last, dtype=torch.int32)
    tile = TILES.pick("forward", *key)
    B, C = as_tokens(B), as_tokens(C)
    rotary_forward[programs, s.head_blocks(tile), s.rank](
        *(B, C, B_bias, C_bias, tanh, delta, first, cu, document, starts, q, k, last, last_fixed, s.tokens, s.chunks, B.stride(0), C.stride(0)),
        NEIGHBOURS=neighbours,
        **given,
        **s.constants(tile),
    )
    return [q, k, last, tanh, starts, last_fixed]
