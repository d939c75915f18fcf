"""Block sizes of the convolution's kernels; the size of a row's key is the number of taps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kernels.tiles import Key, Tile, TileTable

ENOUGH_WARPS = 2048  # below this, shorter segments keep a large GPU busier
SHORTEST_SEGMENT = 16

# BLOCK: channels of `num_warps` warps; SEGMENT: most tokens of a program; UNROLL: rows that are loaded together. A thread holds
# BLOCK / (32 num_warps) channels, each with about 2 W floats forwards and 4 W backwards. The rows of sm_90 follow the compiler's register counts
# (nothing is spilled), not yet a measurement.
_SAFE = Tile(1, 1, {"BLOCK": 128, "SEGMENT": 64, "UNROLL": 2})
_FORWARD = Tile(1, 1, {"BLOCK": 256, "SEGMENT": 64, "UNROLL": 4})
_BACKWARD = {2: Tile(1, 1, {"BLOCK": 256, "SEGMENT": 64, "UNROLL": 4}), 4: Tile(1, 1, {"BLOCK": 128, "SEGMENT": 64, "UNROLL": 4})}

TILES = TileTable(
    "causal_conv1d",
    safe={"forward": _SAFE, "backward": _SAFE, "step": Tile(1, 1, {"BLOCK": 256})},
    tuned={
        "forward": {Key("sm_90", itemsize, taps): _FORWARD for itemsize in (2, 4) for taps in (2, 3, 4)},
        "backward": {Key("sm_90", itemsize, taps): tile for itemsize, tile in _BACKWARD.items() for taps in (2, 3, 4)},
    },
)


class Plan(NamedTuple):
    """How a kernel's programs share the tensors."""

    blocks: int  # programs along the channels
    segment: int  # tokens of a program
    segments: int  # programs along the tokens of a batch row
    options: dict[str, int]  # compile-time sizes, warps, stages


def plan(kernel: str, x: Tensor, taps: int, norm_size: int, tokens: int = 1, edges: Sequence[int] = ()) -> Plan:
    """The plan of `kernel` for x [B, .., D] with `tokens` tokens a batch row; a norm group (`norm_size` channels, 0: no norm) is never divided.

    No program works on both sides of an edge, a multiple of `norm_size`.
    """
    tile = TILES.pick(kernel, x.device, x.element_size(), taps)
    channels, block = x.shape[-1], tile.blocks["BLOCK"]
    size = norm_size or min(block, power_of_two(channels))
    padded = power_of_two(size)
    groups = max(1, min(block // padded, power_of_two(-(-channels // size))))
    while any(edge % (groups * size) for edge in edges):
        groups //= 2
    warps = tile.num_warps * max(1, padded // block)
    blocks = -(-channels // (groups * size))
    segment = tile.blocks.get("SEGMENT", 1)
    while segment > SHORTEST_SEGMENT and x.shape[0] * -(-tokens // segment) * blocks * warps < ENOUGH_WARPS:
        segment //= 2
    options = {"SIZE": size, "P": padded, "G": groups, "num_warps": warps, "num_stages": tile.num_stages}
    if "UNROLL" in tile.blocks:
        options["UNROLL"] = tile.blocks["UNROLL"]
    return Plan(blocks, segment, -(-tokens // segment), options)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
