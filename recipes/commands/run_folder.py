"""The folder of a run: every `fit` makes a new one, for its config, receipt, metrics, checkpoints, curve and sample."""

from __future__ import annotations

from datetime import datetime
from itertools import count
from pathlib import Path

from mixers.errors import ConfigError

CHECKPOINTS = "checkpoints"
CONFIG, RECEIPT, METRICS = "config.yaml", "receipt.json", "metrics.csv"


def default_root(configs: list[Path]) -> str:
    """Where the runs of some configs lie: `runs/quickstart`."""
    return f"runs/{'-'.join(file.stem for file in configs) or 'default'}"


def make_run_folder(root: str) -> Path:
    """A new folder in `root`, named by the time.

    Raises:
        ConfigError: it cannot be written.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in count(1):
        folder = Path(root).expanduser() / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_dir():  # a run that began in the same second
                continue
            raise _not_writable(root, "a file of this name is in the way") from None
        except OSError as error:
            raise _not_writable(root, error.strerror or str(error)) from error
        return folder
    raise AssertionError("count() has no end")


def _not_writable(root: str, reason: str) -> ConfigError:
    return ConfigError(f"trainer.default_root_dir: a folder for the run cannot be made in {root}: {reason}")
