"""Loggers without a way to end a training: where TensorBoard's events or metrics.csv cannot be written any more that is said once."""

from __future__ import annotations

import csv
import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@final
class Events(TensorBoardLogger):
    """A TensorBoardLogger that stops logging, with one line, when the disk is full. metrics.csv has the same numbers."""

    _stopped = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if threading.excepthook is not _without_full_disk:
            _others.append(threading.excepthook)
            threading.excepthook = _without_full_disk

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._attempt(lambda: super(Events, self).log_metrics(metrics, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(lambda: super(Events, self).log_hyperparams(*args, **kwargs))

    def save(self) -> None:
        self._attempt(super().save)

    def finalize(self, status: str) -> None:
        self._attempt(lambda: super(Events, self).finalize(status))

    def _attempt(self, act: Callable[[], None]) -> None:
        if self._stopped:
            return
        try:
            act()
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # Lightning takes any error for a value that cannot be logged
            if not isinstance(cause, OSError) or cause.errno not in FULL:
                raise
            self._stopped = True
            print(f"log: TensorBoard's events are not written any more: {cause.strerror}; training goes on", file=sys.stderr, flush=True)


_others: list[Callable[[Any], Any]] = []


def _without_full_disk(failed: threading.ExceptHookArgs) -> None:
    """Leaves out the traceback of the thread that writes events; its error reaches the next call of the logger."""
    error = failed.exc_value
    if not (isinstance(error, OSError) and error.errno in FULL and "tensorboard" in type(failed.thread).__module__):
        _others[0](failed)


@final
class Metrics(CSVLogger):
    """A CSVLogger that keeps rows in memory while the disk is full, with one line, and writes them as soon as there is room.

    metrics.csv holds whole rows alone, and never fewer than before an attempt.
    """

    _said = False

    @rank_zero_only
    def save(self) -> None:
        rows = self.experiment.metrics
        if not rows:
            return
        keys = sorted({*self.experiment.metrics_keys}.union(*rows))
        file = Path(self.experiment.metrics_file_path)
        try:
            if keys == self.experiment.metrics_keys and file.exists():
                _append(file, _table(rows, keys))
            else:
                _rewrite(file, rows, keys)
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self._said:
                self._said = True
                kept = "its rows are kept in memory until they can be; training goes on"
                print(f"log: {file.name} cannot be written: {error.strerror}; {kept}", file=sys.stderr, flush=True)
            return
        self.experiment.metrics, self.experiment.metrics_keys = [], keys


def _table(rows: Iterable[Mapping[str, Any]], keys: list[str], *, header: bool = False) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=keys)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _append(file: Path, content: bytes) -> None:
    """Adds to a file all of it or nothing."""
    size = file.stat().st_size
    try:
        with file.open("ab") as opened:
            opened.write(content)
    except OSError:
        os.truncate(file, size)  # of half a row there may be some
        raise


def _rewrite(file: Path, rows: list[dict[str, float]], keys: list[str]) -> None:
    """Writes a table that has other columns than before, beside its place: rows that are on the disk stay there if it is full."""
    before: list[dict[str, str]] = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as opened:
            before = list(csv.DictReader(opened))
    scratch = file.with_name(f".{file.name}.part")
    try:
        scratch.write_bytes(_table([*before, *rows], keys, header=True))
        scratch.replace(file)
    except OSError:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
