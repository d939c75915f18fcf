"""The processes that make batches: how they start, what they are sent, and when they end. That they change no batch: also test_data_order.py."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import islice
from multiprocessing.context import set_spawning_popen
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from lit_modules.data import PackedText, loaders, workers
from lit_modules.data.loaders import TrainLoader
from lit_modules.data.workers import SharedTokens
from lit_modules.parallel import lost_process
from mixers.errors import ConfigError

# A program without `if __name__ == "__main__"` that hears SIGTERM and goes on.
PROGRAM = """
import signal, sys, time
from itertools import islice
from lit_modules.data import PackedText

signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
print("begun", flush=True)
data = PackedText(sys.argv[1], seq_len=8, batch_size=1, num_workers=1)
data.setup("fit")
batches = iter(data.train_dataloader())
next(batches)
print("ready", flush=True)
sys.stdin.readline()
print(len(list(islice(batches, 50))), len(list(islice(data.val_dataloader(), 3))), flush=True)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    for i in range(40):
        (path / f"{i}.txt").write_text(f"document {i} " * 20)
    return path


def data_of(corpus: Path, num_workers: int) -> PackedText:
    return PackedText(str(corpus), seq_len=16, batch_size=2, val_fraction=0.2, num_workers=num_workers)


def test_workers_are_no_forks_of_the_training(corpus: Path) -> None:
    batches = iter(data_of(corpus, 2).train_dataloader())
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    assert {worker._start_method for worker in workers} == {"forkserver"}
    batches.close()
    assert not multiprocessing.active_children()


def test_batches_order_and_resume(corpus: Path) -> None:
    """Over the end of an epoch, and from a position that was saved in the middle; validation again and again."""
    here, there = data_of(corpus, 0), data_of(corpus, 2)
    ours, theirs = here.train_dataloader(), there.train_dataloader()
    for _ in range(2):
        assert_same(ours, theirs)
    position = {**theirs.state_dict(), "samples": 7}
    for loader in (ours, theirs):
        loader.load_state_dict(position)
    assert_same(ours, theirs)
    for _ in range(3):
        assert_same(here.val_dataloader(), there.val_dataloader())
    assert ours.state_dict() == theirs.state_dict()
    assert here.describe() == there.describe()


def assert_same(ours: TrainLoader, theirs: TrainLoader) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.equal(b)


def test_tokens_are_not_sent(corpus: Path) -> None:
    windows = data_of(corpus, 1)._split("train")
    expected = windows.stream.tokens.copy()
    sent = windows.to_send()
    assert windows.to_send().tokens is sent.tokens  # once
    assert isinstance(sent.tokens, SharedTokens)
    assert windows.stream.tokens is sent.tokens.array
    set_spawning_popen(SimpleNamespace(duplicate_for_child=int, DupFd=int))  # as while a process is started
    try:
        content = bytes(ForkingPickler.dumps(sent))
    finally:
        set_spawning_popen(None)
    assert len(content) < 1000 < expected.nbytes
    for again in (windows, copy.deepcopy(windows), pickle.loads(pickle.dumps(windows))):
        assert np.array_equal(again.stream.tokens, expected)
        assert np.array_equal(again[3], windows[3])
    with pytest.raises(ValueError, match="read-only"):
        windows[0][0] = 1


