"""Tiles of the kernels. The size of a row is the number of ranks, rounded up to a power of two."""

from __future__ import annotations

from kernels.tiles import Key, Tile, TileTable

# A program holds TILE entries of v at a time, RANKED of all ranks together, and does so STEPS times. More of them would take more registers, and 8
# entries a thread (16 bytes of 16-bit numbers) would lie otherwise than 4 of float32, which then pass through shared memory.
TILES = TileTable(
    "gated_skip",
    safe={
        "forward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 512, "RANKED": 2048, "STEPS": 8}),
        "backward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 512, "RANKED": 1024, "STEPS": 64}),
        "ranks_forward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 512, "RANKED": 4096, "STEPS": 8}),
        "ranks_backward": Tile(num_warps=4, num_stages=1, blocks={"TILE": 512, "RANKED": 4096, "STEPS": 64}),
    },
    tuned={
        "forward": {
            Key("sm_90", 2, 1): Tile(num_warps=8, num_stages=1, blocks={"TILE": 1024, "RANKED": 4096, "STEPS": 2}),
            Key("sm_90", 2, 4): Tile(num_warps=2, num_stages=1, blocks={"TILE": 512, "RANKED": 1024, "STEPS": 16}),
        },
        "backward": {
            Key("sm_90", 2, 1): Tile(num_warps=2, num_stages=1, blocks={"TILE": 512, "RANKED": 512, "STEPS": 128}),
            Key("sm_90", 2, 4): Tile(num_warps=2, num_stages=1, blocks={"TILE": 512, "RANKED": 512, "STEPS": 64}),
        },
        "ranks_forward": {Key("sm_90", 2, 4): Tile(num_warps=4, num_stages=1, blocks={"TILE": 512, "RANKED": 4096, "STEPS": 2})},
        "ranks_backward": {Key("sm_90", 2, 4): Tile(num_warps=4, num_stages=1, blocks={"TILE": 512, "RANKED": 4096, "STEPS": 128})},
    },
)


def _candidates(sizes: tuple[tuple[int, int, int], ...], steps: tuple[int, ...]) -> list[Tile]:
    return [Tile(warps, 1, {"TILE": tile, "RANKED": ranked, "STEPS": n}) for tile, ranked, warps in sizes for n in steps]


# what `bench tune` tries
CANDIDATES = {
    "forward": _candidates(((512, 2048, 4), (512, 1024, 2), (1024, 4096, 8), (1024, 2048, 4)), (2, 8, 16)),
    "backward": _candidates(((512, 1024, 4), (512, 512, 2), (512, 2048, 8), (1024, 2048, 8)), (16, 64, 128)),
    "ranks_forward": _candidates(((512, 4096, 4), (512, 2048, 2), (1024, 4096, 8)), (2, 8, 16)),
    "ranks_backward": _candidates(((512, 4096, 4), (512, 2048, 2), (1024, 4096, 8)), (16, 64, 128)),
}
