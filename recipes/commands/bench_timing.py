"""How implementations are timed side by side: in turns, so that what else the GPU does meets all of them; medians; cold caches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20  # several times the last cache of any GPU so far
WARM_UP = 3
MIN_ROUNDS, MAX_ROUNDS = 7, 200
MIN_LEAD, MAX_LEAD = 20, 200  # in tenths of a millisecond


class Clock(Protocol):
    """Marks in the stream of what a device does."""

    def lead(self, host_ms: float) -> None:
        """A call to be timed keeps the host for so long."""

    def flush(self) -> None:
        """Empties the device's caches."""

    def mark(self) -> Any:
        """A point in time."""

    def wait(self) -> None:
        """Until all marks have been passed."""

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks."""

    def extra_mib(self, function: Callable[[], object]) -> float:
        """What a call adds to the device's memory at its peak."""


class CudaClock:
    """CUDA events, and a buffer that is overwritten to empty the cache.

    Args:
        ahead: the host gets ahead of the device, as it is inside of a model; without it a call that takes the host longer than the device counts as
            what it takes the host.
    """

    def __init__(self, ahead: bool = True) -> None:
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._ahead, self._times = ahead, 1

    def lead(self, host_ms: float) -> None:
        if self._ahead:  # each time that the buffer is overwritten takes the device a tenth of a millisecond
            self._times = max(self._times, MIN_LEAD, min(MAX_LEAD, math.ceil(15 * host_ms)))

    def flush(self) -> None:
        for _ in range(self._times):
            self._buffer.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end))

    def extra_mib(self, function: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20


class Entry(NamedTuple):
    """One implementation on its inputs."""

    what: str
    impl: str
    function: Callable[..., Any]  # takes the leaves by name, returns a tensor or a tuple
    leaves: dict[str, Tensor]
    cotangents: tuple[Tensor, ...] = ()  # of the first outputs; none: forward only

    def forward(self) -> Any:
        with torch.no_grad():
            return self.function(**self.leaves)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.outputs(), list(self.leaves.values()), self.cotangents)

    def outputs(self) -> list[Tensor]:
        """The differentiated outputs."""
        found = self.function(**self.leaves)
        return list(found if isinstance(found, tuple) else (found,))[: len(self.cotangents)]


class Timing(NamedTuple):
    """Medians."""

    fwd_ms: float
    fwd_bwd_ms: float | None = None
    extra_mib: float | None = None


def in_turns(functions: Sequence[Callable[[], object]], clock: Clock, budget_ms: float) -> list[float]:
    """The median time of each function, over rounds in which every one runs once, for about `budget_ms` in all."""
    for function in functions:
        for _ in range(WARM_UP):
            started = perf_counter()
            function()
        clock.lead(1e3 * (perf_counter() - started))
    one_round = sum(_once(functions, clock))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget_ms / max(one_round, 1e-3))))
    marks = []
    for _ in range(rounds):
        marks.append(_marked(functions, clock))  # nothing waits for the device in between: its queue stays full
    clock.wait()
    return [statistics.median(clock.between(*pair) for pair in its) for its in zip(*marks, strict=True)]


def _once(functions: Sequence[Callable[[], object]], clock: Clock) -> list[float]:
    marks = _marked(functions, clock)
    clock.wait()
    return [clock.between(*pair) for pair in marks]


def _marked(functions: Sequence[Callable[[], object]], clock: Clock) -> list[tuple[Any, Any]]:
    """One round: the marks before and behind each function."""
    marks = []
    for function in functions:
        clock.flush()
        start = clock.mark()
        function()
        marks.append((start, clock.mark()))
    return marks


def time_entries(entries: Sequence[Entry], clock: Clock, budget_ms: float = 1000.0) -> list[Timing]:
    """Forward, forward with backward, and memory of implementations of one thing."""
    forward = in_turns([entry.forward for entry in entries], clock, budget_ms)
    trained = [entry for entry in entries if entry.cotangents]
    both = dict(zip(map(id, trained), in_turns([entry.forward_backward for entry in trained], clock, 2 * budget_ms), strict=True))
    timings = []
    for entry, ms in zip(entries, forward, strict=True):
        step = entry.forward_backward if entry.cotangents else entry.forward
        timings.append(Timing(ms, both.get(id(entry)), clock.extra_mib(step)))
    return timings
