"""A training that does not begin, or has nothing left to do: one line, the exit code that docs/recipes.md names, and nothing left behind."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_cases import ended, here_fixture, one_thread, trained_fixture  # noqa: F401

from lit_modules.audit import Audit
from lit_modules.data import PackedText
from lit_modules.lit_lm import LitLM
from lit_modules.stopping import Stopped, at_once
from recipes.__main__ import main
from recipes.commands import fit, gpu_ready, receipt
from recipes.commands.checkpoints import with_checkpoint
from recipes.commands.config_files import collect

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..
COMMAND = ["fit", "--config=small.yaml", "--summary.max_new_tokens=0", "--trainer.default_root_dir=some/where"]


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


# --- refused ---


def full(owner: Any, name: str, call: int) -> Callable[[pytest.MonkeyPatch], None]:
    """The disk is full at a call of a function."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        function, calls = getattr(owner, name), []

        def refuse(*arguments: Any, **named: Any) -> Any:
            calls.append(arguments)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, refuse)

    return patch


@pytest.mark.fault("disk full at the start", "no file may be longer than a limit", "nothing: one line, and no folder is left")
def test_a_disk_that_takes_no_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, limits = sorted(here.rglob("*")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        code = main(COMMAND)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert errors(capsys) == ["error: trainer.default_root_dir: some/where cannot be written to: File too large"]
    assert sorted(here.rglob("*")) == before


@pytest.mark.fault("disk full at the start", "ENOSPC at the receipt, the events, the first step", "nothing: one line, and no folder is left")
@pytest.mark.parametrize(
    "fills", [full(receipt, "replace_file", 1), full(LitLM, "setup", 1), full(receipt, "replace_file", 2)]
)  # the model is on the meta device for the second: Lightning, tidying up, would hide the error
def test_a_disk_that_is_full_before_the_first_step(
    fills: Callable[[pytest.MonkeyPatch], None], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*"))
    fills(monkeypatch)
    assert main(COMMAND) == 2
    assert errors(capsys) == ["error: trainer.default_root_dir: some/where cannot be written to: No space left on device"]
    assert sorted(here.rglob("*")) == before


REFUSED = {
    "known with the data": (["--data.path=no_such_corpus"], "data.path: no_such_corpus does not exist"),
    "known to Trainer": (["--trainer.limit_val_batches=-1"], "trainer: You have passed invalid value -1 for limit_val_batches"),
    "settings at odds": (["--trainer.val_check_interval=0.5"], "trainer: `val_check_interval` should be an integer"),
    "known with the batches": (["--trainer.limit_val_batches=0.0001"], "trainer: You requested to check 0.0001 of the `val_dataloader`"),
    "an interval longer than an epoch": (
        ["--trainer.val_check_interval=1000", "--trainer.check_val_every_n_epoch=1"],
        "trainer.val_check_interval: `val_check_interval` (1000) must be less than or equal to the number of the training batches (17)",
    ),
    "a name that no system takes": ([f"--trainer.default_root_dir=new/{300 * 'x'}"], "trainer.default_root_dir: a folder for the run cannot be made"),
    "a folder of checkpoints that is a file": (
        ["--checkpoint.dirpath=corpus.txt"],
        "checkpoint.dirpath: corpus.txt cannot be written to: File exists",
    ),
    "a folder of checkpoints in a file": (
        ["--checkpoint.dirpath=new/../corpus.txt/x"],
        "checkpoint.dirpath: new/../corpus.txt/x cannot be written to",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = REFUSED[case]
    before = sorted(here.rglob("*"))
    assert main([*COMMAND, *arguments]) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"error: {expected}")
    assert sorted(here.rglob("*")) == before


def test_what_the_audit_refuses_leaves_only_what_was_there(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    configure = LitLM.configure_model

    def broken(self: LitLM) -> None:
        configure(self)
        self.lm.head.weight.data[0, 0] = float("nan")

    monkeypatch.setattr(LitLM, "configure_model", broken)
    (here / "some/where").mkdir(parents=True)
    before = sorted(here.rglob("*"))
    assert main(COMMAND) == 2
    assert errors(capsys)[-1].startswith("error: model: training cannot begin")
    assert sorted(here.rglob("*")) == before


# --- stopped ---

MOMENTS = {  # and whether there is a run folder by then
    "settings are checked": (fit, "make_plan", False),
    "kernels are checked": (gpu_ready, "trace", False),
    "data are read": (PackedText, "setup", False),
    "the model is built": (LitLM, "configure_model", True),
    "optimizers are built": (LitLM, "configure_optimizers", True),
    "the audit begins": (Audit, "on_train_start", True),
}


@pytest.mark.fault("pre-emption", "SIGTERM and SIGUSR1 while a training starts", "nothing was done; one line says so; exit code 143")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_a_training_starts(signum: signal.Signals, moment: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner, name, has_folder = MOMENTS[moment]
    function, before = getattr(owner, name), [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1)]

    def stop(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)  # schedulers repeat themselves
        return function(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        assert main([*COMMAND, "--ckpt_path=auto"]) == 143
    assert [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1)] == before
    (line,) = errors(capsys)
    folders = [*here.glob("some/where/*")]
    assert len(folders) == has_folder
    if has_folder:
        assert line == f"stopped by {signum.name}; this run has saved nothing: the same command line starts at the beginning"
        outcome = json.loads((folders[0] / "receipt.json").read_text())["outcome"]
        assert outcome == {"state": "stopped", "step": 0, "tokens": 0, "what": f"Stopped: {signum.name}, before the first step"}
    else:
        assert line == f"stopped by {signum.name} before training began: nothing was written, the same command line begins again"
        assert not (here / "some").exists()
    assert main([*COMMAND, "--ckpt_path=auto", "--trainer.max_steps=1"]) == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_modules_are_imported(signum: signal.Signals, tmp_path: Path) -> None:
    program = f"import os, recipes.__main__ as m; m.import_module = lambda _: os.kill(os.getpid(), {int(signum)}); m.main(['fit'])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr == f"stopped by {signum.name} before training began: nothing was written, the same command line begins again\n"


def test_no_handler_of_errors_takes_a_signal_for_one() -> None:
    def careless() -> None:
        with contextlib.suppress(Exception):  # as a plug-in may
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped), at_once():
        careless()


# --- finished ---


def test_auto_has_nothing_to_do_at_the_limit_of_steps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*COMMAND, "--trainer.max_steps=3", "--ckpt_path=auto"]
    assert main(command) == 0
    (run,) = here.glob("some/where/*")
    capsys.readouterr()
    assert main(command) == 0
    said = f"checkpoint: some/where/{run.name}/checkpoints/last.ckpt: already finished: 3 of 3 steps; raise trainer.max_steps to go on\n"
    assert capsys.readouterr().out == said
    assert main(["preflight", *command[1:]]) == 0
    for command in ("fit", "preflight"):
        assert main([command, *COMMAND[1:], "--trainer.max_steps=3", "--ckpt_path=last"]) == 2
        assert errors(capsys) == ["error: ckpt_path: the checkpoint has already seen 3 of 3 steps; raise trainer.max_steps"]
    assert [*here.glob("some/where/*")] == [run]
    assert main([*COMMAND, "--trainer.max_steps=4", "--ckpt_path=auto"]) == 0
    _, second = sorted(here.glob("some/where/*"))
    with (second / "metrics.csv").open() as table:
        assert next(csv.DictReader(table))["flops_per_token"]  # the first row that is written after a checkpoint is a whole one


def test_auto_says_that_a_run_was_ended_behind_its_last_step(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    (file,) = Path("runs/small").glob("*/receipt.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "outcome": {"state": "running"}}))
    curve = file.with_name("loss_curve.png")
    drawn = curve.read_bytes()
    curve.unlink()
    assert main(["fit", "--config=small.yaml", "--ckpt_path=auto"]) == 0
    line = capsys.readouterr().out
    checkpoint = file.with_name("checkpoints") / "last.ckpt"
    validate, generate = (f"python -m recipes {command} --ckpt_path {checkpoint}" for command in ("validate", "generate"))
    assert line.endswith(
        f"; its run did not get to its end (it is running): for the loss on the validation set {validate}, for a sample {generate}\n"
    )
    assert curve.read_bytes() == drawn  # from the checkpoint
    assert main(validate.split()[3:]) == 0
    assert main(generate.split()[3:]) == 0
    file.unlink()
    assert main(["fit", "--config=small.yaml", "--ckpt_path=auto"]) == 0
    assert capsys.readouterr().out.endswith("raise model.max_tokens to go on\n")


# --- nothing left to do by other limits, nothing to go on from ---


def test_no_step_is_no_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch is over, or the time: Lightning would end as if it had trained, in one more run folder."""
    epoch = [*COMMAND, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    assert main(epoch) == 0
    runs = sorted(here.glob("some/where/*"))
    capsys.readouterr()
    assert main([*epoch, "--ckpt_path=auto"]) == 2
    line = errors(capsys)[-1]
    assert line.startswith("error: trainer.max_epochs: no step was taken, the checkpoint some/where/")
    assert line.endswith("is at the end of it already; raise it")
    assert main([*COMMAND, "--trainer.max_time=00:00:00:00"]) == 2
    assert "trainer.max_time: no step was taken, this training is at the end of it already; raise it" in errors(capsys)[-1]
    assert sorted(here.glob("some/where/*")) == runs


def test_a_training_that_saves_in_the_place_of_what_it_goes_on_from(here: Path) -> None:
    """Its own last step is not taken for the one that it began with. A checkpoint that lies among the runs is none of a run's."""
    for limit in (2, 4):
        assert main([*COMMAND, "--checkpoint.dirpath=place", f"--trainer.max_steps={limit}", "--ckpt_path=auto"]) == 0
    assert len([*here.glob("some/where/*/receipt.json")]) == 2
    shutil.copytree("place", "runs_to_be")
    assert with_checkpoint(collect([*COMMAND[1:-1], "--trainer.default_root_dir=runs_to_be", "--ckpt_path=auto"]))[1] is None


@pytest.mark.usefixtures("here")
def test_early_stopping_on_a_metric_that_nobody_logs(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/los"]
    assert main([*COMMAND, *settings]) == 2
    line = errors(capsys)[-1]
    assert line.startswith("error: trainer.callbacks: Early stopping conditioned on metric `val/los` which is not available")
    assert "val/loss" in line


@pytest.mark.usefixtures("here")
def test_weights_alone_are_not_gone_on_from(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    step = LitLM.training_step

    def stopped(self: LitLM, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(LitLM, "training_step", stopped)
    assert main([*COMMAND, "--checkpoint.save_weights_only=true"]) == 143
    assert errors(capsys)[-1].startswith("stopped by SIGTERM; no training goes on from ")


def _environment(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended
        return b""


def two_processes(here: Path, **options: Any) -> tuple[subprocess.Popen[bytes], int]:
    """The first, and the number of the second, which has just begun: a moment before, it is a copy of the first one, which waits for it."""
    command = [sys.executable, "-m", "recipes", *COMMAND, "--trainer.devices=2", "--model.max_tokens=10000000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with (here / "said").open("w") as said:
        first = subprocess.Popen(command, cwd=here, env=environment, stdout=said, stderr=said, **options)
    for _ in range(1200):
        found = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        other = next((int(pid) for pid in found if b"LOCAL_RANK=1" in _environment(pid)), None)
        if other is not None:
            return first, other
        assert first.poll() is None, (here / "said").read_text()
        time.sleep(0.05)
    first.kill()
    return pytest.fail("no second process")


def assert_ends(pid: int) -> None:
    """Within a minute."""
    for _ in range(1200):
        if ended(pid):
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the second process still waits")


@pytest.mark.fault(
    "one of two processes dies at the start", "SIGKILL to the first one when the second has begun", "nothing was done; the other ends within seconds"
)
def test_no_process_is_left_that_waits_for_its_parent(here: Path) -> None:
    first, other = two_processes(here)
    first.kill()
    first.wait()
    assert_ends(other)


@pytest.mark.fault("pre-emption", "SIGTERM while two processes wait for each other", "nothing was done; one line says so; exit code 143")
def test_a_signal_while_a_process_waits_for_another(here: Path) -> None:
    """The second is stopped, so that the first hangs in the system's calls."""
    first, other = two_processes(here)
    os.kill(other, signal.SIGSTOP)
    time.sleep(5)
    first.terminate()
    assert first.wait(20) == 143
    os.kill(other, signal.SIGCONT)
    assert_ends(other)
    assert (here / "said").read_text().splitlines()[-1] == (
        "stopped by SIGTERM; this run has saved nothing: the same command line starts at the beginning"
    )
    (receipt,) = here.glob("some/where/*/receipt.json")
    outcome = json.loads(receipt.read_text())["outcome"]
    assert outcome == {"state": "stopped", "step": 0, "tokens": 0, "what": "Stopped: SIGTERM, before the first step"}


@pytest.mark.fault("Ctrl-C", "SIGINT to two processes that have not begun to train", "nothing was done; the receipt says so; exit code 130")
@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_an_interrupt_while_two_processes_start(seconds: float, here: Path) -> None:
    first, other = two_processes(here, start_new_session=True)
    time.sleep(seconds)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(20) == 130
    assert_ends(other)
    (receipt,) = here.glob("some/where/*/receipt.json")
    assert json.loads(receipt.read_text())["outcome"]["state"] == "stopped"


@pytest.mark.fault("pre-emption", "SIGTERM to the second of two processes that start", "nothing was done; one line says so; exit code 143")
@pytest.mark.parametrize("seconds", [1.0, 2.0])  # before, Python has not begun
def test_a_signal_for_the_second_process_alone(seconds: float, here: Path) -> None:
    first, other = two_processes(here)
    time.sleep(seconds)
    os.kill(other, signal.SIGTERM)
    assert first.wait(20) == 143
    assert_ends(other)
    (line,) = [line for line in (here / "said").read_text().splitlines() if line.startswith("stopped by ")]
    assert line.startswith("stopped by SIGTERM; ")
    (receipt,) = here.glob("some/where/*/receipt.json")
    assert json.loads(receipt.read_text())["outcome"]["state"] == "stopped"
