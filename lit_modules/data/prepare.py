"""From text to shards: units are tokenized in any order, by any number of processes, and joined in theirs.

Each unit becomes a file of its own in the work folder, and each run of units that fills a shard is joined. Every file is written under another
name, then renamed, and what is made out of files is recorded before they are removed; so a process may be killed anywhere, and the next one goes on
with what is there. Nothing but the source and the settings has a say in what comes out: units are cut by the source, shards by their units.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from lit_modules.data.processes import unordered
from lit_modules.data.shards import INDEX, SPLITS, STARTS, WORK, Index, Shard, hash_of, read_index, replace_file, sync, token_dtype, write_index
from lit_modules.data.sources import Source
from lit_modules.data.stream import encode_document, validates
from lit_modules.data.tokenizer import Tokenizer
from mixers.errors import ConfigError

PLAN = "plan.json"
Counts = npt.NDArray[np.int64]  # [split, (documents, tokens, bytes)]


class Settings(NamedTuple):
    """What decides about the shards, beside source and tokenizer.

    val_fraction is the share of documents that go to the split for validation: a document's side depends on its text and split_seed alone. A shard
    is complete when it has at least shard_tokens tokens for training.
    """

    val_fraction: float
    split_seed: int
    shard_tokens: int


class Progress(NamedTuple):
    """How far it is: units, and the tokens in those that are done; those of earlier runs are apart."""

    units: int
    all_units: int
    tokens: int
    earlier_units: int
    earlier_tokens: int


def prepare(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    origin: dict[str, Any],
    workers: int = 0,
    report: Callable[[Progress], None] = lambda _: None,
) -> Index:
    """Writes the shards of a source, or what is missing of them, and returns their index.

    Args:
        folder: Where to: new, empty, or one that this source and these settings were already being prepared in.
        origin: How the user named source and tokenizer; goes into the index.
        workers: Processes that tokenize. 0 does it here.
        report: Is told how far it is, after every unit.

    Raises:
        ConfigError: the folder holds something else, is being written by another process or cannot be written; the source is not what it should
            be, or has no documents.
    """
    plan = {"source": source.identity, "units": len(source), "tokenizer": tokenizer.identity, **settings._asdict()}
    with _exclusive(folder, plan):
        if not (folder / INDEX).exists():
            with _writing(folder):
                replace_file(folder / WORK / PLAN, json.dumps(plan).encode())
            _Preparation(folder, source, tokenizer, settings).run({**origin, **plan}, workers, report)
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return read_index(folder, "out")


@contextmanager
def _exclusive(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Makes the folder, makes sure that what is in it is of this plan, and keeps other processes out."""
    import fcntl

    if folder.is_dir() and any(folder.iterdir()):
        _check_plan(folder, plan)
    with _writing(folder):
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        lock = (folder / WORK / "lock").open("wb")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"out: another process is preparing {folder}") from error
        yield


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    if (folder / INDEX).exists():
        before = read_index(folder, "out").origin
    else:
        try:
            before = json.loads((folder / WORK / PLAN).read_bytes())
        except (OSError, ValueError) as error:
            if {file.name for file in folder.iterdir()} == {WORK}:  # it was stopped before it had a plan
                return
            raise ConfigError(f"out: {folder} is not empty, and not a folder of `prepare`; give another one") from error
    for key, value in json.loads(json.dumps(plan)).items():
        if before.get(key) != value:
            raise ConfigError(f"out: {folder} was begun with another {key} ({before.get(key)}, not {value}); give another folder, or remove this one")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = "what is finished is kept: make room and give the same command again"
        raise ConfigError(f"out: {error.filename or folder} cannot be written: {error.strerror or error}; {kept}") from error


