"""Tests of the Triton kernels. On a GPU they run as they are (`make test-gpu`); without one, small shapes run in Triton's interpreter
(`TRITON_INTERPRET=1 pytest tests/gpu`, part of `make test`)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from gpu_cases import ON_GPU

if not ON_GPU:
    import triton  # before the kernels: backend.interpreted() asks it

INTERPRETED = not ON_GPU and bool(triton.knobs.runtime.interpret)


def pytest_ignore_collect() -> bool | None:
    """Nothing here can run without a GPU or the interpreter."""
    return None if ON_GPU or INTERPRETED else True


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Tests marked `gpu` need one: sizes and dtypes that the interpreter has no time or no means for."""
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
