"""Sharded checkpoints: folders of torch.distributed.checkpoint in which each process of a training has left a file; and one checkpoint from all."""

from __future__ import annotations

import pickle
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lit_modules.checkpoint import read_checkpoint
from mixers.errors import ConfigError

META = "meta.pt"  # Lightning's name for the file with all that is no tensor
INDEX = ".metadata"  # torch's, for what lies where: a pickle, which has no checksum of its own
CHECKSUM = "metadata.crc32"  # of INDEX, in hexadecimal digits; written last


def seal(folder: Path) -> None:
    """Writes the checksum of the index. All else in a sharded checkpoint is an archive that has its own."""
    (folder / CHECKSUM).write_text(_crc32((folder / INDEX).read_bytes()))


def _crc32(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


def read_index(folder: Path, source: str) -> Metadata:
    """What lies where in a sharded checkpoint, all of which is there.

    Args:
        folder: the checkpoint.
        source: what errors call it.

    Raises:
        ConfigError: no folder, no sharded checkpoint, or one with a missing or truncated file or a damaged index.
    """
    if not folder.is_dir():
        raise ConfigError(f"{source}: is not a folder; a sharded checkpoint is one" if folder.exists() else f"{source}: no such folder")
    for name in (META, INDEX, CHECKSUM):
        if not (folder / name).is_file():
            raise ConfigError(f"{source}: is no sharded checkpoint, or one that was never finished (it holds no {name})")
    try:
        if _crc32((folder / INDEX).read_bytes()).encode() != (folder / CHECKSUM).read_bytes():
            raise ConfigError(f"{source}: is damaged: its {INDEX} does not match its checksum")
        index: Metadata = FileSystemReader(folder).read_metadata()
        ends: dict[str, int] = {}
        for place in (index.storage_data or {}).values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError, IndexError, KeyError, OSError) as error:
        raise ConfigError(f"{source}: its {INDEX} cannot be read: {error}") from error
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            raise ConfigError(f"{source}: the shard {name} is missing (it has {len(ends)})")
        if file.stat().st_size < end:
            raise ConfigError(f"{source}: the shard {name} is truncated: it has {file.stat().st_size:,} bytes and needs {end:,}")
    return index


def read_sharded(folder: Path, source: str) -> dict[str, Any]:
    """The whole checkpoint, in memory, as one device would have saved it.

    Raises:
        ConfigError: see `read_index`; or it cannot be read.
    """
    index = read_index(folder, source)
    values: dict[str, Any] = {}
    for key, about in index.state_dict_metadata.items():
        values[key] = torch.empty(about.size, dtype=about.properties.dtype) if isinstance(about, TensorStorageMetadata) else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which `no_dist` has asked for
            load(values, storage_reader=FileSystemReader(folder), no_dist=True)
    except CheckpointException as error:  # no Exception, and of many lines
        raise ConfigError(f"{source}: cannot be read: {next(iter(error.failures.values()))[0]}") from error
    weights: dict[str, Any] = {}
    optimizers: dict[str, dict[str, Any]] = {}
    for key, (top, *path) in (index.planner_data or {}).items():
        if top == "state_dict":
            weights[".".join(path)] = values[key]
        else:  # optimizer_0, state, name of the parameter, exp_avg; or optimizer_0, param_groups, 1, lr
            kind, which, field = path
            optimizers.setdefault(top, {"state": {}, "param_groups": {}})[kind].setdefault(which, {})[field] = values[key]
    states = [numbered({**state, "param_groups": [*state["param_groups"].values()]}) for _, state in sorted(optimizers.items())]
    return {**read_checkpoint(folder / META), "state_dict": weights, **({"optimizer_states": states} if states else {})}


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with parameters by number, in the order of the groups, as torch's optimizers have it; `state` has them by name."""
    numbers = {name: i for i, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    return _renamed(state, numbers)


def named(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse of `numbered`, for parameters of these names."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    return _renamed(state, dict(zip(numbers, names, strict=True)))


def _renamed(state: Mapping[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [new[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {new[key]: values for key, values in state["state"].items()}, "param_groups": groups}
