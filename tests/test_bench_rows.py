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
    bench_rows.append(tmp_path, "op", [row_of("gdn2", "ours", 8, 2048, 3.0)._replace(batch="many")])
    assert main(["bench", "plot", "--out", str(tmp_path), "--page", str(tmp_path / "benchmarks.md")]) == 2
    assert "that bench has not written (ValueError: invalid literal" in capsys.readouterr().err
    assert (tmp_path / "benchmarks.md").read_text() == "a page"


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
