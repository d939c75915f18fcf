"""The documentation does what it says: its worked example runs, its links lead somewhere, its names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import reliability

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


# --- docs/reliability.md ---


def test_the_committed_page_of_faults_follows_from_the_tests(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    done = subprocess.run([sys.executable, str(ROOT / "tests/reliability.py"), str(page)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert page.read_text() == (ROOT / "docs/reliability.md").read_text(), "run: make reliability"
    assert page.read_text().count("\n| ") > 5


def item(name: str, *marks: pytest.MarkDecorator) -> SimpleNamespace:
    """A test as pytest collects it."""
    given = [mark.mark for mark in marks]
    named = {mark.name: mark for mark in given}
    return SimpleNamespace(nodeid=name, iter_markers=lambda name: [mark for mark in given if mark.name == name], get_closest_marker=named.get)


def test_a_row_counts_cases_and_repetitions() -> None:
    fault, other = pytest.mark.fault("disk full", "a limit", "nothing", each=3), pytest.mark.fault("killed", "SIGKILL", "nothing")
    items = [
        item("tests/test_b.py::two[1]", other),
        item("tests/test_b.py::two[2]", other, fault),
        item("tests/test_a.py::one", fault),
        item("tests/test_a.py::no"),
    ]
    lines = reliability.page(reliability.read(items)).splitlines()
    assert lines[-2:] == [
        "| disk full | a limit | 6 | nothing | `test_a.py::one`, `test_b.py::two` |",
        "| killed | SIGKILL | 2 | nothing | `test_b.py::two` |",
    ]


@pytest.mark.parametrize(
    "marks",
    [
        [pytest.mark.fault("a", "b")],
        [pytest.mark.fault("a", "b", "")],
        [pytest.mark.fault("a", "b", "c|d")],
        [pytest.mark.fault("a", "b", "c", each=0)],
        [pytest.mark.fault("a", "b", "c", times=2)],
        [pytest.mark.fault("a", "b", "c"), pytest.mark.skip],
    ],
    ids=str,
)
def test_marks_that_make_no_row(marks: list[pytest.MarkDecorator]) -> None:
    with pytest.raises(ValueError, match=r"^tests/test_a\.py::one: "):
        reliability.read([item("tests/test_a.py::one", *marks)])
