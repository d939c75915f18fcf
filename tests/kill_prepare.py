"""`python tests/kill_prepare.py SOURCE FOLDER`: prepares SOURCE again and again, killed with SIGKILL before every change of a file in turn.

The process that goes on is killed too, after one change more; a third one finishes. Prints a line a turn: its number, whether the first two were
killed, how many units they left to the third, and whether the shards are those of a process that nobody killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shard_cases import SETTINGS, content_of, prepared

from lit_modules.data import sources

sources.UNIT_BYTES = 500
os.fsync = lambda _: None  # slow, and what it is for is not tried here
FEW = SETTINGS._replace(shard_tokens=500)
CHANGES = ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree"))


def killed_at(number: int) -> None:
    """This process ends before its change number `number`."""
    left = [number]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **named)

        return counted

    for owner, name in CHANGES:
        setattr(owner, name, wrap(getattr(owner, name)))


def run_until(number: int, source: Path, folder: Path) -> bool:
    """Whether a process of its own was killed."""
    process = os.fork()
    if not process:
        killed_at(number)
        prepared(folder, source, FEW)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def main(source: Path, folder: Path) -> None:
    prepared(folder / "whole", source, FEW)
    whole = content_of(folder / "whole")
    number, killed = 0, True
    while killed:
        torn = folder / f"torn{number}"
        killed = run_until(number, source, torn)
        again = killed and run_until(number + 1, source, torn)
        left = len([*torn.glob(".prepare/*.part")]) if torn.is_dir() else 0
        prepared(torn, source, FEW)
        print(number, killed, again, left, content_of(torn) == whole)
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
