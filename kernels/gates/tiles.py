"""Tiles of the kernels. The size of a row is the number of columns that a program works on, see `forward.py`."""

from __future__ import annotations

from kernels.tiles import Key, Tile, TileTable

# TILE entries are held at a time; a program walks over ROWS rows
TILES = TileTable(
    "delta_gates",
    safe={
        "forward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 4096, "ROWS": 16}),
        "backward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 2048, "ROWS": 64}),
    },
    tuned={
        "forward": {Key("sm_90", 2, 1024): Tile(num_warps=8, num_stages=1, blocks={"TILE": 4096, "ROWS": 8})},
        "backward": {Key("sm_90", 2, 1024): Tile(num_warps=4, num_stages=1, blocks={"TILE": 1024, "ROWS": 16})},
    },
)

# what `bench tune` tries
CANDIDATES = {
    "forward": [Tile(warps, 1, {"TILE": tile, "ROWS": rows}) for tile, warps in ((2048, 4), (4096, 4), (4096, 8)) for rows in (8, 16, 32)],
    "backward": [Tile(warps, 1, {"TILE": tile, "ROWS": rows}) for tile, warps in ((1024, 2), (1024, 4), (2048, 4)) for rows in (16, 64, 128)],
}
