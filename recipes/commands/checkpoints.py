"""Checkpoints that a command line names: found, and read before Lightning sees them.

Lightning starts from scratch, with a mere warning, where `last` finds nothing; and its `LightningCLI` lets the settings in a checkpoint
override all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_modules.checkpoint import SETTINGS, check_same_model, read_checkpoint, read_header
from mixers.errors import ConfigError
from recipes.commands.config_files import Request, merge
from recipes.commands.run_folder import CHECKPOINTS, default_root

LAST = "last"


def find_checkpoint(path: str, *roots: Path) -> Path:
    """The file or folder of a checkpoint; `last` is the newest `last.ckpt` of the runs in `roots`.

    Raises:
        ConfigError: there is none.
    """
    if path != LAST:
        found = Path(path).expanduser()
        if not found.exists():
            raise ConfigError(f"ckpt_path: {path} does not exist (legal: a checkpoint, or last)")
        return found
    runs = [file for root in roots for file in root.glob(f"*/{CHECKPOINTS}/last.ckpt")]
    if not runs:
        raise ConfigError(f"ckpt_path: no run in {', '.join(map(str, roots)) or 'runs'} has a last.ckpt to go on from")
    return max(runs, key=lambda file: file.stat().st_mtime)


def model_settings(path: Path) -> dict[str, Any]:
    """The settings of the model in a checkpoint, without its seed.

    Raises:
        ConfigError: the checkpoint is damaged or none of ours.
    """
    if path.is_dir():  # sharded: everything but the tensors is in one file
        settings = _sharded_settings(path / "meta.pt")
    else:
        settings, _ = read_header(read_checkpoint(path), f"ckpt_path: {path}")
    return {name: value for name, value in settings.items() if name != "seed"}


def _sharded_settings(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ConfigError(f"ckpt_path: the folder {file.parent} is no sharded checkpoint (it holds no {file.name})")
    content = torch.load(file, map_location="cpu", weights_only=True)
    settings = content.get(SETTINGS)
    if not isinstance(settings, dict):
        raise ConfigError(f"ckpt_path: {file.parent} is not a checkpoint of lightning-mixers")
    return settings


def with_checkpoint(request: Request) -> tuple[Request, Path | None]:
    """The request with the model of its checkpoint beneath its own settings, and the checkpoint (None if it names none)."""
    given = request.option("ckpt_path")
    if given in (None, "null"):
        return request, None
    path = find_checkpoint(str(given), Path(request.option("trainer.default_root_dir") or default_root(request.files)))
    return request._replace(config=merge({"model": {"lm": model_settings(path)}}, request.config)), path


def check_model(path: Path, settings: Mapping[str, Any]) -> None:
    """ConfigError unless the checkpoint holds the parameters of the model with `settings`."""
    check_same_model({**model_settings(path), "seed": None}, settings, f"the checkpoint {path}")


def run_config(path: Path) -> Path | None:
    """The config of the run that wrote a checkpoint, while it lies where that run left it."""
    folders = list(path.absolute().parents)[:2]
    return next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