class _Part(NamedTuple):
    """What a split has of one unit."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    starts: npt.NDArray[np.uint64]


@final
class _Preparation:
    """Called with a unit, in any process, it tokenizes that unit and leaves it as a file in the work folder."""

    def __init__(self, folder: Path, source: Source, tokenizer: Tokenizer, settings: Settings) -> None:
        self.folder = folder
        self.work = folder / WORK
        self.source = source
        self.tokenizer = tokenizer
        self.settings = settings
        self.dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, unit: int) -> tuple[int, Counts]:
        counts, parts = self._tokenize(unit)
        with _writing(self.folder):
            _write_part(self._part(unit), counts, parts)
        return unit, counts

    def _part(self, unit: int) -> Path:
        return self.work / f"{unit:08}.part"

    def _tokenize(self, unit: int) -> tuple[Counts, list[_Part]]:
        kept: tuple[list[npt.NDArray[Any]], ...] = ([], [])
        n_bytes = [0, 0]
        for document in self.source.read(unit):
            if document.text.strip():
                encoded = encode_document(document, self.tokenizer)
                side = int(validates(encoded, self.settings.split_seed, self.settings.val_fraction))
                kept[side].append(encoded.tokens)
                n_bytes[side] += encoded.n_bytes
        parts = []
        for documents in kept:
            ends = np.cumsum([0, *map(len, documents)], dtype=STARTS)
            parts.append(_Part(np.concatenate([np.empty(0, self.dtype), *documents]), ends[:-1]))
        sizes = [[len(part.starts), len(part.tokens), size] for part, size in zip(parts, n_bytes, strict=True)]
        return np.array(sizes, dtype=np.int64), parts

    def run(self, origin: dict[str, Any], workers: int, report: Callable[[Progress], None]) -> None:
        """Tokenizes what is missing, joins, and writes the index."""
        for scratch in [*self.work.glob("*.tmp"), *self.folder.glob("*.tmp")]:
            scratch.unlink()
        records = self._records()
        joined = sum(record["units"] for record in records)  # the units that shards have already
        earlier = sum(shard["tokens"] for record in records for shard in record["shards"])
        ready = {unit: _read_counts(self._part(unit)) for unit in range(joined, len(self.source)) if self._part(unit).exists()}
        for unit in range(joined):
            self._part(unit).unlink(missing_ok=True)
        earlier += sum(int(counts[:, 1].sum()) for counts in ready.values())
        done, tokens = joined + len(ready), earlier
        before = done
        missing = [unit for unit in range(joined, len(self.source)) if unit not in ready]
        answers = unordered(self, missing, workers)
        try:
            while joined < len(self.source):
                if (stop := self._shard_end(joined, ready)) is not None:
                    records.append(self._join(len(records), range(joined, stop), ready))
                    joined = stop
                    continue
                unit, counts = next(answers)
                ready[unit] = counts
                done, tokens = done + 1, tokens + int(counts[:, 1].sum())
                report(Progress(done, len(self.source), tokens, before, earlier))
        finally:
            answers.close()
        self._finish(origin, records)

    def _records(self) -> list[dict[str, Any]]:
        """What was recorded of the shards that are complete, in their order."""
        records: list[dict[str, Any]] = []
        while (file := self._record(len(records))).exists():
            records.append(json.loads(file.read_bytes()))
        return records

    def _record(self, number: int) -> Path:
        return self.work / f"{number:05}.json"

    def _shard_end(self, first: int, ready: dict[int, Counts]) -> int | None:
        """Where the shard that begins with unit `first` ends; None while the units that it needs are not all there."""
        tokens, unit = 0, first
        while unit in ready:
            tokens += int(ready[unit][0, 1])
            unit += 1
            if tokens >= self.settings.shard_tokens:
                return unit
        return unit if unit == len(self.source) else None

    def _join(self, number: int, units: range, ready: dict[int, Counts]) -> dict[str, Any]:
        """Joins the files of some units to a shard of each split, records that, and removes them."""
        counts = np.sum([ready.pop(unit) for unit in units], axis=0)
        with _writing(self.folder):
            shards = [self._join_split(number, units, split, counts[split])._asdict() for split in range(len(SPLITS))]
            record = {"units": len(units), "shards": shards}
            replace_file(self._record(number), json.dumps(record).encode())
            for unit in units:
                self._part(unit).unlink()
        return record

    def _join_split(self, number: int, units: range, split: int, counts: npt.NDArray[np.int64]) -> Shard:
        name = f"{SPLITS[split]}-{number:05}"
        scratch, digest, begin, starts = self.folder / f"{name}.tmp", hashlib.blake2b(digest_size=16), 0, []
        try:
            with scratch.open("wb") as file:
                for unit in units:
                    part = _read_part(self._part(unit))[split]
                    content = part.tokens.tobytes()
                    file.write(content)
                    digest.update(content)
                    starts.append(part.starts + np.uint64(begin))
                    begin += len(part.tokens)
                sync(file)
            scratch.replace(self.folder / f"{name}.tokens")
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        content = np.concatenate(starts).astype(STARTS).tobytes()
        replace_file(self.folder / f"{name}.starts", content)
        documents, tokens, n_bytes = counts.tolist()
        return Shard(name, documents, tokens, n_bytes, digest.hexdigest(), hash_of(content))

    def _finish(self, origin: dict[str, Any], records: list[dict[str, Any]]) -> None:
        splits = {split: [Shard(**record["shards"][i]) for record in records] for i, split in enumerate(SPLITS)}
        index = Index(self.folder, self.tokenizer.identity, self.tokenizer.vocab_size, self.tokenizer.bos_id, origin, splits)
        if not any(index.total(split).documents for split in SPLITS):
            raise ConfigError("source: it holds no documents (every text is empty)")
        with _writing(self.folder):
            write_index(index)


def _write_part(path: Path, counts: Counts, parts: list[_Part]) -> None:
    content = BytesIO()  # numpy does not say why it cannot write to a file
    for array in (counts, *(array for part in parts for array in part)):
        np.save(content, array)
    replace_file(path, content.getvalue())


def _read_counts(path: Path) -> Counts:
    with path.open("rb") as file:
        counts: Counts = np.load(file)
    return counts


def _read_part(path: Path) -> list[_Part]:
    with path.open("rb") as file:
        np.load(file)
        return [_Part(np.load(file), np.load(file)) for _ in SPLITS]
