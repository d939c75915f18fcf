"""Tiles of the kernels. The size of a row is the normalised size rounded up to a power of two."""

from __future__ import annotations

from kernels.tiles import Key, Tile, TileTable

# TILE entries are held at a time; a program does so STEPS times, copying (backward) num_stages - 1 steps ahead
TILES = TileTable(
    "gated_rms_norm",
    safe={
        "forward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 4096, "STEPS": 1}),
        "backward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 2048, "STEPS": 16}),
    },
    tuned={
        "forward": {Key("sm_90", 2, 128): Tile(num_warps=4, num_stages=1, blocks={"TILE": 1024, "STEPS": 1})},
        "backward": {Key("sm_90", 2, 128): Tile(num_warps=8, num_stages=4, blocks={"TILE": 2048, "STEPS": 16})},
    },
)

# what `bench tune` tries
CANDIDATES = {
    "forward": [Tile(warps, 1, {"TILE": tile, "STEPS": steps}) for tile, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8)) for steps in (1, 2)],
    "backward": [
        Tile(warps, stages, {"TILE": tile, "STEPS": steps})
        for tile, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
        for steps in (4, 8, 16)
        for stages in (1, 3, 4)
    ],
}
