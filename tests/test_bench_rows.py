"""What `bench` writes: rows, the page and its plots, rows of tile tables; and the page of the tests on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import MACHINE, FakeClock
from torch import Tensor

from kernels.tiles import Key, Tile, TileTable
from mixers.errors import ConfigError
from recipes.__main__ import main
from recipes.commands import bench_plot, bench_rows, bench_tune
from recipes.commands.bench_rows import Row
from recipes.commands.problems import Shape

ROOT = Path(__file__).parents[1]


# --- rows ---


def row_of(what: str, impl: str, batch: int, tokens: int, ms: float, **changed: Any) -> Row:
    row = Row(what, impl, batch, tokens, 16, 128, 128, "bfloat16", f"{ms / 4}", f"{ms}", "100", "", *MACHINE)
    return row._replace(**changed)


def test_rows_are_appended(tmp_path: Path) -> None:
    first, second = row_of("gdn2", "ours", 8, 2048, 2.5), row_of("gdn2", "fla 0.6.0", 8, 2048, 6.5)
    path = bench_rows.append(tmp_path / "new", "op", [first])
    assert path == tmp_path / "new" / "op_h100_80gb_hbm3.csv"
    bench_rows.append(tmp_path / "new", "op", [second])
    assert bench_rows.read(tmp_path / "new", "op") == [first, second]
    with path.open() as file:
        columns = "what,impl,batch,tokens,heads,dk,dv,dtype,fwd_ms,fwd_bwd_ms,extra_mib,first_call_s,gpu,torch,triton,commit,date"
        assert file.readline().strip() == columns
    assert bench_rows.append(tmp_path, "op", []) is None
    path.write_text("a,b\n")
    with pytest.raises(ConfigError, match="has other columns"):
        bench_rows.append(tmp_path / "new", "op", [first])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        bench_rows.append(tmp_path / "file", "op", [first])


def test_a_row_that_was_cut_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a process that was killed, or a full disk: the next row has a line of its own, and who reads is told which one to mend."""
    rows = [row_of("gdn2", "ours", 8, tokens, 2.5) for tokens in (1024, 2048, 4096)]
    path = tmp_path / "op_h100_80gb_hbm3.csv"
    path.touch()  # killed before the first row
    assert bench_rows.read(tmp_path, "op") == []
    bench_rows.append(tmp_path, "op", rows[:2])
    path.write_text(path.read_text()[:-1])  # no more than the end of the line
    bench_rows.append(tmp_path, "op", rows[2:])
    assert bench_rows.read(tmp_path, "op") == rows
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[: -1 - cut])
        bench_rows.append(tmp_path, "op", rows[:1])
        lines = path.read_text().splitlines()
        assert lines[-1] == lines[1]
        if len(lines) == 5:  # something is left of the row
            assert main(["bench", "plot", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 2
            assert f"error: out: {path}, line 4: " in capsys.readouterr().err
    assert bench_rows.read(tmp_path, "op") == [*rows[:2], rows[0]]


def test_the_end_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_rows.this_machine("abc").commit == "abc"
    assert bench_rows.this_machine().torch == torch.__version__

    def no_git(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(bench_rows.subprocess, "run", no_git)
    assert bench_rows.commit_of_checkout() == "unknown"


def test_the_table_gives_ratios_to_ours(capsys: pytest.CaptureFixture[str]) -> None:
    bench_rows.show("title", [row_of("gdn2", "ours", 8, 2048, 2.0), row_of("gdn2", "fla", 8, 2048, 5.0)], [1e-3, None])
    out = capsys.readouterr().out
    assert "2.50x" in out
    assert "1.0e-03" in out


# --- the page ---


def test_without_rows_the_page_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "benchmarks.md").write_text("a page")
    assert main(["bench", "plot", "--out", str(tmp_path), "--page", str(tmp_path / "benchmarks.md")]) == 2
    assert "holds no rows of op, layer, decode, training" in capsys.readouterr().err
    assert (tmp_path / "benchmarks.md").read_text() == "a page"


GOOD = "gdn2,ours,8,2048,16,128,128,bfloat16,0.5,2.5,100.0,1.2,NVIDIA H100 80GB HBM3,2.11.0,3.6.0,abc1234,2026-11-23"
DAMAGED = {
    "cut before gpu": (GOOD.partition(",NVIDIA")[0], "has 12 cells, must have 17"),
    "cut before commit": (GOOD.partition(",abc")[0], "has 15 cells, must have 17"),
    "cut in the date": (GOOD[:-1], "date: must be a day such as 2026-11-29, got '2026-11-2'"),
    "two in one": (GOOD[:60] + GOOD, "must have 17"),
    "another cell": (f"{GOOD},1", "has 18 cells, must have 17"),
    "a cell that is too large": (GOOD.replace("ours", "o" * 131073), "field larger than field limit (131072)"),
    "a long cell": (GOOD.replace("2048", "2" * 5000), f"tokens: must be a whole number >= 1, got '{'2' * 40}...'"),
    "a quote that is not closed": (f'"{GOOD}', "is no row of a table"),
    "batch": (GOOD.replace(",8,", ",many,"), "batch: must be a whole number >= 1, got 'many'"),
    "0 sequences": (GOOD.replace(",8,", ",0,"), "batch: must be a whole number >= 1, got '0'"),
    "0 tokens": (GOOD.replace("2048", "0"), "tokens: must be a whole number >= 1, got '0'"),
    **{
        text: (GOOD.replace("2.5", text), f"fwd_bwd_ms: must be a number > 0, or empty, got '{text}'") for text in ("nan", "inf", "-1", "0", "0.0000")
    },
    "no time": (GOOD.replace("0.5", ""), "fwd_ms: must be a number > 0, got ''"),
    "memory": (GOOD.replace("100.0", "-1"), "extra_mib: must be a number >= 0, or empty, got '-1'"),
    "no implementation": (GOOD.replace("ours", ""), "impl: must be printable text, got ''"),
    "no text": (GOOD.replace("ours", "\udcff"), "impl: must be printable text"),
    "commit": (GOOD.replace("abc1234", "abc 1234"), "commit: must be a name without spaces, commas and control characters, got 'abc 1234'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_row_is_one_line_and_changes_nothing(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before the first plot is drawn, wherever it stands."""
    bench_rows.append(tmp_path, "op", [row_of("gdn2", "ours", 65536 // n, n, 2.0) for n in (1024, 65536)])
    row, words = DAMAGED[case]
    table = tmp_path / "layer_h100_80gb_hbm3.csv"
    table.write_text("\n".join((",".join(Row._fields), GOOD, row, GOOD, "")), encoding="utf-8", errors="surrogateescape")
    page, plot = tmp_path / "benchmarks.md", tmp_path / "benchmarks_h100_80gb_hbm3_16x128.png"
    page.write_text("a page"), plot.write_text("a plot")
    assert main(["bench", "plot", "--out", str(tmp_path), "--page", str(page)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: out: {table}, line 3: ")
    assert words in line
    assert len(line) < 400
    assert (page.read_text(), plot.read_text()) == ("a page", "a plot")
    assert len(list(tmp_path.iterdir())) == 4


def test_tables_of_others_and_pages_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_rows.append(tmp_path, "op", [row_of("gdn2", "ours", 8, 2048, 3.0)])
    for page in ("", ".", str(tmp_path)):
        assert main(["bench", "plot", "--out", str(tmp_path), "--page", page]) == 2
        assert capsys.readouterr().err.startswith("error: --page: must be a file, and ")
    page = tmp_path / "new" / "page.md"
    (tmp_path / "decode_toy.csv").write_text("a,b\n")
    assert main(["bench", "plot", "--out", str(tmp_path), "--page", str(page)]) == 2
    assert "decode_toy.csv, line 1: has other columns than what, impl" in capsys.readouterr().err
    (tmp_path / "decode_toy.csv").unlink()
    (tmp_path / "decode_toy.csv").mkdir()
    assert main(["bench", "plot", "--out", str(tmp_path), "--page", str(page)]) == 2
    assert "decode_toy.csv cannot be read: Is a directory" in capsys.readouterr().err
    assert not page.parent.exists()


def test_the_page_shows_the_newest_rows_and_a_plot(tmp_path: Path) -> None:
    rows = [
        row_of(what, impl, 65536 // n, n, ms) for what, impl, ms in (("gdn2", "ours", 2.0), ("attention", "torch sdpa", 9.0)) for n in (1024, 65536)
    ]
    rows += [row_of("gdn2", "ours", 8, 2048, 3.0), row_of("gdn2+norm", "ours", 8, 4096, 1.0), row_of("gdn2", "ours", 1, 65536, 1.5, commit="newer")]
    bench_rows.append(tmp_path, "op", rows)
    bench_rows.append(tmp_path, "decode", [row_of("gdn2_step", "ours, CUDA graph", 32, 1, 0.03, fwd_bwd_ms="")])
    page = bench_plot.write(tmp_path, tmp_path / "benchmarks.md")
    text = page.read_text()
    assert text.count("| gdn2 | ours | 1 x 65,536 |") == 1
    assert "newer" in text
    assert "## One token of decoding, NVIDIA H100" in text
    assert "(benchmarks_h100_80gb_hbm3_16x128.png)" in text
    assert (tmp_path / "benchmarks_h100_80gb_hbm3_16x128.png").stat().st_size > 5000
    total, lines = bench_plot.curves(bench_plot.newest(rows))
    assert total == 65536
    assert lines == {"gdn2, ours": [(1024, 2.0), (65536, 1.5)], "attention, torch sdpa": [(1024, 9.0), (65536, 9.0)]}


def test_heads_of_other_values_have_a_plot_of_their_own(tmp_path: Path) -> None:
    rows = [row_of("ssd", "ours", 65536 // n, n, 2.0, dv=dv) for n in (1024, 65536) for dv in (64, 128)]
    assert [path.name for path in bench_plot.plots(rows, tmp_path / "a.png")] == ["a_16x128x64.png", "a_16x128.png"]


def test_no_plot_of_one_length(tmp_path: Path) -> None:
    assert not bench_plot.draw([row_of("gdn2", "ours", 8, 2048, 3.0)], tmp_path / "a.png")
    assert not bench_plot.draw([], tmp_path / "a.png")


def test_the_committed_page_follows_from_the_committed_rows(tmp_path: Path) -> None:
    page = bench_plot.write(ROOT / "docs/benchmarks", tmp_path / "benchmarks.md")
    assert page.read_text() == (ROOT / "docs/benchmarks.md").read_text(), "run: python -m recipes bench plot"


# --- the page of `make test-gpu` ---


def test_the_page_of_the_gpu_tests() -> None:
    spec = importlib.util.spec_from_file_location("gpu_summary", ROOT / "tests/gpu/gpu_summary.py")
    assert spec is not None
    assert spec.loader is not None
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    where = summary.Facts("Toy GPU", "580", "2.11", "3.6", "abc", "2026-11-23", 16)
    outcomes = [
        summary.Outcome("tests/gpu/test_a.py::one", "passed", 3.0),
        summary.Outcome("tests/gpu/test_a.py::two", "failed", 9.0),
        summary.Outcome("tests/gpu/test_b.py::three", "skipped", 0.0),
        summary.Outcome("tests/gpu/test_b.py::four", "passed", 1.0, {"dq": [3e-3, 4e-3], "dk": [2e-3, 1e-3]}),
    ]
    text = summary.page(where, outcomes, 61.4, 8)
    assert "**FAILED**" in text
    assert "- `tests/gpu/test_a.py::two`" in text
    assert "| tests/gpu/test_a.py | 1 | 1 | 0 | 0 |" in text
    assert "| **all** | 2 | 1 | 0 | 1 |" in text
    assert "| `test_b.py::four` | dk | 2.00e-03 | 1.00e-03 | 3.00e-03 | 4.00e-03 |" in text
    assert "Errors against" not in summary.page(where, outcomes[:3], 1, 1)
    assert "| duration | 61 s in 8 processes on 16 cores; one after the other 13 s |" in text
    assert text.index("`tests/gpu/test_a.py::two` | 9.0") < text.index("`tests/gpu/test_a.py::one` | 3.0")
    assert "**passed**" in summary.page(where, outcomes[:1], 1, 1)
    assert "**nothing was tested**" in summary.page(where, [], 1, 1)
    assert summary.facts("abc").commit == "abc"


# --- tiles ---


def test_tune_times_what_gives_the_same_result(capsys: pytest.CaptureFixture[str]) -> None:
    cpu, key = torch.device("cpu"), Key("cpu", 4, 64)
    table = TileTable("toy", {"forward": Tile(4, 1, {"BV": 16}), "other": Tile(1, 1)}, {})
    clock = FakeClock()

    def work() -> dict[str, Tensor]:
        tile = table.pick("forward", cpu, 4, 64)
        if tile.num_stages == 4:
            raise RuntimeError("out of resource: shared memory")
        clock.spend(10 / tile.num_warps + tile.num_stages)
        return {"o": torch.ones(2) * (2.0 if tile.num_warps == 2 else 1.0)}

    assert bench_tune.picks(table, work) == [("forward", key)]
    found = bench_tune.tune(table, "forward", key, work, clock, 1e-3, 10.0)
    assert [(timed.tile.num_warps, timed.tile.num_stages) for timed in found[:4]] == [(8, 1), (8, 2), (4, 1), (8, 3)]
    assert found[0].ms == pytest.approx(2.25)
    notes = {(timed.tile.num_warps, timed.tile.num_stages): timed.note for timed in found}
    assert notes[4, 1] == "present"
    assert "WRONG" in notes[2, 1]
    assert "RuntimeError: out of resource" in notes[8, 4]
    assert table.tuned["forward"] == {}  # as before
    listed = [Tile(8, 2, {"BV": 32})]
    table.tuned["forward"][key] = Tile(1, 1)
    found = bench_tune.tune(table, "forward", key, work, clock, 1e-3, 10.0, listed)
    assert [timed.tile for timed in found] == [listed[0], Tile(1, 1)]
    assert table.tuned["forward"] == {key: Tile(1, 1)}
    bench_tune.report("toy: forward", key, found)
    row = capsys.readouterr().out.splitlines()[-1].removeprefix("row: ").rstrip(",")
    assert eval(f"{{{row}}}", {"Key": Key, "Tile": Tile}) == {key: listed[0]}


def test_tune_knows_every_table() -> None:
    for name, path in bench_tune.TABLES.items():
        table = importlib.import_module(path).TILES
        assert isinstance(table, TileTable), name


def test_tune_runs_every_rank() -> None:
    found = list(bench_tune.works_of("skip", "gdn2", Shape(1, 8, 2, 16, 16), torch.float32, "cpu"))
    assert ["dout_scale" in work() for work in found] == [False, True]
