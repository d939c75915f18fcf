"""Checkpoints that a command line names: found, and read before Lightning sees them.

Lightning starts from scratch, with a mere warning, where `last` finds nothing; and its `LightningCLI` lets the settings in a checkpoint
override all others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_modules.checkpoint import check_same_model, check_tensors, read_checkpoint, read_header
from lit_modules.decoder_lm import DecoderLM
from mixers.errors import ConfigError
from recipes.commands.config_files import Request, merge
from recipes.commands.run_folder import CHECKPOINTS, default_root

LAST = "last"
TRAINING = ("optimizer_states", "lr_schedulers", "loops", "global_step")  # what Lightning needs to go on


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
    settings, _ = read_header(_content(path), f"ckpt_path: {path}")
    return {name: value for name, value in settings.items() if name != "seed"}


def _content(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; of a sharded one everything but the tensors, which is in one file."""
    if not path.is_dir():
        return read_checkpoint(path)
    file = path / "meta.pt"
    if not file.is_file():
        raise ConfigError(f"ckpt_path: the folder {path} is no sharded checkpoint (it holds no {file.name})")
    return {"state_dict": {}, **read_checkpoint(file)}


def with_checkpoint(request: Request, *, any_run: bool = False) -> tuple[Request, Path | None]:
    """The request with the model of its checkpoint beneath its own settings, and the checkpoint (None if it names none).

    Args:
        request: what the command line asks for.
        any_run: `last` without a config or a root is the newest of all in runs/.
    """
    given = request.option("ckpt_path")
    if given in (None, "null"):
        return request, None
    root = request.option("trainer.default_root_dir")
    roots = [*Path("runs").glob("*")] if any_run and not root and not request.files else [Path(root or default_root(request.files))]
    path = find_checkpoint(str(given), *roots)
    return request._replace(config=merge({"model": {"lm": model_settings(path)}}, request.config)), path


def check_model(path: Path, lm: DecoderLM) -> None:
    """ConfigError unless the checkpoint holds the parameters of `lm`. The tensors of a sharded one are not looked at."""
    check_same_model({**model_settings(path), "seed": None}, lm.settings, f"the checkpoint {path}")
    if not path.is_dir():
        check_tensors(_content(path)["state_dict"], lm, f"ckpt_path: {path}")


def check_resumable(path: Path, max_tokens: int) -> None:
    """ConfigError unless training can go on from the checkpoint, up to `max_tokens`."""
    content = _content(path)
    _, tokens = read_header(content, f"ckpt_path: {path}")
    if tokens >= max_tokens:
        raise ConfigError(f"ckpt_path: the checkpoint has already seen {tokens:,} of {max_tokens:,} tokens; raise model.max_tokens")
    for key in TRAINING if not path.is_dir() else ():
        if key not in content:
            raise ConfigError(f"ckpt_path: {path} has no {key}: it holds weights only, training cannot go on from it")


def run_config(path: Path) -> Path | None:
    """The config of the run that wrote a checkpoint, while it lies where that run left it."""
    folders = list(path.absolute().parents)[:2]
    return next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
