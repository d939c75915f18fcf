"""From text to shards: units are tokenized in any order, by any number of processes, and joined in theirs.

Each unit becomes a file of its own in the work folder, and each run of units that fills a shard is joined. Every file is written under another
name, then renamed, and what is made out of files is recorded before they are removed; so a process may be killed anywhere, and the next one goes on
with what is there and whole. Nothing but the source and the settings has a say in what comes out: units are cut by the source, shards by their units.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from lit_modules.data.processes import unordered
from lit_modules.data.shards import (
    INDEX,
    SPLITS,
    STARTS,
    WORK,
    Index,
    Shard,
    files_of,
    is_own,
    read_index,
    token_dtype,
    what_is_wrong,
    write_index,
)
from lit_modules.data.sources import Source
from lit_modules.data.stream import encode_document, validates
from lit_modules.data.tokenizer import Tokenizer
from lit_modules.data.work import Counts, Part, Record, ShardWriter, Side, Work, exclusive, writing
from mixers.errors import ConfigError


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
    say: Callable[[str], object] = lambda _: None,
) -> Index:
    """Writes the shards of a source, or what is missing of them, and returns their index. Of finished ones it reads the sizes alone.

    Args:
        folder: Where to: new, empty, or one that this source and these settings were already being prepared in.
        origin: How the user named source and tokenizer; goes into the index.
        workers: Processes that tokenize. 0 does it here.
        report: Is told how far it is, after every unit.
        say: Is told which file of finished shards is missing or has a wrong size. It is made again.

    Raises:
        ConfigError: the folder holds something else, is being written by another process or cannot be written; the source is not what it should
            be, or has no documents.
    """
    plan = {"source": source.identity, "units": len(source), "tokenizer": tokenizer.identity, **settings._asdict()}
    work = Work(folder, plan)
    with exclusive(work):
        if (folder / INDEX).exists():
            _reopen(work, say)
        if not (folder / INDEX).exists():
            with writing(folder):
                work.write_plan()
            _Preparation(work, source, tokenizer, settings).run({**origin, **plan}, workers, report)
        shutil.rmtree(work.path, ignore_errors=True)
    return read_index(folder, "out")


def _reopen(work: Work, say: Callable[[str], object]) -> None:
    """Where a file of complete shards is missing or has a wrong size, they become shards that are not complete."""
    index = read_index(work.folder, "out")
    wrong = [what for shards in index.splits.values() for shard in shards if (what := what_is_wrong(index.folder, shard, index.dtype))]
    if not wrong:
        return
    say(f"{wrong[0]}: it is made again")
    with writing(work.folder):
        work.write_plan()
        for number, (count, *shards) in enumerate(zip(_units_of(index), *index.splits.values(), strict=False)):
            work.write_record(number, Record(count, shards))
        (work.folder / INDEX).unlink()


def _units_of(index: Index) -> list[int]:
    """How many units each shard joins; nothing if an index, which may be of an older version, does not say."""
    counts: Any = index.origin.get("shard_units")
    if not isinstance(counts, list) or not all(isinstance(count, int) and count > 0 for count in counts):
        return []
    return counts if len(counts) == len(index.splits["train"]) and sum(counts) == index.origin.get("units") else []


@final
class _Preparation:
    """Called with a unit, in any process, it tokenizes that unit and leaves it as a file in the work folder."""

    def __init__(self, work: Work, source: Source, tokenizer: Tokenizer, settings: Settings) -> None:
        self.folder = work.folder
        self.work = work
        self.source = source
        self.tokenizer = tokenizer
        self.settings = settings
        self.dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, unit: int) -> tuple[int, Counts]:
        return unit, self._make(unit).counts

    def _make(self, unit: int) -> Part:
        part = self._tokenize(unit)
        with writing(self.folder):
            self.work.write_part(unit, part)
        return part

    def _tokenize(self, unit: int) -> Part:
        kept: tuple[list[npt.NDArray[Any]], ...] = ([], [])
        n_bytes = [0, 0]
        for document in self.source.read(unit):
            if document.text.strip():
                encoded = encode_document(document, self.tokenizer)
                side = int(validates(encoded, self.settings.split_seed, self.settings.val_fraction))
                kept[side].append(encoded.tokens)
                n_bytes[side] += encoded.n_bytes
        sides = []
        for documents in kept:
            ends = np.cumsum([0, *map(len, documents)], dtype=STARTS)
            sides.append(Side(np.concatenate([np.empty(0, self.dtype), *documents]), ends[:-1]))
        sizes = [[len(side.starts), len(side.tokens), size] for side, size in zip(sides, n_bytes, strict=True)]
        return Part(np.array(sizes, dtype=np.int64), sides)

    def run(self, origin: dict[str, Any], workers: int, report: Callable[[Progress], None]) -> None:
        """Tokenizes what is missing, joins, and writes the index."""
        records = self.work.read_records()
        good = {number: record for number, record in enumerate(records) if not any(map(self._is_wrong, record.shards))}
        missing = self._missing(records, good)
        self._remove_others([shard for record in good.values() for shard in record.shards])
        ready = {unit: part.counts for unit in missing if (part := self.work.read_part(unit))}
        earlier = sum(shard.tokens for record in good.values() for shard in record.shards) + sum(int(counts[:, 1].sum()) for counts in ready.values())
        before = len(self.source) - len(missing) + len(ready)
        done, tokens = before, earlier
        complete: list[Record] = []
        joined = 0  # units that are in them
        answers = unordered(self, [unit for unit in missing if unit not in ready], workers)
        try:
            while joined < len(self.source):
                number = len(complete)
                if number in good:
                    complete.append(good[number])
                elif (stop := self._shard_end(joined, ready, records[number].units if number < len(records) else None)) is not None:
                    complete.append(self._join(number, range(joined, stop), ready, records[number].shards if number < len(records) else None))
                else:
                    unit, counts = next(answers)
                    ready[unit] = counts
                    done, tokens = done + 1, tokens + int(counts[:, 1].sum())
                    report(Progress(done, len(self.source), tokens, before, earlier))
                    continue
                joined += complete[-1].units
        finally:
            answers.close()
        self._finish(origin, complete)

    def _is_wrong(self, shard: Shard) -> bool:
        return what_is_wrong(self.folder, shard, self.dtype) is not None

    def _missing(self, records: list[Record], good: dict[int, Record]) -> list[int]:
        """The units that are in no good shard, in their order."""
        missing: list[int] = []
        first = 0
        for number, record in enumerate(records):
            missing += [] if number in good else range(first, first + record.units)
            first += record.units
        return [*missing, *range(first, len(self.source))]

    def _remove_others(self, shards: list[Shard]) -> None:
        """Removes every file of shards but those of some: half-written ones, and those of a plan that is lost."""
        keep = {WORK, *(file.name for shard in shards for file in files_of(self.folder, shard.name))}
        with writing(self.folder):
            for file in [*self.work.path.glob("*.tmp"), *(file for file in self.folder.iterdir() if is_own(file.name) and file.name not in keep)]:
                file.unlink()

    def _shard_end(self, first: int, ready: dict[int, Counts], units: int | None) -> int | None:
        """Where the shard that begins with unit `first` ends, which may have a known number of units; None while one that it needs is not there."""
        tokens, unit = 0, first
        while unit in ready:
            tokens += int(ready[unit][0, 1])
            unit += 1
            if unit - first == units or (units is None and tokens >= self.settings.shard_tokens):
                return unit
        return unit if unit == len(self.source) else None

    def _join(self, number: int, units: range, ready: dict[int, Counts], before: list[Shard] | None) -> Record:
        """Joins the files of some units to a shard of each split, records that, and removes them. `before`: what the shards were once."""
        writers: list[ShardWriter] = []
        try:
            with writing(self.folder):
                for split in SPLITS:
                    writers.append(ShardWriter(self.folder, f"{split}-{number:05}"))
                for unit in units:
                    part = self.work.read_part(unit) or self._make(unit)  # if it was damaged meanwhile
                    for writer, side, sizes in zip(writers, part.sides, part.counts, strict=True):
                        writer.append(side, sizes)
                record = Record(len(units), [writer.finish() for writer in writers])
                if before is not None:
                    self._refuse_others(units, record.shards, before)
                self.work.write_record(number, record)
                self.work.remove_parts(units)
        finally:
            for writer in writers:
                writer.discard()
        for unit in units:
            del ready[unit]
        return record

    def _refuse_others(self, units: range, shards: list[Shard], before: list[Shard]) -> None:
        """ConfigError if shards that were made again are not what they were: the source is not either, and other shards hold the rest of it."""
        for new, old in zip(shards, before, strict=True):
            if new != old:
                self.work.remove_parts(units)
                for file in files_of(self.folder, new.name):
                    file.unlink()
                raise ConfigError(
                    f"source: {new.name} made again is not what it was ({new.documents:,} documents, {old.documents:,} then): the source has "
                    f"other text now; restore it, or remove {self.folder} and prepare it anew"
                )

    def _finish(self, origin: dict[str, Any], records: list[Record]) -> None:
        splits = {split: [record.shards[i] for record in records] for i, split in enumerate(SPLITS)}
        origin = {**origin, "shard_units": [record.units for record in records]}
        index = Index(self.folder, self.tokenizer.identity, self.tokenizer.vocab_size, self.tokenizer.bos_id, origin, splits)
        if not any(index.total(split).documents for split in SPLITS):
            self._remove_others([])  # nothing of this source stands in the way of another
            shutil.rmtree(self.work.path, ignore_errors=True)
            raise ConfigError("source: it holds no documents (every text is empty)")
        with writing(self.folder):
            write_index(index)
