"""Tests of the Triton kernels. On a GPU they run as they are (`make test-gpu`); without one, small shapes run in Triton's interpreter
(`TRITON_INTERPRET=1 pytest tests/gpu`, part of `make test`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import ON_GPU

if not ON_GPU:
    import triton  # before the kernels: backend.interpreted() asks it

INTERPRETED = not ON_GPU and bool(triton.knobs.runtime.interpret)


def pytest_ignore_collect() -> bool | None:
    """Nothing here can run without a GPU or the interpreter."""
    return None if ON_GPU or INTERPRETED else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one: sizes and dtypes that the interpreter has no time or no means for. Those marked `long` begin first, each in
    another process."""
    long = [item for item in items if item.get_closest_marker("long")]
    rest = [item for item in items if item not in long]
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    first = max(len(items) // processes // 4, 2)  # tests that a process is given at the start
    for n, item in enumerate(long):
        rest.insert(n * first, item)
    items[:] = rest
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def memory_for_others() -> Iterator[None]:
    """torch would keep what a test has allocated, and other processes that share the GPU find it full."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


# --- the page of `make test-gpu` ---

STARTED = time.time()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-summary", type=Path, help="write a summary page of this run")
    parser.addoption("--gpu-commit", help="the commit that the page names (default: what git says)")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Writes the page, whether or not tests failed. With several processes only the one that leads them knows of all: the others get here too where
    it was ended."""
    path = config.getoption("--gpu-summary")
    if path is None or hasattr(config, "workerinput"):
        return
    from gpu_summary import BESIDE, OUTCOMES, Outcome, facts, page

    reports = [(name, report) for name in OUTCOMES for report in terminalreporter.stats.get(name, []) if hasattr(report, "duration")]
    outcomes = [Outcome(report.nodeid, name, report.duration, dict(report.user_properties).get(BESIDE, {})) for name, report in reports]
    processes = config.getoption("numprocesses", None) or 1
    path.write_text(page(facts(config.getoption("--gpu-commit")), outcomes, time.time() - STARTED, processes), encoding="utf-8")
    terminalreporter.write_line(f"wrote {path}")
