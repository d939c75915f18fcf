"""Tiles of the kernels. The size of a row is the number of angles rounded up to a power of two; its itemsize that of q and k."""

from __future__ import annotations

from kernels.tiles import Key, Tile, TileTable

CHUNK = 64  # tokens of a program, which sums their turns one by one
_H100_HALF = Key("sm_90", 2, 16)

# ANGLES, PAIRS: angles, and pairs of channels, of a program. VECTOR: channels that a thread reads at once, at most: the fewer, the more heads are in
# one thread, whose sums over heads need no other thread. COLUMNS: of all heads' angles
TILES = TileTable(
    "rotary_keys",
    safe={
        "turns": Tile(num_warps=4, num_stages=1, blocks={"ANGLES": 512}),
        "starts": Tile(num_warps=4, num_stages=1, blocks={"COLUMNS": 128}),
        "forward": Tile(num_warps=1, num_stages=1, blocks={"PAIRS": 256, "VECTOR": 8}),
        "backward": Tile(num_warps=1, num_stages=1, blocks={"PAIRS": 256, "VECTOR": 4}),
        "carries": Tile(num_warps=4, num_stages=1, blocks={"COLUMNS": 128}),
        "gradients": Tile(num_warps=4, num_stages=1, blocks={"ANGLES": 256}),
    },
    tuned={
        "turns": {_H100_HALF: Tile(num_warps=4, num_stages=1, blocks={"ANGLES": 256})},
        "starts": {_H100_HALF: Tile(num_warps=4, num_stages=1, blocks={"COLUMNS": 128})},
        "forward": {_H100_HALF: Tile(num_warps=1, num_stages=1, blocks={"PAIRS": 256, "VECTOR": 4})},
        "backward": {_H100_HALF: Tile(num_warps=1, num_stages=1, blocks={"PAIRS": 256, "VECTOR": 4})},
        "carries": {_H100_HALF: Tile(num_warps=4, num_stages=1, blocks={"COLUMNS": 128})},
        "gradients": {_H100_HALF: Tile(num_warps=2, num_stages=1, blocks={"ANGLES": 256})},
    },
)

# what `bench tune` tries
CANDIDATES = {
    "turns": [Tile(warps, 1, {"ANGLES": angles}) for angles, warps in ((256, 2), (256, 4), (1024, 4), (1024, 8), (2048, 8))],
    "forward": [
        Tile(warps, 1, {"PAIRS": pairs, "VECTOR": vector})
        for pairs, warps in ((128, 1), (256, 1), (256, 2), (512, 1), (512, 2), (1024, 4))
        for vector in (4, 8)
    ],
    "backward": [
        Tile(warps, 1, {"PAIRS": pairs, "VECTOR": vector})
        for pairs, warps in ((128, 1), (256, 1), (256, 2), (512, 1), (512, 2))
        for vector in (2, 4, 8)
    ],
    "gradients": [Tile(warps, 1, {"ANGLES": angles}) for angles, warps in ((256, 2), (512, 4), (512, 8), (1024, 8))],
}
