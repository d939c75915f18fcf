"""The documentation does what it says: its worked example runs, its links lead somewhere, its names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def example() -> str:
    """The class of docs/adding_a_mixer.md."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs/adding_a_mixer.md").read_text(), re.DOTALL)
    assert found
    return found.group(1)


def test_worked_example_is_short() -> None:
    assert len(example().splitlines()) <= 60


def test_worked_example_passes_the_contract(tmp_path: Path) -> None:
    (tmp_path / "retention.py").write_text(example())
    command = [sys.executable, "-m", "pytest", "--pyargs", "mixers.testing", "--mixer", "retention.Retention", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "--rootdir", "."], cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout[-500:]


def test_worked_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "retention.py").write_text(example())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    layout = ["--model.lm.layout", "[retention.Retention, swa]", "--model.lm.mixers.retention.Retention.num_heads", "2"]
    assert main(["fit", "--config", "quickstart", "--config", "tiny", *layout, "--trainer.fast_dev_run", "true"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
