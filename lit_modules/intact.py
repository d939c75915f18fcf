"""Whether a checkpoint is what was written: every byte of it is read. torch.load looks at no checksum, and loads flipped bits without a word."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from lit_modules.checkpoint import read_checkpoint, read_header
from lit_modules.sharded import META, read_index
from mixers.errors import ConfigError


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
            content = shard.read(place.length)
        if content.startswith(b"PK"):  # a tensor; the few numbers of an optimizer that are none have no checksum
            _check_archive(io.BytesIO(content), f"{source}/{place.relative_path}")


def _check_archive(file: BinaryIO | io.BytesIO, source: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise ConfigError(f"{source}: is truncated, or not a checkpoint ({error})") from error
    if damaged is not None:
        raise ConfigError(f"{source}: is damaged: {damaged} does not match its checksum")


def last_good(candidates: Iterable[Path]) -> str:
    """The newest of some checkpoints that is whole, in words for the end of an error; empty if none is."""
    there = [path for path in {*candidates} if path.exists()]
    for path in sorted(there, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            check_intact(path, str(path))
            content = read_checkpoint(path / META if path.is_dir() else path)
            _, tokens = read_header({"state_dict": {}, **content}, str(path))
        except ConfigError:
            continue
        return f"; the last good checkpoint is {path} (step {content.get('global_step', 0):,}, {tokens:,} tokens)"
    return ""
