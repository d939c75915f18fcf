"""What `backend: auto` of the Mamba mixers is: the faster one in the committed rows of `bench op`, delta as long as there are none of mamba_ssm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from mixers import mamba2, mamba3
from mixers.mamba_ssm import Resolved
from recipes.commands import bench_rows
from recipes.commands.bench_rows import Row

TABLES: dict[str, Mapping[int, Resolved]] = {"ssd": mamba2.AUTO, "siso": mamba3.AUTO}  # by the rows' `what`
ROWS = bench_rows.read(Path(__file__).parents[1] / "docs/benchmarks", "op")
CLOSE = 0.03  # of the time: too near to each other for the rows to decide
Problem = tuple[str | int, ...]


def faster(rows: list[Row], what: str, above: int, largest: int) -> Resolved | None:
    """The backend with the shorter forward + backward in bfloat16 for above < d_state <= largest, by the geometric mean over shapes and GPUs, each
    from the newest run with both; None: no such run, or it does not matter."""
    ours: dict[Problem, float] = {}
    ratios: dict[Problem, float] = {}
    for row in rows:
        if row.what != what or row.dtype != "bfloat16" or not above < row.dk <= largest or not row.fwd_bwd_ms:
            continue
        shape = (row.batch, row.tokens, row.heads, row.dk, row.dv, row.gpu)
        run = (*shape, row.torch, row.triton, row.commit, row.date)
        if row.impl == "ours":
            ours[run] = float(row.fwd_bwd_ms)
        elif row.impl.startswith("mamba_ssm") and run in ours:
            ratios[shape] = ours[run] / float(row.fwd_bwd_ms)
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) if ratios else 1.0
    return None if abs(mean - 1) <= CLOSE else "mamba_ssm" if mean > 1 else "delta"


@pytest.mark.parametrize("what", TABLES)
def test_auto_is_what_the_committed_rows_say(what: str) -> None:
    """Without rows it is delta: ours runs everywhere, keeps float32, is repeatable to the bit and needs no package."""
    sizes = [0, *sorted(TABLES[what])]
    for above, largest in pairwise(sizes):
        decided = faster(ROWS, what, above, largest)
        measured = any(row.what == what and row.impl.startswith("mamba_ssm") and above < row.dk <= largest for row in ROWS)
        if decided is not None or not measured:
            assert TABLES[what][largest] == (decided or "delta"), f"{what}, d_state in {above + 1} .. {largest}"


def row(impl: str, ms: float | None, **other: str | int) -> Row:
    given = {
        **{"what": "ssd", "impl": impl, "batch": 4, "tokens": 4096, "heads": 72, "dk": 64, "dv": 64, "dtype": "bfloat16", "fwd_ms": "1"},
        **{"fwd_bwd_ms": "" if ms is None else str(ms), "extra_mib": "", "first_call_s": "", "gpu": "H100", "torch": "2.11", "triton": "3.6"},
        **{"commit": "a", "date": "2026-01-01"},
    }
    return Row(**{**given, **other})  # type: ignore[arg-type]


THEIRS = "mamba_ssm 2.3.2.post1"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),
        ([row("ours", 2.4)], None),
        ([row("ours", 2.4), row(THEIRS, 3.6)], "delta"),
        ([row("ours", 3.6), row(THEIRS, 2.4)], "mamba_ssm"),
        ([row("ours", 2.4), row(THEIRS, 2.42)], None),  # no difference
        ([row("ours", 2.4), row(THEIRS, None)], None),
        ([row("ours", 2.4, commit="b"), row(THEIRS, 3.6)], None),  # of different runs
        ([row("ours", 2.4, dtype="float32"), row(THEIRS, 3.6, dtype="float32")], None),
        ([row("ours", 2.4, dk=128), row(THEIRS, 3.6, dk=128)], None),  # another class
        ([row("ours", 2.4, what="siso"), row(THEIRS, 3.6, what="siso")], None),
        ([row("ours", 3.6), row(THEIRS, 2.4), row("ours", 2.0, commit="b"), row(THEIRS, 2.4, commit="b")], "delta"),  # the newest counts
        ([row("ours", 1.0, tokens=2048), row(THEIRS, 1.1, tokens=2048), row("ours", 3.6), row(THEIRS, 1.8)], "mamba_ssm"),  # 1 / 1.1 and 2
    ],
)
def test_rows_decide(rows: list[Row], expected: str | None) -> None:
    assert faster(rows, "ssd", 0, 64) == expected


def test_rows_of_a_file_decide(tmp_path: Path) -> None:
    bench_rows.append(tmp_path, "op", [row("ours", 3.6), row(THEIRS, 2.4)])
    assert faster(bench_rows.read(tmp_path, "op"), "ssd", 0, 64) == "mamba_ssm"
