"""Tiles of the kernels. The size of a row is the number of columns that a program works on, see `forward.py`."""

from __future__ import annotations

from kernels.tiles import Key, Tile, TileTable

# TILE entries of at most COLUMNS columns are held at a time; a program walks over ROWS rows, copying (backward) num_stages - 1 steps ahead
TILES = TileTable(
    "delta_gates",
    safe={
        "forward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 4096, "COLUMNS": 1024, "ROWS": 16}),
        "backward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 2048, "COLUMNS": 1024, "ROWS": 64}),
    },
    tuned={
        "forward": {Key("sm_90", 2, 1024): Tile(num_warps=4, num_stages=1, blocks={"TILE": 2048, "COLUMNS": 128, "ROWS": 16})},
        "backward": {Key("sm_90", 2, 1024): Tile(num_warps=4, num_stages=3, blocks={"TILE": 2048, "COLUMNS": 128, "ROWS": 128})},
    },
)


def _candidates(warps: int, columns: tuple[int, ...], sizes: tuple[tuple[int, int], ...], stages: tuple[int, ...] = (1,)) -> list[Tile]:
    return [Tile(warps, n, {"TILE": tile, "COLUMNS": of, "ROWS": rows}) for of in columns for tile, rows in sizes for n in stages]


# what `bench tune` tries
CANDIDATES = {
    "forward": [
        *_candidates(4, (128, 256, 512), ((1024, 8), (2048, 8), (2048, 16))),
        *_candidates(8, (256, 512, 1024), ((4096, 8), (4096, 32))),
    ],
    "backward": [
        *_candidates(4, (128, 256), ((1024, 64), (1024, 128), (2048, 64), (2048, 128)), (1, 3, 4)),
        *_candidates(4, (1024,), ((1024, 16), (1024, 32))),
        *_candidates(8, (256, 1024), ((2048, 32), (2048, 64))),
    ],
}
