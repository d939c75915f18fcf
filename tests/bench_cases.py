"""What the tests of `bench` share: a clock that they set themselves, a machine, small problems."""

from __future__ import annotations

from collections.abc import Callable

import torch

from recipes.commands import bench_groups
from recipes.commands.bench_rows import Machine
from recipes.commands.problems import Shape

SMALL = Shape(2, 70, 2, 16, 16)
MACHINE = Machine("NVIDIA H100 80GB HBM3", "2.11.0", "3.6.0", "abc1234", "2026-11-23")


class FakeClock:
    """Time passes in `spend`, and `tick` between two marks."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.flushes, self.tick = 0.0, 0, tick
        self.leads: list[float] = []

    def spend(self, ms: float) -> None:
        self.now += ms

    def lead(self, host_ms: float) -> None:
        self.leads.append(host_ms)

    def flush(self) -> None:
        self.now += 1000  # must not count
        self.flushes += 1

    def mark(self) -> float:
        return self.now

    def wait(self) -> None:
        pass

    def between(self, start: float, end: float) -> float:
        return end - start + self.tick

    def extra_mib(self, function: Callable[[], object]) -> float:
        function()
        return 7.5


def groups_of(baselines: list[str], op: str, mixers: tuple[str, ...] = ("gdn2", "kda", "gdn")) -> list[bench_groups.Group]:
    return list(bench_groups.groups(op, mixers, SMALL, torch.float32, baselines, "cpu"))
