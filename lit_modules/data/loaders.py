"""Deals samples to ranks and workers. What a rank gets follows from sample indices alone, not from shuffling state.

These are plain iterables around a DataLoader and not DataLoaders themselves, so that Lightning finds no sampler in them
to replace: the order is the same with `use_distributed_sampler` on or off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Sampler

from lit_modules.data.stream import TokenArray
from lit_modules.data.windows import Batch, Packer, Windows
from mixers.errors import ConfigError


class Shard(NamedTuple):
    """This process among those that read different data."""

    rank: int = 0
    world_size: int = 1


@final
class MicroBatches(Sampler[list[int]]):
    """Sample indices, a micro-batch at a time: number m of rank r holds samples first + (m*W + r)*B ... + B - 1.

    Every rank gets equally many. Where `stop` cuts the last ones short they are smaller, or empty.
    """

    def __init__(self, first: int, stop: int, batch_size: int, shard: Shard) -> None:
        self.first = first
        self.stop = stop
        self.batch_size = batch_size
        self.shard = shard

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            start = self.first + (step * self.shard.world_size + self.shard.rank) * self.batch_size
            yield list(range(start, min(start + self.batch_size, self.stop)))

    def __len__(self) -> int:
        return -(-(self.stop - self.first) // (self.batch_size * self.shard.world_size))


def _batches(windows: Windows, packer: Packer, micro_batches: MicroBatches, num_workers: int) -> Iterator[Batch]:
    loader: DataLoader[TokenArray] = DataLoader(
        windows,
        batch_sampler=micro_batches,
        collate_fn=packer,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from loader
        return
    except ConfigError as error:  # of shards that are corrupt; one from a worker has its traceback in the message
        line = str(error).strip().splitlines()[-1].removeprefix("mixers.errors.ConfigError: ")
        error.__traceback__ = None  # it would keep the workers
    raise ConfigError(line)


@final
class EvaluationLoader:
    """Every window once, in stream order, over all ranks together.

    The last micro-batch may be smaller. All ranks get the same number of them (sharded models would wait for each other
    for ever otherwise): one that has nothing left gets a sequence whose targets are all -100, and n_bytes 0.
    """

    def __init__(self, windows: Windows, packer: Packer, batch_size: int, shard: Shard, num_workers: int) -> None:
        self._windows = windows
        self._packer = packer
        self._micro_batches = MicroBatches(0, len(windows), batch_size, shard)
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, as in TrainLoader.
        yield from _batches(self._windows, self._packer, self._micro_batches, self._num_workers)


@final
class TrainLoader:
    """Training samples 0, 1, 2, ... in micro-batches, each pass going on where the last one stopped.

    A pass (Lightning's epoch) is len() micro-batches a rank: as many as one epoch of windows fills, at least one. What
    is left of the windows then comes first in the next pass: nothing is dropped, and a micro-batch may span two epochs.
    So the samples of step s are the same for every world size, batch size and accumulation with one product.

    The position is counted in delivered samples over all ranks, so it does not matter how far workers run ahead.
    It is saved and restored by `state_dict` and `load_state_dict`, also for another batch or world size.

    Args:
        order: What the order depends on; a saved position is only taken up again in the same order.
        repeat: Begin every pass at sample 0 (to overfit a few batches).
    """

    def __init__(
        self,
        windows: Windows,
        packer: Packer,
        batch_size: int,
        shard: Shard,
        num_workers: int,
        *,
        order: str = "",
        repeat: bool = False,
    ) -> None:
        self._windows = windows
        self._packer = packer
        self._batch_size = batch_size
        self._shard = shard
        self._num_workers = num_workers
        self._order = order
        self._repeat = repeat
        self._samples = 0

    def __len__(self) -> int:
        return max(1, len(self._windows) // (self._batch_size * self._shard.world_size))

    def __iter__(self) -> Iterator[Batch]:
        # A generator: the position is read, and workers start, when the first batch is asked for. Lightning also
        # creates iterators that it never uses.
        if self._repeat:
            self._samples = 0
        step = self._batch_size * self._shard.world_size
        stop = self._samples + len(self) * step
        micro_batches = MicroBatches(self._samples, stop, self._batch_size, self._shard)
        for batch in _batches(self._windows, self._packer, micro_batches, self._num_workers):
            self._samples += step
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """The samples delivered so far, over all ranks."""
        return {"samples": self._samples, "order": self._order}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes on after the samples of `state`, or from sample 0 (with a warning) where the data are not the same."""
        if state["order"] == self._order:
            self._samples = int(state["samples"])
        else:
            self._samples = 0
            rank_zero_warn("data: other data or settings than the checkpoint's, so training starts at their sample 0")
