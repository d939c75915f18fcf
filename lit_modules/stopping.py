"""Signals that end a training: between two optimizer steps, on all ranks at once, never in the middle of one.

Lightning's own handlers save or talk to other ranks from within the signal, wherever the training happens to be, and can hang.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_modules.data.workers import SIGNALS

PARENT = "LIGHTNING_MIXERS_PARENT"  # the variable that names the process that started others
PREEMPTED = 143  # 128 + SIGTERM: what a shell reports for a process that SIGTERM ended, so schedulers take it for what it is
INTERRUPTED = 130  # 128 + SIGINT
ENDING = [signum for signum in SIGNALS if signum != signal.SIGINT]  # Ctrl-C is Python's


class Stopped(BaseException):  # no error: no `except Exception` is meant for it
    """A signal has asked the training to end, and all ranks have finished their step; or it had not begun.

    Args:
        signum: the signal.
        alone: whether other ranks do not know of it.
    """

    def __init__(self, signum: int, *, alone: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.alone = signum, alone


@contextmanager
def at_once() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise `Stopped` wherever the program is, until `StopOnSignal` listens: before the first step there is nothing to finish.

    Ctrl-C is Python's. At the end what listened before listens again.
    """
    process, stopping = os.getpid(), False

    def stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal stopping
        if os.getpid() != process:  # a worker that has just begun
            os._exit(128 + signum)
        if not stopping:  # schedulers repeat themselves
            stopping = True
            raise Stopped(signum, alone=True)

    with _listening(stop):
        yield


@contextmanager
def _listening(handler: Callable[[int, FrameType | None], None], signals: Iterable[int] = ENDING) -> Iterator[None]:
    """Has signals call a handler, where that can be: in the main thread. At the end what listened before listens again."""
    here = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum in signals if here}
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


@contextmanager
def from_a_thread(end: Callable[[Stopped], int]) -> Iterator[None]:
    """As `at_once`, of several processes, and for Ctrl-C too: until one of them has all others, it waits where Python calls no handler. So a thread,
    which the system tells of a signal all the same, ends the process without unwinding it: with the exit code that `end` returns.
    """

    def note(signum: int, frame: FrameType | None) -> None:
        """The thread does the rest."""

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hears, tells = socket.socketpair()
    tells.setblocking(False)

    def watch() -> None:
        while told := hears.recv(1):
            if signal.getsignal(told[0]) is note:
                try:
                    code = end(Stopped(told[0], alone=True))
                except KeyboardInterrupt:
                    code = INTERRUPTED
                os._exit(code)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    try:
        with _listening(note, SIGNALS):
            yield
    finally:
        signal.set_wakeup_fd(before)
        tells.shutdown(socket.SHUT_RDWR)  # a worker process may still hold a copy, which closing this one leaves open
        thread.join()
        tells.close()
        hears.close()


@contextmanager
def parent_of_others() -> Iterator[None]:
    """Around what may start processes for other ranks: they learn whose they are."""
    os.environ.setdefault(PARENT, str(os.getpid()))
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)


def end_with_parent() -> None:
    """Until it trains, a process that was started for another rank ends with the one that started it: it would wait for that one, in vain.

    Behind that the others' silence ends it, by an error that says so.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" and (parent := os.environ.get(PARENT)):
        _when_parent_ends(signal.SIGKILL)
        if os.getppid() != int(parent):
            os._exit(PREEMPTED)


def _when_parent_ends(signum: int) -> None:
    """Asks Linux for a signal at that moment; 0: for none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum, 0, 0, 0)  # PR_SET_PDEATHSIG


