"""Deals samples to ranks and workers. What a rank gets follows from sample indices alone, not from shuffling state.

These are plain iterables around a DataLoader and not DataLoaders themselves, so that Lightning finds no sampler in them
to replace: the order is the same with `use_distributed_sampler` on or off.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from multiprocessing import active_children
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Sampler

from lit_modules.data.stream import TokenArray
from lit_modules.data.windows import Batch, Packer, Windows
from lit_modules.data.workers import METHOD, leave_signals_to_parent, look_after, starting
from mixers.errors import ConfigError

SHARED_MEMORY = "/dev/shm"  # where torch's worker processes hand over tensors, on Linux
AHEAD = 2  # batches that a worker makes before they are asked for
TOKEN_BYTES = 2 * 8 + 4  # of a batch: input and target, and where each token is a document of its own, its place
ROOM = 2**16  # what else is there: semaphores
PATIENCE = 900  # seconds for a batch; a worker whose batch found no room in shared memory never sends it
STEP_TOKENS = "step_tokens"  # key of the tokens an optimizer step, in the state of the data
SETTINGS = "settings"  # key of what the samples depend on
# what a training that goes on shares with the one before, unless it may change: by the name that says so, what it is
SHARED = {
    "data": "training documents (hash) of data.path, val_fraction and split_seed",
    "tokenizer": "data.tokenizer",
    "seq_len": "data.seq_len",
    "seed": "seed_everything",
    "document_boundaries": "data.document_boundaries",
}


class Shard(NamedTuple):
    """This process among those that read different data."""

    rank: int = 0
    world_size: int = 1


@final
class MicroBatches(Sampler[list[int]]):
    """Sample indices, a micro-batch at a time: number m of rank r holds samples first + (m*W + r)*B ... + B - 1.

    Every rank gets equally many. Where `stop` cuts the last ones short they are smaller, or empty. With a `period` the samples begin again at 0
    after so many.
    """

    def __init__(self, first: int, stop: int, batch_size: int, shard: Shard, period: int | None = None) -> None:
        self.first = first
        self.stop = stop
        self.batch_size = batch_size
        self.shard = shard
        self.period = period

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            start = self.first + (step * self.shard.world_size + self.shard.rank) * self.batch_size
            samples = range(start, min(start + self.batch_size, self.stop))
            yield list(samples) if self.period is None else [sample % self.period for sample in samples]

    def __len__(self) -> int:
        return -(-(self.stop - self.first) // (self.batch_size * self.shard.world_size))


def _check_room(num_workers: int, batch_bytes: int, processes: int) -> None:
    """ConfigError if the batches that workers hold ready do not fit where they hand them over: one that finds no room there dies without a word.

    All processes of a machine and the validations of a training share it. So it is looked at where the first workers of a process start.
    """
    if not num_workers or active_children() or not os.path.isdir(SHARED_MEMORY):
        return
    here = min(processes, torch.cuda.device_count() or processes)
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, here * (2 * num_workers * (AHEAD + 1) * batch_bytes + ROOM)
    if free < needed:
        raise ConfigError(
            f"data.num_workers: {num_workers} workers hand batches over in {SHARED_MEMORY}, which has {free / 2**20:,.1f} MiB left of the "
            f"{needed / 2**20:,.1f} that they may need; give it more (docker run --shm-size), or set data.num_workers to 0"
        )


def _batches(windows: Windows, packer: Packer, micro_batches: MicroBatches, num_workers: int) -> Iterator[Batch]:
    _check_room(num_workers, micro_batches.batch_size * windows.seq_len * TOKEN_BYTES, micro_batches.shard.world_size)
    loader: DataLoader[TokenArray] = DataLoader(
        windows.to_send() if num_workers else windows,
        batch_sampler=micro_batches,
        collate_fn=packer,
        num_workers=num_workers,
        multiprocessing_context=METHOD if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_parent,
        prefetch_factor=AHEAD if num_workers else None,
        timeout=PATIENCE if num_workers else 0,
    )
    try:
        with starting(num_workers):
            batches = iter(loader)
        if num_workers:
            look_after(batches)
        yield from batches
        return
    except (ConnectionError, EOFError) as error:  # a worker that was killed while it handed over a batch; else torch says it
        raise RuntimeError(f"DataLoader worker exited unexpectedly ({error})") from error
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

    A pass (Lightning's epoch) is len() micro-batches a rank: as many whole optimizer steps as one epoch of windows fills, at least one. What
    is left of the windows then comes first in the next pass: nothing is dropped, and a micro-batch may span two epochs.
    So the samples of step s are the same for every world size, batch size and accumulation with one product.

    The position is counted in samples over all ranks: those that were trained on, or delivered where nobody counts the trained ones. It does not
    matter how far workers run ahead. `state_dict` and `load_state_dict` save and restore it, also for another batch or world size.

    Args:
        accumulate: Micro-batches an optimizer step, on each rank.
        settings: What the samples depend on, by the names of `SHARED`. A saved position is only taken up again with the same.
        may_change: Those of them that may be others than in the state that is loaded.
        overfit: Lightning's overfit_batches: repeat the first so many micro-batches, or such a share of a pass. 0: do not.
        trained: Tells the samples trained on since this loader was made.
    """

    def __init__(
        self,
        windows: Windows,
        packer: Packer,
        batch_size: int,
        shard: Shard,
        num_workers: int,
        *,
        accumulate: int = 1,
        settings: Mapping[str, Any] | None = None,
        may_change: Collection[str] = (),
        overfit: float = 0,
        trained: Callable[[], int] | None = None,
    ) -> None:
        self._windows = windows
        self._packer = packer
        self._batch_size = batch_size
        self._shard = shard
        self._num_workers = num_workers
        self._accumulate = accumulate
        self._settings = dict(settings or {})
        self._may_change = may_change
        self._overfit = overfit
        self._trained = trained
        self._first = self._samples = 0  # where this loader began, and what it has delivered

    def __len__(self) -> int:
        return max(1, len(self._windows) // (self._step * self._accumulate)) * self._accumulate

    @property
    def _step(self) -> int:
        """Samples of a micro-batch over all ranks."""
        return self._batch_size * self._shard.world_size

    @property
    def _step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self._step * self._accumulate * self._windows.seq_len

    @property
    def _period(self) -> int | None:
        """Samples that are repeated."""
        batches = min(self._overfit, len(self)) if isinstance(self._overfit, int) else int(self._overfit * len(self))
        return batches * self._step or None

    def __iter__(self) -> Iterator[Batch]:
        # A generator: the position is read, and workers start, when the first batch is asked for. Lightning also
        # creates iterators that it never uses.
        step = self._step
        stop = self._samples + len(self) * step
        micro_batches = MicroBatches(self._samples, stop, self._batch_size, self._shard, self._period)
        for batch in _batches(self._windows, self._packer, micro_batches, self._num_workers):
            self._samples += step
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and the settings and number of tokens a step that it was reached with."""
        samples = self._samples if self._trained is None else self._first + self._trained()
        return {"samples": samples, SETTINGS: dict(self._settings), STEP_TOKENS: self._step_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the samples of `state`; says what has changed. In another order of other samples that is from sample 0.

        Raises:
            ConfigError: a setting that may not change has.
        """
        saved = saved_settings(state)
        changed = changes(saved, self._settings)
        if refused := {name: values for name, values in changed.items() if name not in self._may_change}:
            raise ConfigError(f"data: {describe_changes(refused)}; PackedText.may_change allows that")
        same_order = changed.keys() <= {"document_boundaries"}  # which does not move the windows
        self._first = self._samples = int(state["samples"]) if same_order else 0
        if unknown := self._settings.keys() - saved.keys():
            now = ", ".join(f"{SHARED[name]} (here {self._settings[name]})" for name in sorted(unknown))
            rank_zero_warn(f"data: the checkpoint does not say the {now} of its training")
        if changed:
            go_on = "the position in the data stays" if same_order else "training starts at sample 0 of these data"
            rank_zero_warn(f"data: {describe_changes(changed)}; {go_on}")
        if state.get(STEP_TOKENS, self._step_tokens) != self._step_tokens:
            rank_zero_warn(f"data: {self._step_tokens} tokens an optimizer step from here on, the checkpoint's training had {state[STEP_TOKENS]}")


def saved_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the state of the data of a checkpoint; of version 0.1, which had them in one string, all but `document_boundaries`.

    Raises:
        ConfigError: they are not there, or not readable.
    """
    settings, words = state.get(SETTINGS), str(state.get("order")).split(" ")
    if settings is None and len(words) > 3 and words[-2].isdigit() and words[-1].isdigit():
        settings = {"data": words[0], "tokenizer": " ".join(words[1:-2]), "seq_len": int(words[-2]), "seed": int(words[-1])}
    if not isinstance(settings, dict) or not isinstance(state.get("samples"), int):
        raise ConfigError("the checkpoint's state of the data cannot be read: it holds no samples and settings")
    return {name: settings[name] for name in SHARED if name in settings}


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What both know and differ in: the old and the new value by name."""
    return {name: (saved[name], now[name]) for name in saved if name in now and saved[name] != now[name]}


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes in words."""
    return ", ".join(f"{SHARED.get(name, name)}: {old} in the checkpoint's training, {new} here" for name, (old, new) in changed.items())
