"""`bench`: its refusals, how it takes turns, what it proves before it prints a figure. Times come from a clock of the test's own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import MACHINE, SMALL, FakeClock, groups_of
from torch import Tensor

from mixers import mamba_ssm
from mixers.gdn2 import GatedDeltaNet2
from mixers.mamba3 import Mamba3
from recipes.__main__ import main
from recipes.commands import bench_groups, bench_layer, bench_ops, bench_plot, bench_rows, checks, problems
from recipes.commands.bench_first import first_call_seconds
from recipes.commands.bench_timing import Entry, in_turns, time_entries

# --- the command line ---

REFUSED = {
    "nothing": ([], ["legal: op, layer, decode, train, tune, plot"]),
    "option first": (["--shapes", "1x1"], ["say what to time first"]),
    "unknown benchmark": (["ops"], ["unknown benchmark 'ops'", "did you mean 'op'"]),
    "op without a GPU": (["op"], ["bench: needs a GPU", "python -m recipes doctor"]),
    "layer without a GPU": (["layer"], ["bench: needs a GPU"]),
    "decode without a GPU": (["decode"], ["bench: needs a GPU"]),
    "tune without a GPU": (["tune", "--op", "gates"], ["bench: needs a GPU"]),
    "shapes": (["op", "--shapes", "8x2048,4"], ["shapes", "batch x tokens", "'8x2048,4'"]),
    "shapes of nothing": (["op", "--shapes", ""], ["shapes"]),
    "shapes of 0": (["layer", "--shapes", "0x4"], ["shapes"]),
    "mixer": (["op", "--mixers", "gdn3"], ["unknown mixer 'gdn3'", "did you mean 'gdn", "kda"]),
    "mixer of decode": (["decode", "--mixer", "swa"], ["mixer: unknown mixer 'swa'"]),
    "mixer of tune": (["tune", "--mixer", "swa"], ["mixer: unknown mixer 'swa'"]),
    "no mixer": (["op", "--mixers", ""], ["mixers: must name at least one"]),
    "op": (["op", "--ops", "delta,convolution"], ["ops: unknown op 'convolution'", "conv"]),
    "op of tune": (["tune", "--op", "deltas"], ["op: unknown op 'deltas'"]),
    "kernel": (["tune", "--op", "gates", "--kernel", "forwards"], ["kernel: unknown kernel 'forwards'", "did you mean 'forward'"]),
    "dtype": (["op", "--dtype", "bf16"], ["dtype: unknown dtype 'bf16'", "bfloat16"]),
    "heads": (["op", "--heads", "0"], ["heads", ">= 1"]),
    "value size": (["op", "--v_dim", "0"], ["v_dim", ">= 1"]),
    "heads of decode": (["decode", "--heads", "0"], ["heads", ">= 1"]),
    "heads that are no number": (["op", "--heads", "many"], ["heads", "many"]),
    "batches": (["decode", "--batches", "1,x"], ["batches", "1,32,256", "'1,x'"]),
    "baseline": (["op", "--baseline", "flash"], ["baseline: unknown baseline 'flash'", "sdpa"]),
    "baseline that is not installed": (["op", "--baseline", "fla"], ["baseline: fla is not installed", "pip install flash-linear-attention"]),
    "mamba-ssm that is not installed": (["op", "--baseline", "mamba_ssm"], ["baseline: mamba-ssm and einops are not installed: pip install"]),
    "budget": (["op", "--budget_ms", "0"], ["budget_ms: must be > 0"]),
    "unknown option": (["op", "--shape", "1x1"], ["shape: unknown key", "'shapes'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: None if name in ("mamba_ssm", "einops") else find_spec(name))
    arguments, words = REFUSED[case]
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("what", ["op", "layer", "decode", "train"])
def test_where_rows_go_is_looked_at_first(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is proved and timed, and before there must be a GPU; nothing is left of the attempt."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below", "a" * 300):
        assert main(["bench", what, "--out", f"~/{folder}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: out: {tmp_path}/{folder} cannot be written to: " if folder == "file" else "error: out: ")
    for commit in ("", "a b", "a,b", "a\n", "\x1b[2J"):
        assert main(["bench", what, "--out", str(tmp_path / "new"), "--commit", commit]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: commit: must be a name without spaces, commas and control characters, got {commit!r}"
    assert main(["bench", what, "--out", str(tmp_path / "new" / "rows"), "--commit", "v0.2-3-gabc-dirty"]) == 2
    assert "bench: needs a GPU" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    table = tmp_path / f"{'training' if what == 'train' else what}_cpu.csv"
    table.write_text("a,b\n1,2\n")
    assert main(["bench", what, "--out", str(tmp_path)]) == 2
    assert f"error: out: {table}, line 1: has other columns than " in capsys.readouterr().err


@pytest.mark.parametrize("what", ["op", "layer", "decode", "train", "tune", "plot"])
def test_help(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert f"\n  {what} " in capsys.readouterr().out
    assert main(["bench", what, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m recipes bench {what}")


def test_an_op_on_its_reference_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_ops, "prepare", lambda *_: MACHINE)
    monkeypatch.setattr(bench_ops.backends, "TRITON_OPS", frozenset())
    assert main(["bench", "op"]) == 2
    assert "ops: delta runs on its plain-torch reference here" in capsys.readouterr().err


def test_values_may_have_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Mamba-2: heads of 64 with a state of 128."""
    asked: list[problems.Shape] = []
    monkeypatch.setattr(bench_ops, "prepare", lambda *_: MACHINE)
    monkeypatch.setattr(bench_ops.backends, "why_not", lambda *_: None)
    monkeypatch.setattr(bench_ops, "CudaClock", FakeClock)
    monkeypatch.setattr(bench_groups, "groups", lambda op, mixers, shape, *_: asked.append(shape) or [])  # noqa: ARG005
    assert main(["bench", "op", "--ops", "ssd", "--shapes", "4x16", "--heads", "2", "--dim", "128", "--v_dim", "64"]) == 0
    assert main(["bench", "op", "--ops", "ssd", "--shapes", "4x16", "--heads", "2", "--dim", "32"]) == 0
    assert asked == [problems.Shape(4, 16, 2, 128, 64), problems.Shape(4, 16, 2, 32, 32)]


