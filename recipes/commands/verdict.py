"""What `doctor` found on a GPU, kept for the next time: a file for each (GPU, Triton, source of the kernels) in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

import kernels
from recipes.commands import checks, problems
from recipes.commands.checks import Result, Trial
from recipes.commands.machine import triton_version

Say = Callable[[Result, bool], object]
PROCESSES = min(16, os.cpu_count() or 1)


class Key(NamedTuple):
    """What a verdict holds for."""

    gpu: str
    triton: str
    sources: str  # hash of every Python file of `kernels`, and of those that hold the checks


def key_of(device: torch.device) -> Key:
    """The key of a machine's device."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    sources = sources_hash(Path(kernels.__file__).parent) + sources_hash(Path(checks.__file__), Path(problems.__file__))
    return Key(gpu, triton_version() or "none", sources)


def sources_hash(*places: Path) -> str:
    """A hash of the names and contents of files, and of all Python files below folders."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(place.parent).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where verdicts lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-mixers" / "doctor"


def cache_file(key: Key) -> Path:
    """The file of a key."""
    return cache_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"


def load(key: Key) -> dict[str, Result]:
    """The known results by label; none where there is no file, or one that cannot be read or is of another key."""
    try:
        content = json.loads(cache_file(key).read_text(encoding="utf-8"))
        if Key(*content["key"]) != key:
            return {}
        found = {label: Result(label, passed is True, worst, str(note)) for label, (passed, worst, note) in content["results"].items()}
        return {label: result for label, result in found.items() if not result.passed or _is_error(result.worst)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _is_error(worst: object) -> bool:
    return worst is None or (isinstance(worst, float | int) and math.isfinite(worst))


def save(key: Key, results: Iterable[Result]) -> bool:
    """Adds results to those that are known. False where nothing can be written: then they are found afresh the next time."""
    known = load(key) | {result.label: result for result in results}
    content = {"key": key, "results": {label: (r.passed, r.worst, r.note) for label, r in known.items()}}
    file = cache_file(key)
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        print(f"the verdict could not be kept ({error.strerror}: {file}): the checks will run again the next time", file=sys.stderr)
        return False
    return True


@contextmanager
def one_at_a_time(key: Key) -> Iterator[None]:
    """Lets one process of this key prove at a time, and the others wait: runs that start together need what the first of them finds.

    Where no file can be locked, they do not wait for each other.
    """
    with ExitStack() as held:
        try:
            import fcntl  # Unix has it

            cache_folder().mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(cache_file(key).with_suffix(".lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another process is checking the kernels of this GPU: waiting for what it finds", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def attempts(trials: Sequence[Trial], device: torch.device) -> Generator[Result, None, None]:
    """The results of trials, one after the other. On a GPU several processes share them: nearly all the time goes into compiling."""
    if device.type == "cuda" and PROCESSES > 1 and len(trials) > 1:
        yield from in_processes(trials, device, min(PROCESSES, len(trials)))
    else:
        yield from (checks.attempt(trial, device) for trial in trials)


def in_processes(trials: Sequence[Trial], device: torch.device, processes: int) -> Generator[Result, None, None]:
    """As `attempts`. A trial that computed nothing is tried again in this process: others may find no room on the GPU. A wrong result stays one."""
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(device,))
    try:
        # what takes longest to compile first: float32 is split into three products
        longest = sorted(trials, key=lambda trial: (trial.size, trial.dtype.itemsize), reverse=True)
        futures = {trial: pool.submit(_attempt, (trial.check.op, trial.check.name, *trial[1:]), device) for trial in longest}
        for trial in trials:
            try:
                result = futures[trial].result()
            except BrokenProcessPool:
                result = None
            yield checks.attempt(trial, device) if result is None or (not result.passed and result.worst is None) else result
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(device: torch.device) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _attempt(names: tuple[str, str, int, torch.dtype, int | None], device: torch.device) -> Result:
    return checks.attempt(checks.find(*names), device)


def prove(
    trials: Iterable[Trial],
    device: torch.device,
    *,
    recheck: bool = False,
    say: Say | None = None,
) -> list[Result]:
    """The results of trials, known or found now. `say` is called with each and whether it was known.

    Only passed trials count as known: one that failed is tried again.
    """
    key, trials, results = key_of(device), list(trials), []
    kept = device.type == "cuda"  # the reference takes seconds

    def passed() -> dict[str, Result]:
        return {label: result for label, result in load(key).items() if result.passed} if kept and not recheck else {}

    missing = not passed().keys() >= {trial.label for trial in trials}
    with one_at_a_time(key) if kept and missing else nullcontext():
        known = passed()
        fresh = attempts([trial for trial in trials if trial.label not in known], device)
        try:
            for trial in trials:
                result = known[trial.label] if trial.label in known else next(fresh)
                if say is not None:
                    say(result, trial.label in known)
                results.append(result)
        finally:  # what was found is kept when Ctrl-C ends the rest
            fresh.close()
            if kept:
                save(key, results)
    return results
