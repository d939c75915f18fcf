"""Tiles of the kernels. The size of a row is the normalised size rounded up to a power of two."""

from __future__ import annotations

from kernels.tiles import Key, Tile, TileTable

# The rows are the safe tiles: eight warps or more stages change the op's time by less than 1 %.
_FORWARD, _BACKWARD = Tile(num_warps=4, num_stages=1, blocks={"TILE": 2048}), Tile(num_warps=4, num_stages=1, blocks={"TILE": 1024})
# TILE: entries of q, and as many of k, that a program takes
TILES = TileTable(
    "l2_norm",
    safe={"forward": _FORWARD, "backward": _BACKWARD},
    tuned={"forward": {Key("sm_90", 2, 128): _FORWARD}, "backward": {Key("sm_90", 2, 128): _BACKWARD}},
)
