"""How checkpoints are written, which one an error names, and how a training that ended is gone on with."""

from __future__ import annotations

import csv
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import here_fixture, one_thread  # noqa: F401
from lit_cases import make_lm

from lit_modules import events, intact
from lit_modules.checkpoint import read_checkpoint
from lit_modules.intact import last_good, link, part_of, write_file
from lit_modules.lit_lm import LitLM
from lit_modules.stopping import StopOnSignal
from mixers.errors import ConfigError
from recipes.__main__ import main
from recipes.commands.newest import find_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..

# --- one file, two names ---


def content(number: float) -> dict[str, Any]:
    """Enough of a checkpoint for one to be named in an error."""
    lm = make_lm().settings
    return {"state_dict": {}, "lm": lm, "lightning_mixers": {"format": 1, "tokens": 7}, "global_step": 1, "number": torch.tensor([number])}


def number(path: Path) -> float:
    return float(read_checkpoint(path / "a" if path.is_dir() else path)["number"])


@pytest.fixture(name="two", params=["file", "folder"])
def two_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of one file, or a folder of one, that has two names."""
    step, last = tmp_path / "step=1.ckpt", tmp_path / "last.ckpt"
    put(1.0, step, folder=request.param == "folder")
    link(step, last)
    return step, last


def put(value: float, target: Path, *, folder: bool) -> None:
    if folder:
        part_of(target).mkdir()
        write_file(content(value), part_of(target) / "a")
        (part_of(target) / ".metadata").touch()
        intact.finish_folder(part_of(target), target)
    else:
        write_file(content(value), target)


def same(one: Path, other: Path) -> bool:
    return os.path.samefile(one / "a", other / "a") if one.is_dir() else os.path.samefile(one, other)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_written_under_one_name_is_not_seen_under_the_other(two: tuple[Path, Path], which: int) -> None:
    assert same(*two)
    put(2.0, two[which], folder=two[0].is_dir())
    assert (number(two[which]), number(two[1 - which])) == (2.0, 1.0)
    link(two[0], two[1])  # in place of what has the name
    assert same(*two)
    link(two[0], two[1])  # nothing is left to do
    assert names(two[0].parent) == {"step=1.ckpt", "last.ckpt"}
    shutil.rmtree(two[0]) if two[0].is_dir() else two[0].unlink()  # as the next one takes its place
    assert number(two[1]) == (2.0 if which == 0 else 1.0)


@pytest.mark.fault("process killed", "between the second name of a checkpoint and its renaming, by what that leaves", "nothing", each=2)
def test_a_name_that_a_kill_has_left_is_not_written_through(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    step, last = two

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(intact, "replace", kill)
        patch.setattr(intact, "_remove", lambda _: None)  # a killed process tidies nothing
        with pytest.raises(Killed):
            link(step, last)
    (left,) = names(step.parent) - {"step=1.ckpt", "last.ckpt"}
    assert left.startswith(".")
    assert same(step.with_name(left), step)
    put(2.0, last, folder=step.is_dir())
    assert (number(step), number(last)) == (1.0, 2.0)
    link(step, last)
    assert number(last) == 1.0
    assert names(step.parent) == {"step=1.ckpt", "last.ckpt"}


@pytest.mark.fault("disk full", "at the copy that a file system without hard links needs", "nothing: the old one stays")
def test_a_file_system_without_hard_links(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    step, last = two

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "link", refuse)
    put(2.0, step, folder=step.is_dir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            link(step, last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert number(last) == 1.0
    assert names(step.parent) == {"step=1.ckpt", "last.ckpt"}
    link(step, last)
    assert number(last) == 2.0
    assert not same(step, last)


# --- the last good one, in words ---


def test_the_last_good_one_is_of_the_same_run_first(tmp_path: Path) -> None:
    mine, other = (tmp_path / run / "checkpoints" for run in ("a", "b"))
    for age, (folder, name) in enumerate([(other, "last"), (mine, "step=3"), (mine, "step=2"), (mine, "diverged"), (mine, "last")]):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(content(1.0), folder / f"{name}.ckpt")
        os.utime(folder / f"{name}.ckpt", (1e9 - age, 1e9 - age))  # the other run's is the newest

    def said(path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            find_checkpoint(str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    missing = mine / "step=9.ckpt"
    assert said(missing).endswith(f"; the last good checkpoint of this run is {mine}/step=3.ckpt (step 1, 7 tokens)")
    (mine / "step=3.ckpt").write_bytes(b"torn")
    assert f"of this run is {mine}/step=2.ckpt" in said(missing)
    (mine / "step=2.ckpt").write_bytes(b"")
    (mine / "last.ckpt").unlink()
    assert f"; the last good checkpoint of another run is {other}/last.ckpt" in said(missing)
    write_file(content(1.0), tmp_path / "c.ckpt")
    assert f"; the last good checkpoint beside it, which may be of another run, is {tmp_path}/c.ckpt" in said(tmp_path / "missing.ckpt")
    (other / "last.ckpt").write_bytes(b"")
    assert said(missing).endswith("(legal: a checkpoint, last or auto)")  # diverged.ckpt is none
    with pytest.raises(ConfigError, match=r"has a last\.ckpt to go on from$"):
        find_checkpoint("last", tmp_path / "d")


def test_a_checkpoint_that_the_system_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(content(1.0), tmp_path / "a.ckpt")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"^it: cannot be read: Permission denied$"):
        intact.check_intact(tmp_path / "a.ckpt", "it")
    assert last_good({"": [tmp_path / "a.ckpt"]}) == ""


# --- how a training ended, and what `auto` makes of it ---

COMMAND = ["fit", "--config=small.yaml", "--summary.max_new_tokens=0", "--trainer.limit_val_batches=0"]
SAVE = "--checkpoint.every_n_train_steps=2"


def diverge(patch: pytest.MonkeyPatch, step: int) -> None:
    """From now on the loss of a step is not finite."""
    nll = LitLM._nll
    patch.setattr(LitLM, "_nll", lambda self, batch: tuple(x * (torch.inf if self.trainer.global_step == step else 1) for x in nll(self, batch)))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoint: ")]


@pytest.mark.fault(
    "training diverges", "the same step is infinite in every run; gone on from by `auto`", "nothing: last.ckpt stays; lines say what repeats", each=2
)
def test_a_diverged_training_keeps_its_last_good_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        diverge(patch, 3)
        assert main([*COMMAND, SAVE, "--ckpt_path=auto"]) == 1
        (first,) = here.glob("runs/small/*")
        saved = first / "checkpoints"
        assert names(saved) == {"last.ckpt", "diverged.ckpt", "epoch=0-step=2.ckpt"}
        assert same(saved / "last.ckpt", saved / "epoch=0-step=2.ckpt")
        before = (saved / "last.ckpt").read_bytes()
        line = lines(capsys)[-1]
        run = first.relative_to(here)
        assert f"{run}/checkpoints/diverged.ckpt (step 3) has the weights that diverged" in line
        assert line.endswith(f"; the last good one is {run}/checkpoints/last.ckpt (step 2)") or line.endswith(f"{saved}/last.ckpt (step 2)")
        about = json.loads((first / "autopsy.json").read_text())["checkpoints"]
        assert {key: Path(path).resolve() for key, path in about.items()} == {"diverged": saved / "diverged.ckpt", "last_good": saved / "last.ckpt"}
        assert (read_checkpoint(saved / "last.ckpt")["global_step"], read_checkpoint(saved / "diverged.ckpt")["global_step"]) == (2, 3)
        assert main([*COMMAND, SAVE, "--ckpt_path=auto"]) == 1  # the same again, and it has been said
        begun, ended = lines(capsys)
        assert begun.startswith(f"checkpoint: the run before diverged at step 3 ({run}/autopsy.json); going on from step 2, which with the same data")
        second = max(here.glob("runs/small/*"))
        assert names(second / "checkpoints") == {"diverged.ckpt"}
        assert "last.ckpt (step 2)" in ended
        assert (saved / "last.ckpt").read_bytes() == before
    assert main([*COMMAND, SAVE, "--ckpt_path=auto"]) == 0
    assert f"({second.relative_to(here)}/autopsy.json); going on from step 2" in lines(capsys)[0]
    runs = sorted(here.glob("runs/small/*"))
    assert main([*COMMAND, SAVE, "--ckpt_path=auto"]) == 0  # a job that is queued again has nothing left to do
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"checkpoint: {runs[-1].relative_to(here)}/checkpoints/last.ckpt: already finished: 256 of 256 tokens")
    assert sorted(here.glob("runs/small/*")) == runs
    assert main(["preflight", *COMMAND[1:], "--ckpt_path=auto"]) == 0
    capsys.readouterr()
    assert main([*COMMAND, "--ckpt_path=last"]) == 2
    assert "has already seen 256 of 256 tokens; raise model.max_tokens" in capsys.readouterr().err


def test_a_checkpoint_of_the_step_that_diverges_is_not_called_good(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge(monkeypatch, 2)
    assert main([*COMMAND, "--checkpoint.every_n_train_steps=1"]) == 1
    (run,) = here.glob("runs/small/*")
    line = lines(capsys)[-1]
    assert "/diverged.ckpt (step 2) has the weights that diverged, not to be gone on from; " in line
    assert line.endswith("last.ckpt is of the same step")
    assert json.loads((run / "autopsy.json").read_text())["checkpoints"]["last_good"] is None


def test_a_training_that_diverges_before_anything_was_saved(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        diverge(patch, 1)
        assert main([*COMMAND, "--ckpt_path=auto"]) == 1
    assert lines(capsys)[-1].endswith("/diverged.ckpt (step 1) has the weights that diverged, not to be gone on from; none was saved before")
    (first,) = here.glob("runs/small/*")
    assert json.loads((first / "autopsy.json").read_text())["checkpoints"]["last_good"] is None
    diverge(monkeypatch, 0)
    assert main([*COMMAND, "--ckpt_path=auto"]) == 1
    assert [line.partition("(")[0] for line in lines(capsys)] == [
        "checkpoint: none in runs/small yet, so training starts at the beginning",
        "checkpoint: the run before diverged at step 1 ",
        "checkpoint: nothing to save, no step was taken; none was saved before",
    ]


def test_weights_that_are_not_finite_are_not_saved(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def end(self: LitLM, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.lm.head.weight.data[0, 0] = torch.nan
        return behind(self, outputs, batch, batch_idx)

    behind = LitLM.on_train_batch_end
    monkeypatch.setattr(LitLM, "on_train_batch_end", end)
    assert main(COMMAND) == 1
    assert lines(capsys) == ["checkpoint: not saved, the weights are not finite; none was saved before"]
    assert not [*here.glob("runs/*/*/checkpoints/*")]


@pytest.mark.fault(
    "pre-emption", "SIGTERM before the first optimizer step", "nothing was done; a line says that nothing was saved; exit code 143", each=2
)
def test_a_signal_before_the_first_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = StopOnSignal.on_train_start

    def stop(self: StopOnSignal, *arguments: Any) -> None:
        start(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_train_start", stop)
        assert main(COMMAND) == 143
        assert "stopped by SIGTERM; this run has saved nothing: the same command line starts at the beginning" in capsys.readouterr().err
    assert not [*here.glob("runs/*/*/checkpoints/*")]
    assert main([*COMMAND, "--model.max_tokens=128"]) == 0
    (last,) = here.glob("runs/*/*/checkpoints/last.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_train_start", stop)
        assert main([*COMMAND, "--ckpt_path=last"]) == 143
    assert f"this run has saved nothing: the same command line goes on from {last.relative_to(here)} again" in capsys.readouterr().err


@pytest.mark.fault(
    "disk full", "TensorBoard's events beyond a limit of the size of a file, written by a thread of its own", "events: training goes on"
)
def test_events_on_a_full_disk_end_no_training(tmp_path: Path) -> None:
    script = f"""
