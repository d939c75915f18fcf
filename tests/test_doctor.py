"""`doctor`, its verdict, and what `fit` makes of it. Where a GPU is needed it is pretended: what decides is the same."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctor_cases import GPU, KEY, attempts_fixture, own_cache_fixture  # noqa: F401

import kernels
from kernels.backend import RefusedError
from recipes.__main__ import main
from recipes.commands import checks, doctor, machine, problems, verdict
from recipes.commands.checks import Result, Trial
from recipes.commands.machine import Machine, advice
from recipes.commands.problems import Draw, Shape

FULL = Machine(torch_cuda="13.0", usable=True, capability=(9, 0), card=True, driver="580.65.06", triton="3.7.1")


# --- the command ---


def test_doctor_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in out
    for op in (
        "delta_rule",
        "delta_rule_step",
        "causal_conv1d",
        "causal_conv1d_step",
        "delta_gates",
        "gated_rms_norm",
        "l2_norm",
        "rotary_keys",
        "gated_skip",
        "rank_values",
    ):
        assert f" {op} " in out
    assert f"All {len(checks.quick())} checks passed: the reference is right here" in out
    assert not verdict.cache_folder().exists()  # the reference takes seconds: nothing is kept


def test_doctor_fails_where_a_check_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = checks.quick()[3].label
    monkeypatch.setattr(checks, "attempt", lambda trial, _: Result(trial.label, trial.label != wrong, 0.25, "dk"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"FAILED {wrong}: dk is off by 2.5e-01 of its largest entry" in " ".join(out.split())
    assert out.rstrip().endswith("1 checks failed")


def test_a_result_where_zeros_are_expected_fails() -> None:
    """There is no largest entry to divide by: `doctor` says FAILED, and does not end."""
    trial, zeros = checks.quick()[0], torch.zeros(1)
    assert problems.errors({"a": zeros}, {"a": zeros}) == {"a": 0}
    failed = checks.judge(trial, {"a": torch.ones(1)}, {"a": zeros})
    assert failed == Result(trial.label, False, math.inf, "a")
    assert doctor.reason(failed) == "a is off by inf of its largest entry"


def test_doctor_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "inspect", lambda: FULL)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Toy GPU")
    monkeypatch.setattr(checks, "attempt", lambda trial, _: Result(trial.label, True, 1e-6, "o"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Toy GPU, compute capability 9.0" in out
    assert "the kernels are right on this GPU" in out
    assert "known from before" not in out
    monkeypatch.setattr(checks, "attempt", lambda *_: pytest.fail("a check that has passed is run again"))
    assert main(["doctor"]) == 0
    assert "known from before (--recheck repeats them)" in capsys.readouterr().out


def test_doctor_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--rechek"]) == 2
    monkeypatch.setattr(machine, "ours_is_imported", lambda: False)
    assert main(["doctor"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "did you mean 'recheck'" in first
    assert "another package of this name is in the way" in second
    assert "pip uninstall kernels" in second


# --- what is missing ---

MISSING = {
    "nothing": (FULL, ()),
    "no GPU": (Machine(triton="3.7.1"), ()),
    "CPU build of torch": (FULL._replace(torch_cuda=None, usable=False, capability=None), ("CPU build", "--index-url https://download.pytorch.org")),
    "no driver": (FULL._replace(usable=False, driver=None), ("no driver", "apt install nvidia-driver")),
    "hidden": (FULL._replace(usable=False, hidden=""), ("unset CUDA_VISIBLE_DEVICES",)),
    "old driver": (FULL._replace(usable=False, driver="470.1"), ("CUDA 13.0", "470.1", "newer driver")),
    "old GPU": (FULL._replace(capability=(7, 5)), ("7.5", "8.0")),
    "no Triton": (FULL._replace(triton=None), ("-m pip install 'triton>=3.6'",)),
    "old Triton": (FULL._replace(triton="3.5.1"), ("3.5.1 is too old", "--upgrade 'triton>=3.6'")),
    "no Triton elsewhere": (Machine(system="Darwin"), ()),
    "clash": (FULL._replace(clash="/x/kernels"), ("Hugging Face", "/x/kernels", "pip uninstall kernels")),
}


@pytest.mark.parametrize("case", MISSING)
def test_advice(case: str) -> None:
    found, words = MISSING[case]
    lines = advice(found)
    assert len(lines) == bool(words)
    assert all(word in lines[0] for word in words)


def test_advice_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "inspect", lambda: Machine(card=True, triton=None, clash="/x/kernels"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "To mend:" in out
    assert out.count("\n  - ") == 3


def test_facts_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
    ):
        (tmp_path / "version").write_text(text)
        assert machine.driver_version(tmp_path / "version") in ("550.54.15", "570.86.15")
    assert machine.driver_version(tmp_path / "none") is None
    assert not machine.has_card(tmp_path / "none")
    for name, vendor, kind in (("a", "0x10de", "0x040300"), ("b", "0x1234", "0x030000")):  # its sound, and another's display
        (tmp_path / "pci" / name).mkdir(parents=True)
        (tmp_path / "pci" / name / "vendor").write_text(vendor)
        (tmp_path / "pci" / name / "class").write_text(kind)
    assert not machine.has_card(tmp_path / "pci")
    (tmp_path / "pci" / "c").mkdir()
    (tmp_path / "pci" / "c" / "vendor").write_text("0x10de\n")
    assert not machine.has_card(tmp_path / "pci")
    (tmp_path / "pci" / "c" / "class").write_text("0x030200\n")
    assert machine.has_card(tmp_path / "pci")
    assert machine.ours_is_imported()
    assert machine.find_clash() is None
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kernels-0.9.dist-info").mkdir()
    (tmp_path / "kernels-0.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9\n")
    assert machine.find_clash() == str(tmp_path / "kernels")


# --- checks ---


def test_checks_cover_every_op_and_select_narrows_them() -> None:
    assert {check.op for check in checks.CHECKS} == set(problems.OUTPUTS) == set(checks.ops())
    everything = checks.select()
    assert {trial.dtype for trial in everything} == {torch.float32, torch.float16, torch.bfloat16}
    assert {trial.size for trial in everything if trial.check.op == "delta_rule"} == {32, 64, 128, 256}
    assert {trial.size for trial in everything if trial.dtype == torch.float16} == {128}
    few = checks.select(["delta_rule"], [torch.float16], [48], ["gdn2"])
    assert {(trial.dtype, trial.check.mixer) for trial in few} == {(torch.float16, "gdn2")}
    assert 64 in {trial.size for trial in few}  # the next larger
    assert {trial.size for trial in few} <= {64, 128}
    assert 256 in {trial.size for trial in checks.select(sizes=[512])}
    assert len({trial.label for trial in everything}) == len(everything)


@pytest.mark.parametrize("name", ["wrong", "not finite", "raises", "missing"])
def test_a_wrong_kernel_fails_its_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.gated_rms_norm

    def wrong(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        y = right(x, *arguments, **options)
        if x.dtype == torch.float64:
            return y
        if name == "raises":
            raise RuntimeError("out of resource: shared memory\nRequired: 1")
        if name == "missing":
            return y[..., :-1]
        return y * (float("nan") if name == "not finite" else 1.01)

    monkeypatch.setattr(kernels, "gated_rms_norm", wrong)
    check = next(check for check in checks.CHECKS if check.op == "gated_rms_norm")
    result = checks.attempt(Trial(check, 32, torch.float32), torch.device("cpu"))
    assert not result.passed
    if name == "wrong":
        assert result.worst == pytest.approx(0.01, rel=0.1)
    if name == "raises":
        assert result.note == "RuntimeError: out of resource: shared memory Required: 1"


def test_a_size_without_a_kernel_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise refused("gated_rms_norm: backend='triton' cannot run: size 9000 is above 8192")

    refused: type[Exception] = RefusedError
    monkeypatch.setattr(kernels, "gated_rms_norm", refuse)
    check = next(check for check in checks.CHECKS if check.op == "gated_rms_norm")
    result = checks.attempt(Trial(check, 32, torch.float32), torch.device("cpu"))
    assert result.passed
    assert "runs on the reference: gated_rms_norm" in result.note
    refused = NotImplementedError  # torch's, for what it has no kernel for
    assert not checks.attempt(Trial(check, 32, torch.float32), torch.device("cpu")).passed


def test_problems_are_rounded_where_a_layer_rounds() -> None:
    problem = problems.delta_rule("gdn2", Shape(1, 8, 2, 4, 4), Draw(), extreme=True, state=True).to(torch.bfloat16)
    assert {name: x.dtype for name, x in problem.leaves.items() if x.dtype != torch.bfloat16} == {"g": torch.float32, "state": torch.float32}
    assert {round(g, 6) for g in problem.leaves["g"].unique().tolist()} == {round(g, 6) for g in problems.EXTREME_DECAYS}
    exact = problem.to(torch.float64)
    assert torch.equal(exact.leaves["q"], problem.leaves["q"].double())
    assert problems.run(exact, problems.call(exact)).keys() == {"o", "final", "dq", "dk", "dv", "dg", "db", "dw", "dstate"}


# --- the verdict ---


def fail_in_another_process(label: str, _: torch.device) -> Result:
    return Result(label, False, None, "no room")


def trial_of(name: str) -> Trial:
    return Trial(checks.Check(name, "delta_rule", lambda _: pytest.fail("not to be made")), 128, torch.bfloat16)


def test_a_verdict_is_kept(attempts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [trial_of("a"), trial_of("bad"), trial_of("c")]
    first = verdict.prove(trials, GPU)
    assert [result.passed for result in first] == [True, False, True]
    known: list[bool] = []
    assert verdict.prove(trials, GPU, say=lambda _, was_known: known.append(was_known)) == first
    assert known == [True, False, True]  # what failed is tried again
    assert attempts == ["a", "bad", "c", "bad"]
    verdict.prove(trials[:1], GPU, recheck=True)
    assert attempts[4:] == ["a"]
    assert len(verdict.load(KEY)) == 3
    monkeypatch.setattr(verdict, "key_of", lambda _: KEY._replace(sources="4567"))
    verdict.prove(trials[:1], GPU)
    assert attempts[5:] == ["a"]


def test_what_was_found_survives_an_interrupt(attempts: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        verdict.prove([trial_of("a"), trial_of("interrupted")], GPU)
    verdict.prove([trial_of("a")], GPU)
    assert attempts == ["a", "interrupted"]


def test_runs_that_start_together_check_once(attempts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    trials, found = [trial_of("a"), trial_of("b")], [Result(trial_of(name).label, True, 1e-6, "o") for name in "ab"]
    with ThreadPoolExecutor(1) as pool:
        with verdict.one_at_a_time(KEY):
            second = pool.submit(verdict.prove, trials, GPU)
            until = time.time() + 60
            while "waiting for what it finds" not in capsys.readouterr().out:
                assert time.time() < until
                time.sleep(0.01)
            verdict.save(KEY, found)
            assert verdict.prove(trials, GPU) == found  # all is known: nobody waits
            assert not second.done()
        assert second.result(60) == found
    assert attempts == []


def test_without_locks_every_run_checks(attempts: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    for _ in range(2):
        assert verdict.prove([trial_of("a")], GPU)[0].passed
    assert attempts == ["a", "a"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"key": ["Toy GPU"], "results": {}}', '{"key": ["Toy GPU", "3.7", "0123"], "results": {"a": [1]}}']
)
def test_a_damaged_verdict_is_none(content: str) -> None:
    file = verdict.cache_file(KEY)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert verdict.load(KEY) == {}


def test_a_verdict_of_another_key_is_none() -> None:
    assert verdict.save(KEY, [Result("a", True, None, "")])
    assert verdict.load(KEY) == {"a": Result("a", True, None, "")}
    file = verdict.cache_file(KEY)
    file.write_text(json.dumps({**json.loads(file.read_text()), "key": KEY._replace(gpu="other")}))
    assert verdict.load(KEY) == {}


def test_a_verdict_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    assert not verdict.save(KEY, [Result("a", True, None, "")])
    assert verdict.load(KEY) == {}


def test_the_key_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "a.py").write_text("x = 1")
    before = verdict.sources_hash(tmp_path)
    (tmp_path / "notes.md").write_text("nothing that runs")
    assert verdict.sources_hash(tmp_path) == before
    (tmp_path / "op" / "a.py").write_text("x = 2")
    assert verdict.sources_hash(tmp_path) != before
    assert verdict.key_of(torch.device("cpu")).sources.startswith(verdict.sources_hash(Path(kernels.__file__).parent))


def test_processes_share_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = checks.select(["l2_norm"], [torch.float32], [32])
    assert [checks.find(trial.check.op, trial.check.name, *trial[1:]) for trial in trials] == trials
    (result,) = verdict.in_processes(trials, torch.device("cpu"), 1)
    assert result == checks.attempt(trials[0], torch.device("cpu"))
    monkeypatch.setattr(verdict, "PROCESSES", 2)
    monkeypatch.setattr(verdict, "in_processes", lambda trials, _, processes: iter([f"{len(trials)} in {processes}"]))
    assert list(verdict.attempts(trials * 3, GPU)) == ["3 in 2"]


def test_what_fails_in_another_process_is_tried_in_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = checks.Check("unknown there", "gated_rms_norm", lambda _: pytest.fail("not to be made"))
    monkeypatch.setattr(verdict, "_attempt", fail_in_another_process)
    monkeypatch.setattr(checks, "attempt", lambda trial, _: Result(trial.label, True, 0.0, "here"))
    (result,) = verdict.in_processes([Trial(unknown, 32, torch.float32)], torch.device("cpu"), 1)
    assert result.note == "here"


def test_a_wrong_result_gets_no_second_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is only sometimes wrong is wrong; only a trial that computed nothing (no room on the GPU) is tried again."""
    trial = checks.select(["gated_rms_norm"], [torch.float32])[0]

    class Pool:
        def __init__(self, *_: object, **__: object) -> None: ...

        def submit(self, *_: object) -> object:
            return SimpleNamespace(result=lambda: answer)

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(verdict, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(checks, "attempt", lambda trial, _: Result(trial.label, True, 0.0, ""))
    answer = Result(trial.label, False, 0.9, "dq")
    assert [result.passed for result in verdict.in_processes([trial], torch.device("cpu"), 1)] == [False]
    answer = Result(trial.label, False, None, "out of memory")
    assert [result.passed for result in verdict.in_processes([trial], torch.device("cpu"), 1)] == [True]


@pytest.mark.parametrize("results", [[], {"x": [True, "abc", ""]}, {"x": [True, float("nan"), ""]}, {"x": 3}], ids=str)
def test_a_damaged_verdict_is_no_verdict(results: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = verdict.key_of(torch.device("cpu"))
    file = verdict.cache_file(key)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"key": key, "results": results}))
    assert verdict.load(key) == {}