# --- taking turns ---


def test_implementations_take_turns_and_medians_count() -> None:
    clock, order = FakeClock(), []

    def work(name: str, *times: float) -> Callable[[], None]:
        left = list(times)

        def run() -> None:
            order.append(name)
            clock.spend(left.pop(0) if len(left) > 1 else left[0])

        return run

    slow_once = work("a", 50, 50, 50, 2, 90, 2)  # slow while it warms up, and once later
    assert in_turns([slow_once, work("b", 3)], clock, budget_ms=50) == [2, 3]
    timed = order[6:]  # after the warm-up
    assert timed == ["a", "b"] * (len(timed) // 2)
    assert len(timed) == 2 * (1 + 10)  # one to learn how long a round takes, then as many as the budget holds
    assert clock.flushes == len(timed)
    assert len(clock.leads) == 2  # how long the host takes for each
    assert min(clock.leads) > 0


@pytest.mark.parametrize(("ms", "rounds"), [(1e6, 7), (1e-6, 200)])
def test_rounds_have_bounds(ms: float, rounds: int) -> None:
    clock, calls = FakeClock(), []
    in_turns([lambda: (calls.append(0), clock.spend(ms))], clock, budget_ms=100)
    assert len(calls) == 3 + 1 + rounds


def test_an_entry_is_timed_forward_and_with_its_gradients() -> None:
    clock, seen = FakeClock(), []

    def double(x: Tensor) -> tuple[Tensor, None]:
        seen.append(torch.is_grad_enabled())
        clock.spend(5 if torch.is_grad_enabled() else 2)
        return 2 * x, None

    x = torch.ones(3, requires_grad=True)
    trained = Entry("toy", "ours", double, {"x": x}, (torch.ones(3),))
    only_forward = Entry("toy", "copy", lambda x: x.clone(), {"x": x})
    (first, second) = time_entries([trained, only_forward], clock, budget_ms=10)
    assert first == (2, 5, 7.5)
    assert second == (0, None, 7.5)
    assert set(seen) == {False, True}
    assert x.grad is None


# --- proof ---


@pytest.mark.parametrize("op", bench_groups.OPS)
def test_ours_is_proved_against_float64(op: str) -> None:
    for group in groups_of([], op, tuple(problems.WIDTHS)):
        usable, (errors,) = bench_ops.prove(group, torch.float32)
        assert [entry.impl for entry in usable] == ["ours"]
        assert len(errors) == len(group.entries[0].leaves) + len(group.entries[0].cotangents) - len(group.shared)
        assert max(errors.values()) < 1e-5


def test_sums_over_later_tokens_are_allowed_more_the_more_there_are() -> None:
    (group,) = groups_of([], "siso")
    ours = group.entries[0]
    longer = group._replace(entries=[ours._replace(cotangents=(torch.empty(1, 4096, 2, 16),))])
    few, many = (bench_ops.allowed(g, ("out0", "dtheta", "dB"), torch.bfloat16) for g in (group, longer))
    assert few == dict.fromkeys(("out0", "dtheta", "dB"), 4e-2)
    assert many == {**few, "dtheta": 8e-2}
    off = group._replace(entries=[ours._replace(function=lambda **leaves: 1.001 * ours.function(**leaves))])
    with pytest.raises(bench_ops.WrongResultError, match=r"is off by 1\.0e-03 of its largest entry, 3e-05 are allowed in torch\.float32"):
        bench_ops.prove(off, torch.float32)


def options(folder: Path, **changed: Any) -> Namespace:
    return Namespace(**{"dtype": "float32", "errors": True, "budget_ms": 1.0, "first_call": False, "out": folder, **changed})


def test_a_wrong_result_gets_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = groups_of([], "norm")[0]
    ours = group.entries[0]
    wrong = ours._replace(function=lambda **leaves: tuple(1.01 * y for y in ours.function(**leaves)))
    assert not bench_ops.measure(group._replace(entries=[wrong]), SMALL, FakeClock(), MACHINE, options(tmp_path))
    assert "no figure: " in capsys.readouterr().out

    def broken(**_: Tensor) -> None:
        raise RuntimeError("no kernel")

    broken_group = group._replace(entries=[ours._replace(function=broken)])
    assert not bench_ops.measure(broken_group, SMALL, FakeClock(), MACHINE, options(tmp_path))
    assert "no figure: RuntimeError: no kernel" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_peer_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = groups_of([], "gates")[0]

    def broken(**_: Tensor) -> None:
        raise RuntimeError("not on this GPU")

    peer = group.entries[0]._replace(impl="fla 0", function=broken)
    assert bench_ops.measure(group._replace(entries=[*group.entries, peer]), SMALL, FakeClock(0.5), MACHINE, options(tmp_path))
    assert "fla 0 does not run: RuntimeError: not on this GPU" in capsys.readouterr().out
    (row,) = bench_rows.read(tmp_path, "op")
    assert (row.what, row.impl, row.batch, row.tokens, row.heads, row.dk) == ("gates", "ours", 2, 70, 2, 16)
    assert (row.fwd_ms, row.extra_mib, row.first_call_s, row.gpu, row.commit) == ("0.5000", "7.5", "", MACHINE.gpu, "abc1234")


def test_a_peer_that_is_wrong_is_timed_as_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its error stands beside its time in the terminal."""
    group = groups_of([], "gates")[0]
    ours = group.entries[0]
    peer = ours._replace(impl="fla 0", function=lambda **leaves: tuple(2 * y for y in ours.function(**leaves)))
    assert bench_ops.measure(group._replace(entries=[ours, peer]), SMALL, FakeClock(0.5), MACHINE, options(tmp_path))
    assert [row.impl for row in bench_rows.read(tmp_path, "op")] == ["ours", "fla 0"]
    assert "1.0e+00" in capsys.readouterr().out
    assert "Others are held against no limit" in bench_plot.INTRO
    assert f"within {bench_layer.TOLERANCE:.0%} for a whole mixer".replace("%", " %") in " ".join(bench_plot.INTRO.split())
    assert f"within {checks.TOLERANCE[torch.bfloat16]:.0%} of".replace("%", " %") in " ".join(bench_plot.INTRO.split())


def test_a_layer_is_proved_against_float64() -> None:
    layer = GatedDeltaNet2(16, num_heads=2, head_dim=8)
    entry = bench_layer.entry_of("gdn2 layer", "ours", layer, torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0)), torch.float32)
    assert bench_layer.error_of(entry, layer) < 1e-5
    assert len(entry.forward_backward()) == 1 + len(list(layer.parameters()))
    wrong = entry._replace(function=lambda **leaves: 1.2 * entry.function(**leaves))
    assert bench_layer.error_of(wrong, layer) > bench_layer.TOLERANCE


def test_ranks_have_rows_of_their_own(tmp_path: Path) -> None:
    given = options(tmp_path)
    for ranks in (1, 2):
        layer = Mamba3(16, head_dim=8, d_state=8, mimo_rank=ranks)
        assert bench_layer.measure("mamba3", {"ours": layer}, torch.randn(1, 20, 16), torch.float32, FakeClock(0.5), MACHINE, given)
    assert [row.what for row in bench_rows.read(tmp_path, "layer")] == ["mamba3 layer", "mamba3 layer, rank 2"]


def test_first_call_of_a_process_that_fails_is_no_figure(capsys: pytest.CaptureFixture[str]) -> None:
    entry = Entry("gates", "ours", lambda: None, {})
    assert first_call_seconds(entry, SMALL, Namespace(dtype="float32")) is None  # there is no GPU in it
    assert "first call of gates, ours" in capsys.readouterr().err