import resource, signal
from lit_modules.events import Events
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logger = Events({str(tmp_path)!r}, name="", version="")
logger.log_metrics({{"loss": 1.0}}, 0)
logger.save()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for step in range(1, 400):
    logger.log_metrics({{"loss": 1.0}}, step)
    if step % 50 == 0:
        logger.save()
logger.finalize("success")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "log: TensorBoard's events are not written any more: File too large; training goes on\n"


def test_what_waits_for_a_metric_is_saved_all_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best are chosen by a validation that comes after 4 steps; last.ckpt is there every step, and the receipt knows."""
    saved: list[int | None] = []
    begin = LitLM.on_train_batch_start

    def look(self: LitLM, *arguments: Any) -> Any:
        files = [*here.glob("runs/small/*/checkpoints/*.ckpt")]
        assert {file.name for file in files} <= {"last.ckpt"}
        saved.append(read_checkpoint(files[0])["global_step"] if files else None)
        return begin(self, *arguments)

    monkeypatch.setattr(LitLM, "on_train_batch_start", look)
    often = ["--checkpoint.monitor=val/loss", "--checkpoint.every_n_train_steps=1", "--trainer.val_check_interval=4"]
    assert main(["fit", "--config=small.yaml", *often]) == 0
    assert saved == [None, 1, 2, 3]
    (run,) = here.glob("runs/small/*")
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"last.ckpt", "epoch=0-step=4.ckpt"}
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert json.loads((run / "receipt.json").read_text())["first_saved"] == 1


@pytest.mark.fault(
    "disk full",
    "metrics.csv beyond a limit of the size of a file, with the same columns and with another one",
    "nothing, once there is space",
)
@pytest.mark.parametrize("column", ["loss", "other"])
@pytest.mark.parametrize("room", [True, False])
def test_metrics_on_a_full_disk(column: str, room: bool, tmp_path: Path) -> None:
    script = f"""
