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
    "forward": [Tile(warps, 1, {"TILE": tile, "ROWS": rows}) for tile, warps in ((1024, 4), (2048, 4), (4096, 8)) for rows in (4, 8, 16)],
    "backward": [
        *(Tile(warps, stages, {"TILE": 1024, "ROWS": rows}) for warps, stages in ((2, 1), (4, 3)) for rows in (16, 64)),
        *(Tile(4, stages, {"TILE": tile, "ROWS": rows}) for tile, stages in ((1024, 1), (2048, 3)) for rows in (64, 128)),
    ],
}
