"""`prepare`: tokenizes a corpus once, into shards that every training maps into memory; `--check` reads shards through."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from lit_modules.data.corpus import would_find
from lit_modules.data.prepare import Progress, Settings, prepare
from lit_modules.data.shards import INDEX, SPLITS, Index, Shard, files_of, read_index
from lit_modules.data.sources import open_source
from lit_modules.data.tokenizer import load_tokenizer
from lit_modules.data.verify import check_shards
from lit_modules.paths import given_path
from mixers.errors import ConfigError
from recipes.commands.arguments import Arguments


def run(argv: list[str]) -> int:
    """Prepares a corpus, or goes on with one; or checks shards."""
    given = _arguments(argv)
    folder = given_path(given.out, "out")
    if given.check:
        index = read_index(folder, "out")
        check_shards(index, "out", lambda shard: print(f"{shard.name}: {shard.documents:,} documents, {shard.tokens:,} tokens: good", flush=True))
    else:
        index = _prepare(given, folder)
    for line in summary(index) + overfull(index):
        print(line)
    return 0


def _prepare(given: Namespace, folder: Path) -> Index:
    settings = Settings(given.val_fraction, given.split_seed, given.shard_tokens)
    try:
        tokenizer = load_tokenizer(given.tokenizer)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("data.")) from error
    source = open_source(given.source, text_key=given.text_key, subset=given.subset, split=given.split, stream=given.stream)
    _check_outside(given.source, folder)
    origin = {"source_name": given.source, "tokenizer_name": given.tokenizer, "subset": given.subset, "split": given.split}
    workers = min(given.workers, len(source))
    return prepare(folder, source, tokenizer, settings, origin=origin, workers=workers, report=Reporter(workers), say=_note)


def _check_outside(source: str, folder: Path) -> None:
    """ConfigError if the source would find the shards in a folder: for the next command it would be another source."""
    made = (folder / INDEX, *(file for split in SPLITS for file in files_of(folder, f"{split}-00000")))
    if any(would_find(source, file, "source") for file in made):
        raise ConfigError(f"out: its shards would be part of --source {source}; give a folder outside of it")


def _note(line: str) -> None:
    print(f"note: {line}", flush=True)


class Reporter:
    """Prints progress: one line that changes in a terminal, else a line now and then."""

    def __init__(self, workers: int) -> None:
        self._workers = max(1, workers)
        self._tty = sys.stdout.isatty()
        self._began = self._last = time.monotonic()
        self._pause = 0.2 if self._tty else 30.0  # seconds

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        complete = progress.units == progress.all_units
        if now - self._last < self._pause and not complete:
            return
        self._last = now
        line = progress_line(progress, now - self._began, self._workers)
        print(f"\r\033[K{line}" if self._tty else line, end="\n" if complete or not self._tty else "", flush=True)


def progress_line(progress: Progress, seconds: float, workers: int) -> str:
    """How much is done, how fast, and how long the rest takes."""
    units, tokens = progress.units - progress.earlier_units, progress.tokens - progress.earlier_tokens
    speed = tokens / max(seconds, 1e-9)
    left = round(seconds / max(units, 1) * (progress.all_units - progress.units))
    done = f"{progress.units:,}/{progress.all_units:,} units, {progress.tokens:,} tokens"
    return f"{done}; {speed:,.0f} tokens/s, {speed / workers:,.0f} a worker; {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def summary(index: Index) -> list[str]:
    """What the shards hold."""
    totals = [index.total(split) for split in SPLITS]
    lines = [f"{total.name}: {_sizes(total)} in {len(index.splits[total.name])} shards" for total in totals]
    return [*lines, f"tokenizer: {index.tokenizer} ({index.vocab_size:,} tokens, {index.dtype.itemsize} bytes each)", f"shards: {index.folder}"]


def overfull(index: Index) -> list[str]:
    """Says where shards are longer than asked for: they end with a unit of the source, so none is shorter than one."""
    asked, largest = index.origin.get("shard_tokens"), max((shard.tokens for shard in index.splits["train"]), default=0)
    if not isinstance(asked, int) or largest < 2 * asked:
        return []
    unit = "a shard ends with a unit of the source (about 32 MiB of text, 8,192 rows of a dataset, a text file)"
    return [f"note: shard_tokens: {unit}, so with {asked:,} the longest has {largest:,} tokens"]


def _sizes(total: Shard) -> str:
    return f"{total.documents:,} documents, {total.tokens:,} tokens, {total.n_bytes:,} bytes of text"


def _arguments(argv: list[str]) -> Namespace:
    parser = Arguments(
        "python -m recipes prepare", "Tokenizes a corpus into shards for data.path. Give the same command again to go on after it was stopped."
    )
    parser.add_argument("--source", help="file, folder or glob of text, .jsonl and .parquet files; else the name of a Hugging Face dataset")
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument("--tokenizer", help="`bytes`, or a local tokenizer.json or sentencepiece model: that of the training")
    parser.add_argument("--text_key", default="text", help="key or column of the text (default: %(default)s)")
    parser.add_argument("--subset", help="of a dataset: its configuration, e.g. sample-100BT")
    parser.add_argument("--split", help="of a dataset (default: train)")
    parser.add_argument("--stream", action="store_true", help="of a dataset: read it from the hub, without a copy in the cache")
    parser.add_argument("--val_fraction", type=float, default=0.001, help="share of documents for validation (default: %(default)s)")
    parser.add_argument("--split_seed", type=int, default=0, help="which documents those are (default: %(default)s)")
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=2**29,
        help="a shard ends with the unit (32 MiB of text) that brings it to so many (%(default)s)",
    )
    parser.add_argument("--workers", type=int, default=_cores(), help="processes; 0: tokenize in this one (default here: %(default)s)")
    parser.add_argument("--check", action="store_true", help="read the shards in --out through, instead: sizes, checksums, tokens, documents")
    given = parser.parse_args(argv)
    if given.check and (others := sorted(parser.given(argv) - {"check", "out"})):
        raise ConfigError(f"{others[0]}: says nothing to --check, which reads the shards in --out; leave out --{', --'.join(others)}")
    for name, least in (("workers", 0), ("shard_tokens", 1), ("split_seed", 0)):
        if getattr(given, name) < least:
            raise ConfigError(f"{name}: must be at least {least}, got {getattr(given, name)}")
    if not 0 <= given.val_fraction < 1:
        raise ConfigError(f"val_fraction: must lie in [0, 1), got {given.val_fraction}")
    for name in ("out",) if given.check else ("out", "source", "tokenizer"):
        if not getattr(given, name):
            raise ConfigError(f"{name}: must be set")
        given_path(getattr(given, name), name)
    return given


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
