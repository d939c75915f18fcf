"""Whether the bytes of shards are those of their index: what a training trusts, and what `prepare --check` reads through.

A file is read once. That it had its checksum is remembered in the user's cache folder, for as long as its size, times and checksum in the index stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from lit_modules.data.shards import AGAIN, STARTS, Index, Shard, check_sizes, files_of, hash_of, out_of_range, replace_file
from mixers.errors import ConfigError

SECONDS = 120.0  # in which files are begun to be read before a training; less than any process that waits gives up after
THREADS = min(8, os.cpu_count() or 1)  # hashlib lets them run side by side
BLOCK = 2**24  # bytes read at a time
Stamp = list[int | str]  # size, mtime_ns, ctime_ns, checksum in the index


class Verified(NamedTuple):
    """How many of the files of some shards are known to have the checksums of their index."""

    known: int
    files: int

    def __str__(self) -> str:
        return f"{self.known} of {self.files} files"


@final
class Known:
    """The files of a folder of shards that had their checksums when they were read, by name. A file that cannot be read, or is torn, knows none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self.file = _cache() / "lightning-mixers" / "shards" / f"{hash_of(str(self._folder).encode())[:16]}.json"
        self._stamps: dict[str, Stamp] = {}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(self.file.read_bytes())
            if content["folder"] == str(self._folder):
                self._stamps = {str(name): list(stamp) for name, stamp in content["files"].items()}

    def has(self, name: str, stamp: Stamp) -> bool:
        """Whether a file is known, and has not changed since."""
        return self._stamps.get(name) == stamp

    def add(self, stamps: dict[str, Stamp]) -> None:
        """Remembers files; says so on stderr if that cannot be: then they are read again the next time."""
        if not stamps:
            return
        self._stamps |= stamps
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, json.dumps({"folder": str(self._folder), "files": self._stamps}, indent=1).encode())
        except OSError as error:
            print(f"data: that shards are good could not be kept ({error.strerror or error}: {self.file}): they will be read again", file=sys.stderr)


def _cache() -> Path:
    """The user's cache folder; without a home the one for temporary files."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return Path(tempfile.gettempdir())


def verify(index: Index, key: str = "data.path", say: Callable[[str], object] = lambda _: None) -> Verified:
    """Compares files with the checksums of their index: those that are not known to have them, as many as can be begun in `SECONDS`.

    Args:
        index: of shards whose sizes are right.
        key: what errors call them.
        say: is told what will be read, before much is.

    Raises:
        ConfigError: a file does not have its checksum, or cannot be read. Files that were read before it are remembered.
    """
    known, files = Known(index.folder), list(_files(index))
    stamps = {file.name: _stamp(file, checksum, key) for file, checksum in files}
    unread = [(file, checksum) for file, checksum in files if not known.has(file.name, stamps[file.name])]
    size = sum(int(stamps[file.name][0]) for file, _ in unread)
    if size >= 2**30:
        say(f"{key}: reading {size / 2**30:,.1f} GiB of shards, once, to compare them with their checksums (for {SECONDS:.0f} s at most)")
    until, stop = time.monotonic() + SECONDS, Event()
    good: dict[str, Stamp] = {}

    def read(file: Path, checksum: str) -> None:
        if stop.is_set() or time.monotonic() >= until:
            return
        if (found := _hash(file, key, stop)) is None:
            return
        if found != checksum:
            raise ConfigError(wrong_checksum(file, key))
        if _stamp(file, checksum, key) == stamps[file.name]:  # nobody wrote to it meanwhile
            good[file.name] = stamps[file.name]

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for done in [pool.submit(read, *each) for each in unread]:
                    done.result()
            finally:  # the others need not go on after an error or Ctrl-C
                stop.set()
    finally:
        known.add(good)
    return Verified(len(files) - len(unread) + len(good), len(files))


def _files(index: Index) -> Iterator[tuple[Path, str]]:
    """Every file of an index with its checksum."""
    for shards in index.splits.values():
        for shard in shards:
            yield from zip(files_of(index.folder, shard.name), (shard.tokens_hash, shard.starts_hash), strict=True)


def _stamp(file: Path, checksum: str, key: str) -> Stamp:
    """What changes when a file does. A time of change (ctime) is set by no program, so one that restores mtime is seen too."""
    try:
        about = file.stat()
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error.strerror or error}") from error
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, checksum]


def _hash(file: Path, key: str, stop: Event) -> str | None:
    """The checksum of a file; None if `stop` came before its end."""
    digest, block = hashlib.blake2b(digest_size=16), memoryview(bytearray(BLOCK))
    try:
        with file.open("rb", buffering=0) as content:
            while size := content.readinto(block):
                digest.update(block[:size])
                if stop.is_set():
                    return None
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def wrong_checksum(file: Path, key: str) -> str:
    """The line for a file that is not the one of its index."""
    check = "" if key == "out" else f" (python -m recipes prepare --check --out {shlex.quote(str(file.parent))} reads all of them)"
    return f"{key}: {file} does not have the checksum of its index: it was changed or is corrupt; remove it and {AGAIN}{check}"


def check_shards(index: Index, key: str = "data.path", report: Callable[[Shard], None] = lambda _: None) -> None:
    """Reads everything: sizes, checksums, ids in the vocabulary, a separator where, and only where, a document starts. `verify` knows it then.

    Raises:
        ConfigError: the first file with something wrong.
    """
    known, good = Known(index.folder), dict[str, Stamp]()
    try:
        for split, shards in index.splits.items():
            for shard in shards:
                check_sizes(index, shard, key)
                files = list(_files(index._replace(splits={split: [shard]})))
                before = {file.name: _stamp(file, checksum, key) for file, checksum in files}
                try:
                    _check_content(index, shard, key)
                except OSError as error:
                    raise ConfigError(f"{key}: {error.filename or shard.name} cannot be read: {error.strerror or error}") from error
                good |= {file.name: before[file.name] for file, checksum in files if _stamp(file, checksum, key) == before[file.name]}
                report(shard)
    finally:
        known.add(good)


def _check_content(index: Index, shard: Shard, key: str) -> None:
    tokens_file, starts_file = files_of(index.folder, shard.name)
    starts = np.fromfile(starts_file, STARTS)
    if hash_of(starts.tobytes()) != shard.starts_hash:
        raise ConfigError(wrong_checksum(starts_file, key))
    digest, begin, separators = hashlib.blake2b(digest_size=16), 0, 0
    for tokens in blocks(tokens_file, index.dtype):
        digest.update(tokens.tobytes())
        if int(tokens.max()) >= index.vocab_size:
            raise ConfigError(out_of_range(key, tokens_file, int(tokens.max()), index.vocab_size))
        found = np.flatnonzero(tokens == index.bos_id) + begin
        if not np.array_equal(found, starts[separators : separators + len(found)]):
            raise ConfigError(f"{key}: {tokens_file} has a separator where {starts_file.name} has no document; remove it and {AGAIN}")
        begin, separators = begin + len(tokens), separators + len(found)
    if digest.hexdigest() != shard.tokens_hash:
        raise ConfigError(wrong_checksum(tokens_file, key))
    if separators != shard.documents:
        raise ConfigError(f"{key}: {tokens_file} has {separators} documents, its index says {shard.documents}; remove it and {AGAIN}")


def blocks(file: Path, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    """The numbers in a file, some at a time."""
    with file.open("rb") as content:
        while len(block := np.fromfile(content, dtype, BLOCK // dtype.itemsize)):
            yield block
