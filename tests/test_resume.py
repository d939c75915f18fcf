"""Trainings that are killed, stopped or run out of disk, and are gone on with: the result is that of the training that was not.

The trainings run in tests/resume_worker.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import flip

from lit_modules.checkpoint import read_checkpoint
from mixers.errors import ConfigError
from recipes.__main__ import main
from recipes.commands.checkpoints import with_checkpoint
from recipes.commands.config_files import collect

Result = dict[str, Any]


NOTHING = "nothing: weights, optimizer state, log and order of the data are bit for bit those of the whole training"
ONE_LINE = "nothing: one line names the newest checkpoint that is whole"


@pytest.fixture(name="root", scope="module")
def root_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "resume"


@pytest.fixture(name="results", scope="module")
def results_fixture(root: Path) -> dict[str, Result]:
    """What the worker printed, by name. It is run once: whoever makes the folder runs it, the others wait."""
    said = root.with_suffix(".json")
    try:
        root.mkdir()
    except FileExistsError:
        while not said.exists():
            time.sleep(0.2)
    else:
        said.with_suffix(".part").write_text(run_worker(root))
        said.with_suffix(".part").rename(said)
    return {line["name"]: line for line in map(json.loads, said.read_text().splitlines())}


def run_worker(root: Path) -> str:
    seed = random.randrange(10**6)
    print(f"seed of the random moments: {seed}")
    worker = [sys.executable, str(Path(__file__).with_name("resume_worker.py")), str(root), str(seed)]
    done = subprocess.run(worker, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        print(done.stderr[-3000:])  # what it has not come to fails by its name
    return done.stdout


def test_the_whole_trainings_are_as_long_as_meant(results: dict[str, Result]) -> None:
    shards, text = results["shards: whole"], results["text: whole"]
    assert shards["steps"] == text["steps"] == 9
    assert shards["rows"] == sorted([*(f"{step} train" for step in range(9)), *(f"{step} val" for step in (1, 3, 5, 7, 8))])
    assert text["rows"] == sorted([*(f"{step} train" for step in range(9)), "4 val", "8 val"])


def exact(result: Result, *codes: int, left: int = 0) -> None:
    """The fault has happened, and nothing shows of it at the end."""
    assert result["codes"] == [[code] for code in codes]
    assert result["end"] == [0], result["end_said"]
    assert result["differences"] == []
    assert len(result["left"]) == left


@pytest.mark.fault("process killed", "SIGKILL in an accumulation, in a validation, in the last one, while a checkpoint is written", NOTHING)
@pytest.mark.parametrize("where", ["in an accumulation", "in a validation", "in the last validation", "while a checkpoint is written"])
@pytest.mark.parametrize("kind", ["shards", "text"])
def test_killed(results: dict[str, Result], kind: str, where: str) -> None:
    exact(results[f"{kind}: killed {where}"], -9)


@pytest.mark.fault("process killed", "SIGKILL just before and after a checkpoint is renamed", NOTHING)
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_the_renaming(results: dict[str, Result], when: str) -> None:
    exact(results[f"shards: killed {when} a checkpoint is renamed"], -9)


@pytest.mark.fault("process killed again and again", "SIGKILL of the training and of the two that go on", NOTHING, each=3)
def test_killed_again_and_again(results: dict[str, Result]) -> None:
    exact(results["shards: killed again and again"], -9, -9, -9)


@pytest.mark.fault("process killed at random", "SIGKILL from outside after a random number of micro-batches and time", NOTHING)
@pytest.mark.parametrize("kind", ["shards", "text"])
@pytest.mark.parametrize("number", [0, 1])
def test_killed_at_random(results: dict[str, Result], kind: str, number: int) -> None:
    exact(results[f"{kind}: killed at random {number}"], -9)


@pytest.mark.fault("pre-emption", "SIGTERM in an optimizer step, an accumulation and a validation; SIGUSR1", f"{NOTHING}; exit code 143")
@pytest.mark.parametrize("what", ["SIGTERM in a step", "SIGTERM in an accumulation", "SIGTERM in a validation", "SIGUSR1"])
def test_pre_emption(results: dict[str, Result], what: str) -> None:
    result = results[f"shards: {what}"]
    exact(result, 143)
    step = {"SIGTERM in a step": 3, "SIGTERM in an accumulation": 4, "SIGTERM in a validation": 2, "SIGUSR1": 2}[what]
    assert f"checkpoints/last.ckpt (step {step})" in result["said"][0]
    assert f"stopped by {what.split()[0]}; the same command line with --ckpt_path last goes on" in result["said"][0]
    assert "Traceback" not in result["said"][0]


@pytest.mark.fault(
    "pre-emption, or Ctrl-C in a terminal", "SIGTERM and SIGINT to the training and the worker of its loader", f"{NOTHING}; exit code 143 and 130"
)
@pytest.mark.parametrize(("what", "code"), [("SIGTERM", 143), ("Ctrl-C", 130)])
def test_a_signal_to_all_processes(results: dict[str, Result], what: str, code: int) -> None:
    result = results[f"text: {what} to all processes"]
    exact(result, code)
    assert "Traceback" not in result["said"][0]


@pytest.mark.fault("Ctrl-C", "SIGINT in an accumulation", f"{NOTHING}; exit code 130")
def test_ctrl_c(results: dict[str, Result]) -> None:
    exact(results["shards: Ctrl-C"], 130)
    said = results["shards: Ctrl-C"]["said"][0]
    assert "stopping after this step" in said
    assert "checkpoints/last.ckpt (step 3)" in said
    assert said.splitlines()[-1] == "interrupted"


@pytest.mark.fault(
    "pre-emption under SLURM", "SIGUSR1 and SIGTERM with SLURM's environment and an scontrol that writes down what it is asked", NOTHING, each=2
)
def test_slurm(results: dict[str, Result]) -> None:
    result = results["slurm"]
    assert result["codes"] == [[143], [143], [0]]
    assert result["asked"] == "requeue 77\n"  # at SIGUSR1; at SIGTERM SLURM does what it has been configured to do
    assert "job 77 is requeued" in result["said"][0]
    assert result["differences"] == []


@pytest.mark.fault(
    "disk full", "RLIMIT_FSIZE from the fourth checkpoint on; training goes on, the end is an error", f"{NOTHING}, once there is space"
)
def test_disk_full(results: dict[str, Result]) -> None:
    result = results["shards: disk full"]
    exact(result, 2)
    lines = [line for line in result["said"][0].splitlines() if "not written" in line]
    assert all("File too large; the last good one is runs/config/" in line for line in lines)
    assert sum(line.endswith("; training goes on") for line in lines) > 2
    assert lines[-1].startswith("error: checkpoint: not written")
    assert "Traceback" not in result["said"][0]


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-9), ("32-true", 1e-4)])
@pytest.mark.fault(
    "another number of processes",
    "1 -> 2 -> 1 processes (DDP, gloo), stopped by max_steps",
    "nothing: same order of the data, same losses up to rounding",
    each=2,
)
def test_another_number_of_processes(results: dict[str, Result], precision: str, tolerance: float) -> None:
    result = results[f"processes: {precision}"]
    whole, changed = result["losses"]
    assert len(whole) == 20
    assert changed == pytest.approx(whole, rel=tolerance)
    assert changed[:7] == whole[:7]
    assert changed[7:] != whole[7:] or precision == "64-true"  # two processes did round otherwise
    assert result["same_order"]


def test_another_batch_is_never_silent(results: dict[str, Result]) -> None:
    result = results["processes: other batch"]
    assert result["codes"] == [[2, 2]]
    line = result["said"][0].strip()
    assert "\n" not in line
    assert "4 on 2 devices make 512 tokens an optimizer step" in line
    assert "was trained with 256: set it to 2, or --may_change batch" in line


@pytest.mark.fault("one of two processes killed or stopped", "DDP: SIGTERM, SIGKILL to the second process; disk full for the first", NOTHING)
@pytest.mark.parametrize(("what", "codes"), [("SIGTERM to one of two", [143, 0]), ("one of two killed", [1, -9]), ("disk full", [2, 2])])
def test_two_processes(results: dict[str, Result], what: str, codes: list[int]) -> None:
    result = results[f"ddp: {what}"]
    assert result["codes"] == [codes]
    assert result["end"] == [0, 0]
    assert result["differences"] == []


@pytest.mark.fault(
    "sharded checkpoint not finished",
    "FSDP2, 2 processes: SIGKILL before the folder is renamed, and when the one before has another name; disk full for the second process",
    NOTHING,
)
@pytest.mark.parametrize(
    ("what", "codes"), [("killed before a checkpoint is renamed", [-9, 1]), ("killed between the renames", [-9, 1]), ("disk full", [2, 2])]
)
def test_sharded_checkpoints(results: dict[str, Result], what: str, codes: list[int]) -> None:
    result = results[f"fsdp2_sharded_checkpoint: {what}"]
    assert result["codes"] == [codes]
    assert result["end"] == [0, 0]
    assert result["differences"] == []


# --- checkpoints that are not what was written ---


@pytest.fixture(name="here")
def here_fixture(root: Path, results: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001
    """A folder with a run that has last.ckpt (step 9) and another checkpoint (step 9 too, older)."""
    shutil.copytree(root / "whole_text", tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    (last,) = Path("runs/config").glob("*/checkpoints/last.ckpt")
    os.utime(last, (last.stat().st_mtime + 5,) * 2)
    return last


def refused(path: str) -> str:
    with pytest.raises(ConfigError) as error:
        with_checkpoint(collect(["--config=config.yaml", f"--ckpt_path={path}"]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.fault("torn checkpoint", "half of the file; a file of zeros; an empty file", ONE_LINE)
@pytest.mark.parametrize("content", [lambda whole: whole[: len(whole) // 2], lambda whole: bytes(len(whole)), lambda _: b""])
@pytest.mark.parametrize("name", ["last", "path"])
def test_a_torn_checkpoint_is_refused(here: Path, content: Callable[[bytes], bytes], name: str) -> None:
    here.write_bytes(content(here.read_bytes()))
    line = refused(str(here) if name == "path" else name)
    assert f"ckpt_path: {here}: is truncated, or not a checkpoint" in line
    assert "the last good checkpoint of this run is" in line
    assert "epoch=1-step=9.ckpt (step 9, 1,728 tokens)" in line


@pytest.mark.fault("flipped bit", "one bit of a weight, in the file of last.ckpt", ONE_LINE)
def test_a_flipped_bit_is_seen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = read_checkpoint(here)["state_dict"]["lm.head.weight"].clone()
    flip(here, weight)
    assert not torch.equal(read_checkpoint(here)["state_dict"]["lm.head.weight"], weight)  # torch.load does not see it
    assert main(["fit", "--config=config.yaml", "--ckpt_path=last"]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "is damaged: " in line
    assert "epoch=1-step=9.ckpt" in line
    assert len([*Path("runs/config").iterdir()]) == 1  # nothing was begun


@pytest.mark.fault("missing checkpoint", "last.ckpt removed; a path that is wrong; no run at all", ONE_LINE, each=3)
def test_a_missing_checkpoint_is_refused(here: Path) -> None:
    here.unlink()
    assert "has a last.ckpt to go on from; the last good checkpoint is" in refused("last")
    assert "has a last.ckpt to go on from; the last good checkpoint is" in refused("auto")  # something was saved: no start from scratch
    assert f"ckpt_path: {here} does not exist" in refused(str(here))
    assert "epoch=1-step=9.ckpt" in refused(str(here))
    shutil.rmtree("runs")
    assert refused("last").endswith("has a last.ckpt to go on from")


def test_a_copy_of_a_run_that_has_gone_on_is_not_the_newest(here: Path) -> None:
    copy = shutil.copytree(here.parents[1], here.parents[1].with_name("zzz"))
    os.utime(copy / "checkpoints" / "last.ckpt", (time.time() + 5,) * 2)
    receipt = copy / "receipt.json"
    receipt.write_text(json.dumps({**json.loads(receipt.read_text()), "outcome": {"state": "running"}}))
    assert with_checkpoint(collect(["--config=config.yaml", "--ckpt_path=last"]))[1] == here
    shutil.rmtree(copy)


@pytest.mark.fault("missing checkpoint, with an older run beside it", "last.ckpt of the newest run removed; all of its checkpoints", ONE_LINE, each=2)
@pytest.mark.parametrize("name", ["last", "auto"])
def test_an_older_run_does_not_stand_in_for_the_newest(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = here.parents[1]
    older = shutil.copytree(run, run.with_name("older"))
    receipt = older / "receipt.json"
    receipt.write_text(receipt.read_text().replace('"started": "20', '"started": "19', 1))
    if name == "auto":  # then its name says when it began
        receipt.write_text("{")
        older = older.rename(older.with_name("2020-01-31_12-00-00"))
    (older / "config.yaml").touch()  # as an editor does, or a copy that keeps no times
    shutil.copy(older / "checkpoints" / "last.ckpt", older / "checkpoints" / "last.whole.ckpt")  # newer than all others
    assert with_checkpoint(collect(["--config=config.yaml", f"--ckpt_path={name}"]))[1] == here
    here.unlink()
    line = refused(name)
    assert line.startswith(
        f"ckpt_path: {here} does not exist, and its run is the newest; the last good checkpoint of this run is {here.parent.absolute()}"
    )
    shutil.rmtree(here.parent)
    line = refused(name)
    assert line.startswith(
        f"ckpt_path: {here.parent} holds no checkpoint any more, but {run}, the newest run, has saved some there, the first at step 3"
    )
    assert f"the last good checkpoint of another run is {older}" in line
    receipt = run / "receipt.json"  # of a run that has never saved any, whatever was due: it has lost nothing
    receipt.write_text(json.dumps({**json.loads(receipt.read_text()), "first_saved": None}))
    capsys.readouterr()
    assert with_checkpoint(collect(["--config=config.yaml", f"--ckpt_path={name}"]))[1] == older / "checkpoints" / "last.ckpt"
    assert f"checkpoint: the newest run, {run}, has none; going on from {older}" in capsys.readouterr().out


def test_auto_goes_on_from_a_folder_of_its_own(here: Path) -> None:
    shutil.move(here.parent, "elsewhere")
    config = here.parents[1] / "config.yaml"
    config.write_text(config.read_text().replace("dirpath: null", "dirpath: elsewhere"))
    request = collect(["--config=config.yaml", "--ckpt_path=auto", "--checkpoint.dirpath=elsewhere"])
    assert with_checkpoint(request)[1] == Path("elsewhere/last.ckpt")
    for name in ("auto", "last"):
        with pytest.raises(ConfigError, match=r"the newest run, has saved in elsewhere: give --checkpoint\.dirpath elsewhere to go on from there"):
            with_checkpoint(collect(["--config=config.yaml", f"--ckpt_path={name}"]))
    shutil.rmtree("elsewhere")
    with pytest.raises(
        ConfigError, match=r"elsewhere holds no checkpoint any more, but .*, the newest run, has saved some there, the first at step 3"
    ):
        with_checkpoint(request)


@pytest.mark.usefixtures("here")
def test_auto_begins_where_nothing_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    request = collect(["--config=config.yaml", "--ckpt_path=auto"])
    assert with_checkpoint(request)[1] is not None
    shutil.rmtree("runs")
    assert with_checkpoint(request) == (request, None)
    assert capsys.readouterr().out == "checkpoint: none in runs/config yet, so training starts at the beginning\n"


@pytest.mark.usefixtures("here")
def test_a_changed_batch_goes_on_if_it_is_wanted() -> None:
    more = ["--config=config.yaml", "--ckpt_path=last", "--trainer.max_steps=10", "--trainer.accumulate_grad_batches=4"]
    assert main(["preflight", *more]) == 2
    with pytest.warns(UserWarning, match="data: 384 tokens an optimizer step from here on, the checkpoint's training had 192"):
        assert main(["fit", *more, "--may_change=batch"]) == 0