import resource, signal
from lit_modules.events import Metrics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
logger = Metrics({str(tmp_path)!r}, name="", version="")
for step in range(300):
    if step == 100:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1050, hard))  # in the middle of a row
    if step == 250 and {room}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    logger.log_metrics({{"loss" if step < 102 else {column!r}: step + 0.25}}, step)
    logger.save()
logger.finalize("success")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    kept = "its rows are kept in memory until they can be; training goes on"
    assert done.stderr == f"log: metrics.csv cannot be written: File too large; {kept}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]
    with (tmp_path / "metrics.csv").open(newline="") as table:
        assert table.read().endswith("\r\n")
        table.seek(0)
        rows = list(csv.DictReader(table))
    assert len(rows) == 300 if room else 100 < len(rows) < 300
    assert [row["step"] for row in rows] == [str(step) for step in range(len(rows))]
    assert [row["loss"] or row[column] for row in rows] == [str(step + 0.25) for step in range(len(rows))]


@pytest.mark.fault("disk full", "ENOSPC at the rows of metrics.csv after the first; there is room again at the end", "nothing: training goes on")
def test_training_goes_on_without_room_for_metrics(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    append, calls = events._append, []

    def refuse(file: Path, content: bytes) -> None:
        calls.append(content)
        if len(calls) < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, content)

    assert main(COMMAND[:-1]) == 0
    (whole,) = here.glob("runs/*/*/metrics.csv")
    monkeypatch.setattr(events, "_append", refuse)
    capsys.readouterr()
    assert main(COMMAND[:-1]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("log:")] == [
        "log: metrics.csv cannot be written: No space left on device; its rows are kept in memory until they can be; training goes on"
    ]
    assert len(calls) >= 4
    (other,) = {*here.glob("runs/*/*/metrics.csv")} - {whole}
    columns = ("step", "train/loss", "val/loss")
    tables = [[[row[column] for column in columns] for row in csv.DictReader(file.read_text().splitlines())] for file in (whole, other)]
    assert tables[0] == tables[1]
    assert json.loads(other.with_name("receipt.json").read_text())["outcome"]["state"] == "finished"