def processes(session: int) -> list[int]:
    """Those of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(owner) == session and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.fixture
def program(corpus: Path) -> Iterator[subprocess.Popen]:
    """`PROGRAM`, in a session of its own, with a worker at work."""
    script = corpus.with_name("program.py")
    script.write_text(PROGRAM)
    root = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, str(script), str(corpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    ) as running:
        assert running.stdout is not None
        assert [running.stdout.readline() for _ in range(2)] == ["begun\n", "ready\n"]
        assert len(processes(running.pid)) > 2  # also the server
        yield running
        for pid in processes(running.pid):
            os.kill(pid, signal.SIGKILL)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def assert_nothing_is_left(program: subprocess.Popen) -> None:
    end = time.monotonic() + 30
    while left := processes(program.pid):
        assert time.monotonic() < end, left
        time.sleep(0.05)


@linux
def test_a_killed_training_leaves_no_process(program: subprocess.Popen) -> None:
    program.kill()
    program.wait()
    assert_nothing_is_left(program)


@linux
def test_signals_to_all_processes_end_no_worker(program: subprocess.Popen) -> None:
    """Nor the server, of which the worker of the validation comes. SIGINT and SIGUSR1: to all but the training, which does not hear them here."""
    os.killpg(program.pid, signal.SIGTERM)
    for pid in processes(program.pid):
        for signum in (signal.SIGINT, signal.SIGUSR1):
            if pid != program.pid:
                os.kill(pid, signum)
    time.sleep(0.3)
    said, _ = program.communicate("go on\n", timeout=60)
    assert said == "heard\n50 3\n"
    assert program.returncode == 0
    assert_nothing_is_left(program)


# --- what the system refuses ---


@pytest.mark.fault("shared memory full", "less room in /dev/shm than the workers' batches take", "nothing: one line before the first batch")
def test_no_room_for_the_batches_of_workers(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PackedText(str(corpus), seq_len=16, batch_size=2, num_workers=2)
    data.setup("fit")
    monkeypatch.setattr(loaders, "SHARED_MEMORY", str(corpus))
    monkeypatch.setattr(loaders, "active_children", list)  # workers of another test may live still
    needed = 2 * 2 * 3 * 2 * 16 * 20 + loaders.ROOM
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(ConfigError, match=r"^data.num_workers: 2 workers hand batches over in .*, which has 0.1 MiB left of the 0.1 that they may "):
        next(iter(data.train_dataloader()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    next(iter(data.train_dataloader()))


@pytest.mark.fault("a folder for temporary files with a long name", "TMPDIR of 120 characters", "nothing: one line")
def test_no_socket_for_the_server(corpus: Path) -> None:
    place = corpus.parent / ("d" * 60) / ("e" * 60)
    place.mkdir(parents=True)
    imports = "from lit_modules.data.workers import start_server; from mixers.errors import ConfigError"
    program = f"{imports}\ntry: start_server()\nexcept ConfigError as error: print(error)"
    environment = {**os.environ, "TMPDIR": str(place), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("data.num_workers: no worker process can be started: AF_UNIX path too long (a socket there has ")


def test_a_worker_that_is_killed_before_it_has_sent_anything(corpus: Path) -> None:
    """Nothing arrives then, and no message is cut: only looking for it finds it, long before the wait for a batch is over."""
    batches = iter(data_of(corpus, 1).train_dataloader())

    def kill() -> None:
        while not (found := multiprocessing.active_children()):
            time.sleep(0.001)
        os.kill(found[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        [*islice(batches, 100)]
    killer.join()


def test_a_batch_that_never_comes_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batches:
        waited: ClassVar[list[float]] = []

        def _try_get_data(self, timeout: float) -> tuple[bool, str | None]:
            self.waited.append(timeout)
            return len(self.waited) > 9, "batch"

    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: sum(Batches.waited)))
    batches = Batches()
    gone = weakref.ref(batches)
    workers.look_after(batches)
    assert batches._try_get_data(17)[0] is False
    assert batches.waited == [5, 5, 5, 2]
    assert batches._try_get_data(900) == (True, "batch")
    del batches
    assert gone() is None  # and its workers with it


@pytest.mark.fault("a loader worker is killed", "SIGKILL", "what came behind the last checkpoint; one line, exit code 1")
def test_a_worker_that_is_killed(corpus: Path) -> None:
    batches = iter(data_of(corpus, 1).train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError) as error:
        [*islice(batches, 100)]
    line = str(lost_process(error.value))
    assert line.startswith("data.num_workers: DataLoader worker ")
    assert "exited unexpectedly" in line
    assert ": a worker process was killed, " in line
