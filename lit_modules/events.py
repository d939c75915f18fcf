"""TensorBoard's events without a way to end a training: where they cannot be written any more that is said once."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, final

from lightning.pytorch.loggers import TensorBoardLogger

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
