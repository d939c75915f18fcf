"""Tiles of the kernels. The size of a row is the normalised size rounded up to a power of two."""

from __future__ import annotations

from kernels.tiles import Tile, TileTable

# TILE: entries of q, and as many of k, that a program takes
TILES = TileTable(
    "l2_norm",
    safe={
        "forward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 2048}),
        "backward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 1024}),
    },
    tuned={},
)
