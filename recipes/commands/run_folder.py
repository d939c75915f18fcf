"""The folder of a run: every `fit` makes a new one, for its config, receipt, metrics, checkpoints, curve and sample."""

from __future__ import annotations

import os
import shutil
import tempfile
from datetime import datetime
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

from lit_modules.paths import given_path
from mixers.errors import ConfigError

CHECKPOINTS = "checkpoints"
STAMP = "%Y-%m-%d_%H-%M-%S"  # of when a run began, its folder's name
CONFIG, RECEIPT, METRICS = "config.yaml", "receipt.json", "metrics.csv"


def default_root(configs: list[Path]) -> str:
    """Where the runs of some configs lie: `runs/quickstart`."""
    return f"runs/{'-'.join(file.stem for file in configs) or 'default'}"


class RunFolder(NamedTuple):
    """A new folder, and what was made with it."""

    path: Path
    around: list[Path]  # the folders that were made to hold it, the innermost first

    def remove(self) -> None:
        """Takes away the folder, and those around it while nothing else lies in them."""
        shutil.rmtree(self.path, ignore_errors=True)
        _remove_empty(self.around)


def make_run_folder(root: str) -> RunFolder:
    """A new folder in `root`, named by the time.

    Raises:
        ConfigError: it cannot be made; nothing is left of the attempt.
    """
    stamp, parent = datetime.now().strftime(STAMP), given_path(root, "trainer.default_root_dir")
    around = _missing(parent)
    for number in count(1):
        folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_dir():  # a run that began in the same second
                continue
            raise _not_writable(root, "a file of this name is in the way") from None
        except (OSError, ValueError) as error:  # ValueError: a name that no system takes
            _remove_empty(around)
            raise _not_writable(root, getattr(error, "strerror", None) or str(error)) from error
        return RunFolder(folder, around)
    raise AssertionError("count() has no end")


def check_writable(folder: str | Path, key: str) -> None:
    """ConfigError unless a file with something in it can be written to a folder that may not be there yet; nothing is left of the attempt."""
    path = given_path(folder, key)
    made = _missing(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"can be written")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {folder} cannot be written to: {getattr(error, 'strerror', None) or error}") from error
    finally:
        _remove_empty(made)


def _missing(folder: Path) -> list[Path]:
    """The folders that have to be made for one to be there, itself included, the innermost first."""
    return [*takewhile(lambda path: not os.path.lexists(path), (folder, *folder.parents))]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it was not made, or something has come into it
            continue


def _not_writable(root: str, reason: str) -> ConfigError:
    return ConfigError(f"trainer.default_root_dir: a folder for the run cannot be made in {root}: {reason}")
