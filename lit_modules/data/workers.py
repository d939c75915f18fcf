"""Worker processes of a loader: how they start, what they are sent, whose signals they hear, and when they end.

They are forked from a server that has one thread and has imported what they need. A fork of the training itself would inherit the locks that its
other threads hold at that moment (of gloo, of a logger), and wait for them for ever. Nothing here imports Lightning: the server would start late.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_all_start_methods, parent_process, resource_tracker
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from types import ModuleType
from typing import Any, final
from weakref import WeakMethod, finalize

import numpy as np

from lit_modules.data.stream import TokenArray

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
METHOD = "forkserver" if "forkserver" in get_all_start_methods() else None  # None: the system's own
PRELOAD = ["lit_modules.data.shards", "lit_modules.data.windows", __name__]


LOOK = 5.0  # seconds of waiting for a batch, after which a worker is looked for that has died


def look_after(batches: Any) -> None:
    """Has the iterator of a DataLoader with a `timeout` find a dead worker within seconds.

    torch looks for one when the wait for a batch has been in vain, so after the whole timeout. Its handler of SIGCHLD, which would be told at once,
    never hears of a worker whose parent is the server.
    """
    wait = WeakMethod(batches._try_get_data)  # the iterator must not hold itself: its workers end with it

    def watched(timeout: float = LOOK) -> tuple[bool, Any]:
        until = time.monotonic() + timeout
        while True:
            once, left = wait(), until - time.monotonic()
            assert once is not None
            found: tuple[bool, Any] = once(max(0.0, min(LOOK, left)))
            if found[0] or left <= LOOK:
                return found

    batches._try_get_data = watched


def start_server() -> None:
    """Has the server begin to import, once a process; it ends with this process and its workers, whatever ends them.

    Workers start it too, but then the first one waits for its imports.

    Raises:
        ConfigError: the system does not let it start.
    """
    if METHOD is not None:
        with _apart(), _startable():
            forkserver.set_forkserver_preload(PRELOAD)
            forkserver.ensure_running()


@contextmanager
def _startable() -> Iterator[None]:
    """Around what makes sockets, semaphores and processes for workers: what the system refuses becomes ConfigError."""
    try:
        yield
    except OSError as error:
        from mixers.errors import ConfigError  # not for the server, which never comes here

        long = "too long" in str(error)  # no error number tells
        why = f"{error} (a socket there has a name of 100 characters at most: TMPDIR is {tempfile.gettempdir()})" if long else str(error)
        raise ConfigError(f"data.num_workers: no worker process can be started: {why}; set it to 0 to do without") from error


@contextmanager
def starting(num_workers: int) -> Iterator[None]:
    """Around the start of a loader's workers."""
    if not num_workers or METHOD is None:
        yield
        return
    start_server()  # again if something has killed it
    with _apart(), _startable():
        yield


@contextmanager
def _apart() -> Iterator[None]:
    """What is started now is told nothing of the program that trains, and never hears a signal that is meant for it.

    Signals go to all processes of a job. The server would end with the first one, and the workers with the server. And a worker would run a program
    without `if __name__ == "__main__"` once more, though it needs nothing of it.
    """
    program = sys.modules["__main__"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        resource_tracker.ensure_running()  # the third process that this needs
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # once more: that lets signals in again
        yield
    finally:
        sys.modules["__main__"] = program
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:  # noqa: ARG001 (what a DataLoader calls in its workers)
    """Keeps a worker process alive while the training finishes a step, and no longer than the training.

    A terminal's Ctrl-C, `timeout` and schedulers send their signal to all processes of a job. Only what the training itself sends ends the worker.
    It is not the process that has forked the worker (os.getppid), which lives on while it has workers.
    """
    parent = parent_process()
    assert parent is not None
    assert parent.pid is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not say who has sent a signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_await, args=(parent.pid,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(0)


def _await(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


@final
class SharedTokens:
    """Tokens in memory that have no name: a worker process maps them, where it would be sent a copy otherwise.

    Args:
        tokens: an array.
    """

    def __init__(self, tokens: TokenArray) -> None:
        self._file = _nameless_file()
        finalize(self, os.close, self._file)
        os.truncate(self._file, tokens.nbytes)
        with mmap.mmap(self._file, tokens.nbytes) as writable:
            np.frombuffer(writable, tokens.dtype)[:] = tokens
        self.array = _map(self._file, tokens.dtype)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, span: slice) -> TokenArray:
        return self.array[span]

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:  # no process is being started: a copy
            return SharedTokens, (np.array(self.array),)
        return _received, (DupFd(self._file), self.array.dtype)


def _received(file: Any, dtype: np.dtype[Any]) -> TokenArray:
    number = file.detach()
    try:
        return _map(number, dtype)
    finally:
        os.close(number)


def _map(file: int, dtype: np.dtype[Any]) -> TokenArray:
    return np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), dtype)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tokens")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
