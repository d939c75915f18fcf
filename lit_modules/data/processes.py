"""Calls of one function in several processes, which never outlive the one that started them."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from mixers.errors import ConfigError

Item = TypeVar("Item")
Answer = TypeVar("Answer")
AHEAD = 2  # items that a process has been given at a time, so that it need not wait for its next


def unordered(function: Callable[[Item], Answer], items: Iterable[Item], workers: int) -> Generator[Answer, None, None]:
    """function(item) of every item, in the order in which they become ready; in this process if `workers` is 0.

    The function is sent once to each worker. What it raises is raised here. Workers end with this process, also when it is
    killed, and when the caller stops asking.

    Raises:
        ConfigError: a worker was killed.
    """
    if not workers:
        yield from map(function, items)
        return
    context = get_context("spawn")  # a fork would inherit locks, and the other workers' pipes
    waiting = iter(items)
    pipes: dict[Connection, int] = {}  # and how many items each has been given that it has not answered
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function), daemon=True)
            with _without_interrupts():
                process.start()
            theirs.close()
            processes.append(process)
            pipes[ours] = 0
        for pipe in [pipe for _ in range(AHEAD) for pipe in pipes]:
            pipes[pipe] += _give(pipe, waiting)
        while any(pipes.values()):
            ready = connection.wait([pipe for pipe, given in pipes.items() if given])
            for pipe in [pipe for pipe in pipes if pipe in ready]:
                answer = _receive(pipe)
                pipes[pipe] += _give(pipe, waiting) - 1
                yield answer
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started now never hears Ctrl-C, which is its parent's to answer; the parent hears it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _give(pipe: Connection, waiting: Iterator[Item]) -> int:
    """Sends the next item, if there is one; how many were sent."""
    for item in waiting:
        try:
            pipe.send(item)
        except BrokenPipeError as error:
            raise _killed() from error
        return 1
    return 0


def _receive(pipe: Connection) -> Any:
    try:
        error, answer = pipe.recv()
    except (EOFError, ConnectionResetError) as ended:
        raise _killed() from ended
    if error is not None:
        raise error
    return answer


def _killed() -> ConfigError:
    return ConfigError(
        "workers: a worker process was killed (out of memory?); what is finished is kept: give the same command again, with fewer --workers"
    )


def _serve(pipe: Connection, function: Callable[[Item], Answer]) -> None:
    """A worker: answers items until there are no more, or its parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[Exception | None, Any] = None, function(item)
        except MemoryError:
            raise  # as if the system had ended this process, which is what comes next: fewer workers mend both
        except Exception as error:  # a worker that ended with it would pass for one that was killed
            answer = _sendable(error), None
        pipe.send(answer)


def _sendable(error: Exception) -> Exception:
    """An error as another process can raise it, with its traceback, which stays behind otherwise."""
    if isinstance(error, ConfigError):
        return error
    where = f"in a worker process:\n{''.join(traceback.format_exception(error))}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does in there
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(where)
    return error


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
