"""Which block sizes, warps and pipeline stages a Triton kernel runs with: shipped tables, never searched while a model trains.

An op's `tiles.py` holds one `TileTable`; `python -m recipes bench tune` measures the candidates that its rows are chosen from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

import torch

logger = logging.getLogger("kernels")

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# bytes of shared memory that one program may take there
SHARED_MEMORY = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}


class Tile(NamedTuple):
    """How one kernel is launched."""

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int] = {}  # compile-time block sizes, by the kernel's argument names

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Key(NamedTuple):
    """What a tuned row is for."""

    architecture: str
    itemsize: int  # bytes of q, k and v's dtype
    size: int  # the op's own measure: the padded head size, the number of taps, ...


used: dict[tuple[str, str, Key], Tile] = {}  # what this process has launched kernels with: (op, kernel, key) -> tile


class TileTable:
    """The tiles of an op's kernels.

    Args:
        op: the op's name, for messages.
        safe: for each kernel a tile that fits every architecture, dtype and size.
        tuned: for each kernel the rows that were measured.
    """

    def __init__(self, op: str, safe: Mapping[str, Tile], tuned: Mapping[str, Mapping[Key, Tile]]) -> None:
        self.op, self.safe, self.tuned = op, dict(safe), {name: dict(rows) for name, rows in tuned.items()}
        assert self.tuned.keys() <= self.safe.keys()

    def pick(self, kernel: str, device: torch.device, itemsize: int, size: int) -> Tile:
        """The tile of `kernel` for tensors on `device`. A device without a row gets the safe tile, said once in the log."""
        key = Key(architecture(device), itemsize, size)
        rows = self.tuned.get(kernel)
        tile = rows.get(key) if rows else None
        if tile is None:
            if key.architecture != "cpu":
                _say_once(self.op, kernel, key)
            tile = self.safe[kernel]
        used[self.op, kernel, key] = tile
        return tile

    def entries(self) -> Iterator[tuple[str, Key, Tile]]:
        """Every tuned row."""
        for kernel, rows in self.tuned.items():
            yield from ((kernel, key, tile) for key, tile in rows.items())


def architecture(device: torch.device) -> str:
    """ "sm_90" and the like; "cpu" for Triton's interpreter."""
    return "cpu" if device.type == "cpu" else _capability(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _capability(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def _say_once(op: str, kernel: str, key: Key) -> None:
    logger.warning(f"{op}: no measured tile of {kernel} for {key.architecture}, {key.itemsize} bytes, size {key.size}: a safe one runs")
