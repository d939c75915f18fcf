"""What `prepare` keeps until its shards are complete: a plan, a part for each unit that is tokenized, a record for each shard that is joined.

Each file ends with a checksum that counts in its name and the plan. So a part or record that was cut, changed, or made for something else is none,
and what it stood for is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from lit_modules.data.shards import INDEX, STARTS, WORK, Shard, files_of, hash_of, is_own, read_index, replace_file, sync
from mixers.errors import ConfigError

PLAN, PART, RECORD = "plan", ".part", ".record"
Counts = npt.NDArray[np.int64]  # [split, (documents, tokens, bytes)]


class Side(NamedTuple):
    """What one split has of a unit."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    starts: npt.NDArray[np.uint64]


class Part(NamedTuple):
    """A unit's documents, and their sizes."""

    counts: Counts
    sides: list[Side]


class Record(NamedTuple):
    """How many units a shard joins, and what it is in each split."""

    units: int
    shards: list[Shard]


@final
class Work:
    """The work folder in a folder of shards, for one plan: what decides about the shards. It can be sent to other processes."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        self.path = folder / WORK
        self.plan = plan
        self._seal = zlib.crc32(json.dumps(plan).encode())

    def write_plan(self) -> None:
        _write(self.path / PLAN, json.dumps(self.plan).encode(), 0)

    def read_plan(self) -> dict[str, Any] | None:
        """The plan that was followed here, which may be another; None if that is not known, or nothing has come of it."""
        content = _read(self.path / PLAN, 0)
        if content is None or not any(file.suffix in (PART, RECORD) for file in self.path.iterdir()):
            return None
        plan: dict[str, Any] = json.loads(content)
        return plan

    def write_part(self, unit: int, part: Part) -> None:
        content = BytesIO()  # numpy does not say why it cannot write to a file
        for array in (part.counts, *(array for side in part.sides for array in side)):
            np.save(content, array)
        _write(self._part(unit), content.getvalue(), self._seal)

    def read_part(self, unit: int) -> Part | None:
        """The part of a unit, if there is one and it is whole."""
        if (content := _read(self._part(unit), self._seal)) is None:
            return None
        file = BytesIO(content)
        counts: Counts = np.load(file)
        return Part(counts, [Side(np.load(file), np.load(file)) for _ in counts])

    def remove_parts(self, units: Iterable[int]) -> None:
        for unit in units:
            self._part(unit).unlink(missing_ok=True)

    def _part(self, unit: int) -> Path:
        return self.path / f"{unit:08}{PART}"

    def write_record(self, number: int, record: Record) -> None:
        content = {"units": record.units, "shards": [shard._asdict() for shard in record.shards]}
        _write(self._record(number), json.dumps(content).encode(), self._seal)

    def read_records(self) -> list[Record]:
        """What was recorded of the shards, in their order, up to the first of which nothing is known."""
        records: list[Record] = []
        while (content := _read(self._record(len(records)), self._seal)) is not None:
            fields = json.loads(content)
            records.append(Record(fields["units"], [Shard(**shard) for shard in fields["shards"]]))
        return records

    def _record(self, number: int) -> Path:
        return self.path / f"{number:05}{RECORD}"


def _write(path: Path, content: bytes, seal: int) -> None:
    replace_file(path, content + _checksum(path, content, seal))


def _read(path: Path, seal: int) -> bytes | None:
    """What was written; None if it is not there, not whole, or was written to another name or with another seal."""
    with suppress(OSError):
        whole = path.read_bytes()
        content = whole[:-4]
        if whole[-4:] == _checksum(path, content, seal):
            return content
    return None


def _checksum(path: Path, content: bytes, seal: int) -> bytes:
    return zlib.crc32(content, zlib.crc32(path.name.encode(), seal)).to_bytes(4, "little")


@contextmanager
def exclusive(work: Work) -> Iterator[None]:
    """Makes the folder, makes sure that what is in it is of this plan, and keeps other processes out."""
    import fcntl

    with writing(work.folder):
        if work.folder.exists():
            _check_plan(work)
        work.path.mkdir(parents=True, exist_ok=True)
        lock = (work.path / "lock").open("wb")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"out: another process is preparing {work.folder}") from error
        yield


def _check_plan(work: Work) -> None:
    """ConfigError if a folder is of something else. Where the plan is lost, parts and records tell by themselves whether they are of this one."""
    folder = work.folder
    if not folder.is_dir():
        raise ConfigError(f"out: {folder} is a file; give a folder")
    before = read_index(folder, "out").origin if (folder / INDEX).exists() else work.read_plan()
    if before is None:
        names = {file.name for file in folder.iterdir()}
        if not all(map(is_own, names)):
            raise ConfigError(f"out: {folder} is not empty, and not a folder of `prepare`; give another one")
        if names and WORK not in names:
            read_index(folder, "out")  # which says what to do without one
        return
    for key, value in json.loads(json.dumps(work.plan)).items():
        if before.get(key) != value:
            other = "source or text_key" if key == "source" else f"{key} ({before.get(key)}, not {value})"
            raise ConfigError(f"out: {folder} was begun with another {other}; give another folder, or remove this one")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes one line of what the system says when a file cannot be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "what is finished is kept: make room and give the same command again" if full else "mend that, or give another folder"
        raise ConfigError(f"out: {error.filename2 or error.filename or folder} cannot be written: {error.strerror or error}; {advice}") from error


@final
class ShardWriter:
    """A shard of one split, under another name until it is whole."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._tokens_file, self._starts_file = files_of(folder, name)
        self._scratch = folder / f"{name}.tmp"
        self._file = self._scratch.open("wb")
        self._digest = hashlib.blake2b(digest_size=16)
        self._starts: list[npt.NDArray[np.uint64]] = []
        self._sizes = np.zeros(3, dtype=np.int64)  # documents, tokens, bytes

    def append(self, side: Side, sizes: npt.NDArray[np.int64]) -> None:
        """Adds what the split has of a unit."""
        self._file.write(side.tokens.data)
        self._digest.update(side.tokens.data)
        self._starts.append(side.starts + np.uint64(self._sizes[1]))
        self._sizes += sizes

    def finish(self) -> Shard:
        """Puts both files in their places."""
        with self._file:
            sync(self._file)
        self._scratch.replace(self._tokens_file)
        starts = np.concatenate(self._starts).astype(STARTS).tobytes()
        replace_file(self._starts_file, starts)
        documents, tokens, n_bytes = self._sizes.tolist()
        return Shard(self._name, documents, tokens, n_bytes, self._digest.hexdigest(), hash_of(starts))

    def discard(self) -> None:
        """Leaves nothing of a shard that was not finished."""
        with suppress(OSError):  # closing writes what is left, for which there may be no room
            self._file.close()
        self._scratch.unlink(missing_ok=True)
