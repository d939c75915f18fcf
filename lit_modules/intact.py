"""Files and folders of checkpoints that are whole or not there, and whether one is what was written: then every byte of it is read.

torch.load looks at no checksum, and loads flipped bits without a word.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.api import CheckpointException

from lit_modules.checkpoint import read_checkpoint, read_header
from lit_modules.data.shards import sync
from lit_modules.sharded import META, read_index, seal
from mixers.errors import ConfigError

# Written


def write_file(checkpoint: dict[str, Any], target: Path) -> None:
    """Writes a checkpoint of one file: all of it, on the disk, or nothing.

    Raises:
        OSError: the system refused; what was at `target` is still there.
    """
    part = part_of(target)
    try:
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            sync(file)
        replace(part, target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        raise system_error(error) or error from None


def part_of(target: Path) -> Path:
    """Where a checkpoint is written before it is whole. `glob` and `ls` pass over it."""
    return target.with_name(f".{target.name}.part")


def finish_folder(part: Path, target: Path) -> None:
    """Finishes a sharded checkpoint, forces it to the disk, and puts it in its place."""
    seal(part)
    for file in part.iterdir():
        with file.open("rb+") as content:
            sync(content)
    _sync_folder(part)
    replace(part, target)


def old_of(target: Path) -> Path:
    """Where a folder is while another one takes its place: no system has a call for that which is one step."""
    return target.with_name(f"{target.stem}.old{target.suffix}")


def replace(part: Path, target: Path) -> None:
    """Puts a file or folder in the place of another. Of a folder there is a moment without `target`; see `old_of`."""
    old = old_of(target) if target.is_dir() else None
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    part.rename(target) if part.is_dir() else part.replace(target)
    _sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old)


def link(source: Path, target: Path) -> None:
    """Gives a checkpoint a second name, in place of what has it now; copies it where the file system has no hard links.

    No one ever writes into a checkpoint: each is written under the name of `part_of`. What a kill leaves here has another one, for that would be
    written over.
    """
    part = target.with_name(f".{target.name}.link.part")
    try:
        _remove(part)
        if source.is_dir():
            part.mkdir()
            for file in source.iterdir():
                _link_file(file, part / file.name)
            _sync_folder(part)
        else:
            _link_file(source, part)
        replace(part, target)
    finally:
        _remove(part)  # where it failed, or the two were one file already: then the system renames nothing


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as whole, target.open("xb") as file:
            shutil.copyfileobj(whole, file, 2**24)
            sync(file)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def system_error(error: BaseException) -> OSError | None:
    """The system's error behind another: torch's writer hides it behind a RuntimeError, the distributed one behind a list."""
    seen: list[BaseException | None] = [error]
    while seen:
        found = seen.pop()
        if isinstance(found, OSError):
            return found
        if isinstance(found, CheckpointException):
            seen += [wrapped for wrapped, _ in found.failures.values()]
        if found is not None:
            seen += [found.__cause__, found.__context__]
    return None


# Read


def check_intact(path: Path, source: str) -> None:
    """Reads a checkpoint, one file or the folder of a sharded one, and compares it with the checksums in it.

    Args:
        path: the checkpoint.
        source: what errors call it.

    Raises:
        ConfigError: it is missing, truncated or damaged.
    """
    if not path.exists():
        raise ConfigError(f"{source}: does not exist")
    try:
        _check(path, source)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror or error}") from error


def _check(path: Path, source: str) -> None:
    if not path.is_dir():
        with path.open("rb") as file:
            _check_archive(file, source)
        return
    index = read_index(path, source)
    with (path / META).open("rb") as file:
        _check_archive(file, f"{source}/{META}")
    for place in (index.storage_data or {}).values():
        with (path / place.relative_path).open("rb") as shard:
            shard.seek(place.offset)
            _check_archive(io.BytesIO(shard.read(place.length)), f"{source}/{place.relative_path}")


def _check_archive(file: BinaryIO | io.BytesIO, source: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # what a flipped bit in a header leads zipfile to: encryption, other compressions, sizes beyond memory
        raise ConfigError(f"{source}: is truncated, or not a checkpoint ({error})") from error
    if damaged is not None:
        raise ConfigError(f"{source}: is damaged: {damaged} does not match its checksum")


def last_good(candidates: Mapping[str, list[Path]]) -> str:
    """The newest checkpoint that is whole, in words for the end of an error; empty if none is.

    Args:
        candidates: by what they are to be called (`of this run`, ..); of the first kind that has a whole one.
    """
    for kind, paths in candidates.items():
        there = [(path.stat().st_mtime, path.name == "last.ckpt", path) for path in {*paths} if path.exists()]
        for *_, path in sorted(there, reverse=True):
            try:
                check_intact(path, str(path))
                content = read_checkpoint(path / META if path.is_dir() else path)
                _, tokens = read_header({"state_dict": {}, **content}, str(path))
            except ConfigError:
                continue
            step = f"step {content.get('global_step', 0):,}, {tokens:,} tokens"
            return f"; the last good checkpoint {kind}is {path} ({step})"
    return ""
