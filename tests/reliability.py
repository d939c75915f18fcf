"""`python tests/reliability.py [PAGE]`: writes docs/reliability.md from the tests that are marked as trying a fault.

    @pytest.mark.fault("disk full", "no file may be longer than a limit", "nothing: the same command goes on")

above a test, or in `pytest.param(.., marks=..)`, makes a row: what went wrong, how it was caused, what was lost. Every case that pytest collects
counts once, or `each` times where a case does it more often (no more than it asserts). Tests with the same three texts share a row.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
INTRO = """# Faults that were tried

Written by `make reliability` from the tests that try them; `make test` runs each of them, and fails if this page is another. Times counts the cases
of a test, and the repetitions within each.

| fault | how it was caused | times | what was lost | test |
|---|---|---|---|---|
"""


class Fault(NamedTuple):
    """A mark of one collected case."""

    fault: str
    cause: str
    lost: str
    each: int
    test: str  # file::function


def read(items: Iterable[pytest.Item]) -> list[Fault]:
    """The faults that collected tests try.

    Raises:
        ValueError: a mark that says too little, or a test that does not run.
    """
    found = []
    for item in items:
        test = item.nodeid.partition("[")[0].removeprefix("tests/")
        for mark in item.iter_markers("fault"):
            each = mark.kwargs.get("each", 1)
            texts = all(isinstance(text, str) and text.strip() and "|" not in text for text in mark.args)
            if len(mark.args) != 3 or not texts or mark.kwargs.keys() - {"each"} or not isinstance(each, int) or each < 1:
                raise ValueError(f"{item.nodeid}: must be marked fault(fault, cause, lost, each=1), got {mark.args} {mark.kwargs}")
            if any(item.get_closest_marker(name) for name in ("skip", "skipif", "xfail")):
                raise ValueError(f"{item.nodeid}: is marked as a fault that was tried, but may be skipped or fail")
            found.append(Fault(*mark.args, each, test))
    return found


def page(faults: Iterable[Fault]) -> str:
    """The table, a row for every fault, cause and loss, in the order of the tests."""
    rows: dict[tuple[str, str, str], list[Fault]] = defaultdict(list)
    for fault in sorted(faults, key=lambda fault: fault.test.partition("::")[0]):  # else as they stand in their file
        rows[fault.fault, fault.cause, fault.lost].append(fault)
    lines = []
    for (fault, cause, lost), cases in rows.items():
        tests = ", ".join(f"`{test}`" for test in dict.fromkeys(case.test for case in cases))
        lines.append(f"| {fault} | {cause} | {sum(case.each for case in cases)} | {lost} | {tests} |\n")
    return INTRO + "".join(lines)


class Collector:
    """A plugin that keeps what pytest collects."""

    items: Iterable[pytest.Item] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def marked_files() -> list[Path]:
    """Those that mention a fault: others need not be imported."""
    return [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.fault(" in file.read_text()]


def main(target: Path) -> int:
    collector, said = Collector(), io.StringIO()
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    with contextlib.redirect_stdout(said):
        code = pytest.main([*options, *map(str, marked_files())], [collector])
    if code != pytest.ExitCode.OK:
        print(f"{said.getvalue()}the tests could not be collected: {code!r}", file=sys.stderr)
        return 1
    target.write_text(page(read(collector.items)), encoding="utf-8")
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else PAGE))