@final
class StopOnSignal(Callback):
    """Ends the training with `Stopped` after the optimizer step during which SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 came, or within a validation.

    Several processes tell each other with the sums of a step (`LitLM.ballot`), which they wait for anyway: to wait once more would leave the GPU
    without work. So what comes to one of them behind those sums ends the training after the next step.

    A second Ctrl-C is Python's: it ends the process at once. Signals that come before the training are `at_once`'s.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._signals: list[int] = []  # that are listened to, the same on all ranks

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._install(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)
        if os.environ.get(PARENT, str(os.getpid())) != str(os.getpid()):
            _when_parent_ends(0)
        if trainer.world_size > 1:
            pl_module.ballot = lambda: [int(self._signum == signum) for signum in self._signals]  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if batch_idx % trainer.accumulate_grad_batches:
            return
        votes: list[float] = getattr(pl_module, "votes", [])  # none before the first step
        if not votes:
            self._stop(trainer)
        elif any(votes) and not _is_ending(trainer):
            raise Stopped(next(signum for signum, count in zip(self._signals, votes, strict=True) if count))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._stop(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._stop(trainer)

    def _install(self, trainer: Trainer) -> None:
        """In place of Lightning's handlers, which it has just set; it also puts back those that were there before."""
        environment = trainer._accelerator_connector.cluster_environment
        requeue = getattr(environment, "requeue_signal", None)
        self._signals = sorted({*SIGNALS, requeue} - {None})
        if threading.current_thread() is threading.main_thread():
            for signum in self._signals:
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._signum == signal.SIGINT:
                signal.default_int_handler(signum, frame)
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not safe in a signal handler
        self._signum = signum

    def _stop(self, trainer: Trainer) -> None:
        """Asks all ranks."""
        if _is_ending(trainer):
            return
        signum = self._signum
        if trainer.world_size > 1:
            signum = int(trainer.strategy.reduce(torch.tensor(signum, device=trainer.strategy.root_device), reduce_op="max"))
        if signum:
            raise Stopped(signum)


def _is_ending(trainer: Trainer) -> bool:
    return trainer.state.fn != "fit" or trainer.should_stop


def exit_code(trainer: Trainer | None, stop: Stopped) -> int:
    """Says why the training has stopped, has SLURM requeue the job if Lightning's plugin would, and returns the exit code.

    Ranks other than the first return 0, unless the first does not know of it: their exit code would be taken for a failure.

    Args:
        trainer: None if it had not been asked to train yet.
        stop: as it was raised.

    Raises:
        KeyboardInterrupt: the signal was Ctrl-C's.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        if not stop.alone:
            return 0
        _tell_first(stop.signum)
        return PREEMPTED
    if trainer is None:
        print(f"stopped by {stop} before training began: nothing was written, the same command line begins again", file=sys.stderr, flush=True)
        return PREEMPTED
    print(f"stopped by {stop}; {_how_to_go_on(trainer)}", file=sys.stderr, flush=True)
    if stop.signum == signal.SIGINT:
        raise KeyboardInterrupt from stop
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and stop.signum == environment.requeue_signal:
        _requeue()
    return PREEMPTED


def _tell_first(signum: int) -> None:
    """Sends a signal on to the process that has started this one (a terminal tells it of Ctrl-C), and leaves it a moment to end: it would be killed
    when one that it has started has ended, and could not say why in its receipt."""
    if int(os.environ.get(PARENT, 0)) == os.getppid():
        if signum != signal.SIGINT:
            os.kill(os.getppid(), signum)
        time.sleep(2)


def _how_to_go_on(trainer: Trainer) -> str:
    """What the user is to do, by what was saved: nothing is before the first step, or where the disk is full."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and (saved := callback._last_checkpoint_saved):
            if callback.save_weights_only:
                return f"no training goes on from {saved}, which holds weights only (checkpoint.save_weights_only)"
            return f"the same command line with --ckpt_path {'last' if callback.save_last else saved} goes on"
    start = f"goes on from {trainer.ckpt_path} again" if trainer.ckpt_path else "starts at the beginning"
    return f"this run has saved nothing: the same command line {start}"


def _requeue() -> None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ.get("SLURM_JOB_ID", "") if array is None else f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except OSError as error:
        problem = str(error)
    print(f"job {job} was not requeued: {problem}" if problem else f"job {job} is requeued", file=sys.stderr, flush=True)
