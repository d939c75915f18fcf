"""Tiles of the kernels. The size of a row is the number of columns that a program works on, see `forward.py`."""

from __future__ import annotations

from kernels.tiles import Tile, TileTable

# TILE entries are held at a time; a program walks over ROWS rows
TILES = TileTable(
    "delta_gates",
    safe={
        "forward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 4096, "ROWS": 16}),
        "backward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 2048, "ROWS": 64}),
    },
    tuned={},
)
