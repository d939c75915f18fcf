"""What a checkpoint says about its model, and the model from a checkpoint alone."""

from __future__ import annotations

import copy
import inspect
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_modules.decoder_lm import DecoderLM, cycle_layout
from lit_modules.paths import given_path
from mixers import registry
from mixers.errors import ConfigError

FORMAT = 1
HEADER = "lightning_mixers"  # the key of {"format": FORMAT, "tokens": tokens seen in training}
SETTINGS = "lm"  # the key of the model's settings
PREFIX = "lm."  # of its tensors' names
TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("vocab_size", "d_model", "n_layers", "mlp_width", "seed"), int),
    **dict.fromkeys(("norm_eps", "init_std"), (int, float)),
    "layout": list,
    "mixers": dict,
}


def write_header(checkpoint: dict[str, Any], lm: DecoderLM, tokens: int) -> None:
    """Put the format, the tokens seen and the settings of `lm` into a checkpoint, as plain values."""
    checkpoint[HEADER] = {"format": FORMAT, "tokens": tokens}
    checkpoint[SETTINGS] = copy.deepcopy(lm.settings)


def read_header(checkpoint: Mapping[str, Any], source: str) -> tuple[dict[str, Any], int]:
    """The model's settings and the tokens seen.

    Args:
        checkpoint: the contents of a file.
        source: what errors call it, such as its path.

    Raises:
        ConfigError: a key is missing or of a wrong type, or a later version of this project wrote it.
    """
    for key in (HEADER, SETTINGS, "state_dict"):
        if not isinstance(checkpoint.get(key), dict):
            raise ConfigError(f"{source}: is not a checkpoint of lightning-mixers (it has no key {key!r})")
    header, settings = checkpoint[HEADER], checkpoint[SETTINGS]
    for key in ("format", "tokens"):
        if not isinstance(header.get(key), int) or header[key] < 0:
            raise ConfigError(f"{source}: is damaged: {HEADER}.{key} must be a number, got {header.get(key)!r}")
    if header["format"] > FORMAT:
        raise ConfigError(f"{source}: has format {header['format']}, this version reads up to {FORMAT}: update lightning-mixers")
    _check_settings(settings, source)
    return settings, header["tokens"]


def _check_settings(settings: Mapping[str, Any], source: str) -> None:
    legal = inspect.signature(DecoderLM).parameters
    for key in [*(legal.keys() - settings.keys()), *(settings.keys() - legal.keys())]:
        if key not in legal or legal[key].default is inspect.Parameter.empty:
            raise ConfigError(f"{source}: the setting lm.{key} is {'unknown' if key in settings else 'missing'}")
    for key, value in settings.items():
        nested, inner = (value, str) if key == "layout" else (value.values(), dict) if isinstance(value, dict) else ((), object)
        if not isinstance(value, TYPES[key]) or not all(isinstance(entry, inner) for entry in nested):
            raise ConfigError(f"{source}: is damaged: the setting lm.{key} is {value!r}")


def check_tensors(state: Mapping[str, Any], lm: DecoderLM, source: str) -> None:
    """Raises ConfigError, naming the first difference, unless a checkpoint's tensors have the names and shapes of those of `lm`."""
    own = {f"{PREFIX}{name}": value.shape for name, value in lm.state_dict().items()}
    for name, shape in own.items():
        if not isinstance(state.get(name), torch.Tensor):
            raise ConfigError(f"{source}: is damaged: it has no tensor {name}")
        if state[name].shape != shape:
            raise ConfigError(f"{source}: is damaged: {name} has the shape {list(state[name].shape)}, the model needs {list(shape)}")
    for name in state:
        if name not in own:
            raise ConfigError(f"{source}: has the tensor {name}, which the model has not")


def check_same_model(saved: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Raises ConfigError, naming the first difference, unless the settings of two models give the same parameters and function.

    Initial values (`seed`, `init_std`), names of aliases, and settings of mixers that no layer uses may differ.
    """
    for key in ("vocab_size", "d_model", "n_layers", "mlp_width", "norm_eps"):
        _same(f"model.lm.{key}", saved.get(key), own[key], source)
    names = [cycle_layout(settings["layout"], own["n_layers"]) for settings in (saved, own)]
    for saved_name, own_name in dict.fromkeys(zip(*names, strict=True)):
        try:
            saved_class, saved_settings = registry.resolve(saved_name, saved.get("mixers") or {})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
        own_class, own_settings = registry.resolve(own_name, own["mixers"])
        if saved_class is not own_class:
            _same("model.lm.layout", saved["layout"], own["layout"], source)
        for key, value in own_settings.items():
            if key == "backend":  # says how a mixer computes, not what
                continue
            _same(f"model.lm.mixers.{own_name}.{key}", saved_settings[key], value, source)


def _same(key: str, saved: object, own: object, source: str) -> None:
    if saved != own:
        raise ConfigError(f"{key}: {source} has {saved!r}, the model has {own!r}; a checkpoint fits its own model only")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, tensors mapped into memory and read when they are used.

    Raises:
        ConfigError: missing, a folder, not a checkpoint or a truncated one; one line that names the path.
    """
    path = given_path(path, "checkpoint")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; of a sharded checkpoint `python -m recipes consolidate {path}` makes the one file that is needed")
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint")
    if not zipfile.is_zipfile(path):  # what torch.save writes; the directory is at the end, so a truncated file has none
        raise ConfigError(f"{path}: is truncated, or not a checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, where the bytes are not what was written
        raise ConfigError(f"{path}: cannot be read as a checkpoint: {next(iter(str(error).splitlines()), type(error).__name__)}") from error
    if not isinstance(checkpoint, dict):
        raise ConfigError(f"{path}: is not a checkpoint of lightning-mixers (it holds a {type(checkpoint).__name__})")
    return checkpoint


def load_lm(path: str | Path, device: torch.device | str = "cpu") -> DecoderLM:
    """The model of a checkpoint file, in the dtypes it was saved in and in evaluation mode. Nothing but the file is needed.

    Raises:
        ConfigError: the file cannot be read, is no checkpoint of this project, or needs a mixer that is not installed.
    """
    checkpoint = read_checkpoint(path)
    settings, _ = read_header(checkpoint, str(path))
    for mixer in (settings.get("mixers") or {}).values():
        if mixer.get("backend") == "mamba_ssm":  # which package trained it does not bind who reads it
            mixer["backend"] = "auto"
    try:
        with torch.device("meta"):
            lm = DecoderLM(**settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    tensors = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, torch.Tensor)}
    state = {name.removeprefix(PREFIX): value.to(device, copy=True) for name, value in tensors.items() if name.startswith(PREFIX)}
    try:
        lm.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{path}: its tensors do not fit its settings: {' '.join(str(error).split())}") from error
    return lm.eval()
