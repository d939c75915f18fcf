"""Options for running the contract tests on one's own mixer: `pytest --pyargs mixers.testing --mixer my_pkg.MyMixer`. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lightning-mixers", "contract tests of sequence mixers (mixers.testing)")
    group.addoption("--mixer", action="append", default=[], metavar="NAME", help="mixer to test: a name or my_pkg.MyMixer; repeatable")
    group.addoption("--mixer-settings", default="{}", metavar="JSON", help="settings of the mixer under test, as JSON")
    group.addoption("--mixer-d-model", type=int, default=32, metavar="N", help="d_model of the mixer under test (default: 32)")
