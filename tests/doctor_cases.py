"""What the tests of `doctor` and of its verdict share: a GPU that is pretended, checks that are not run, a cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.commands import checks, verdict
from recipes.commands.checks import Result, Trial

GPU = torch.device("cuda", 0)
KEY = verdict.Key("Toy GPU", "3.7", "0123")


@pytest.fixture(name="own_cache", autouse=True)
def own_cache_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for verdicts; no further processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verdict, "PROCESSES", 1)


@pytest.fixture(name="attempts")
def attempts_fixture(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the checks that have run; one with "bad" in its name fails."""
    ran: list[str] = []

    def attempt(trial: Trial, _: torch.device) -> Result:
        ran.append(trial.check.name)
        if trial.check.name == "interrupted":
            raise KeyboardInterrupt
        return Result(trial.label, "bad" not in trial.check.name, 1e-6, "o")

    monkeypatch.setattr(checks, "attempt", attempt)
    monkeypatch.setattr(verdict, "key_of", lambda _: KEY)
    return ran
