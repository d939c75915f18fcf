"""What `prepare` reads, cut into units of work. A unit is a function of the source alone: who reads it, and when, changes nothing."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, final

from lit_modules.data.corpus import Document, check_text_key, find_files, parquet_errors, read_file
from lit_modules.data.shards import hash_of
from lit_modules.paths import given_path
from mixers.errors import ConfigError

KEY = "source"
UNIT_BYTES = 2**25  # of files, about; some ten seconds of a tokenizer's work, which is what a kill can cost
UNIT_ROWS = 2**13  # of a dataset
UNIT_GROUPS = 8  # row groups of a dataset that is streamed; of 1,000 rows each, often


class Source(ABC):
    """Documents in an order that is fixed, unit after unit. It can be sent to other processes.

    Attributes:
        identity: A hash of what tells this source from another without reading it: names and sizes.
    """

    identity: str

    @abstractmethod
    def __len__(self) -> int:
        """How many units there are."""

    @abstractmethod
    def read(self, unit: int) -> Iterator[Document]:
        """The documents of one unit."""


def open_source(name: str, *, text_key: str, subset: str | None = None, split: str | None = None, stream: bool = False) -> Source:
    """The source that a setting names.

    Args:
        name: A file, a folder or a glob pattern, see `read_corpus`; else the name of a Hugging Face dataset.
        text_key: The key or column of the text.
        subset: Of a dataset: its configuration.
        split: Of a dataset; None is "train".
        stream: Read a dataset from where it lies, without a copy on this machine.

    Raises:
        ConfigError: neither files nor a dataset, or no text in it; files, and something that is of a dataset or of other files.
    """
    may_be_dataset = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and Path(name).suffix not in (".jsonl", ".parquet", ".txt")
    if given_path(name, KEY).exists() or not may_be_dataset:
        check_text_key(text_key, [name], "text_key")
        files = FileSource(name, text_key)
        for option, value in (("subset", subset), ("split", split), ("stream", stream)):
            if value not in (None, False):
                raise ConfigError(f"{option}: is of a dataset by name, but {name} is of files here; leave it out")
        return files
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{_not_here(name)}, and datasets by name need a package: pip install 'lightning-mixers[text]'") from error
    return (StreamSource if stream else DatasetSource)(name, text_key, subset, "train" if split is None else split)


class _Span(NamedTuple):
    """A file, or the bytes or row groups start .. stop of it."""

    name: str
    file: Path
    span: tuple[int, int] | None


@final
class FileSource(Source):
    """Text, `.jsonl` and `.parquet` files: large ones are cut between lines or row groups, small ones go together."""

    def __init__(self, path: str, text_key: str) -> None:
        self._text_key = text_key
        self._units: list[list[_Span]] = [[]]
        files = find_files(path, KEY)
        sizes = [file.stat().st_size for _, file in files]
        self.identity = hash_of("\n".join([text_key, *(f"{size} {name}" for size, (name, _) in zip(sizes, files, strict=True))]).encode())
        filled = 0
        for (name, file), size in zip(files, sizes, strict=True):
            for span, weight in _cut(file, size):
                if filled >= UNIT_BYTES:
                    self._units.append([])
                    filled = 0
                self._units[-1].append(_Span(name, file, span))
                filled += weight

    def __len__(self) -> int:
        return len(self._units)

    def read(self, unit: int) -> Iterator[Document]:
        for name, file, span in self._units[unit]:
            yield from read_file(name, file, text_key=self._text_key, key=KEY, span=span)


def _cut(file: Path, size: int) -> Iterator[tuple[tuple[int, int] | None, int]]:
    """The spans of a file and their sizes in bytes."""
    if file.suffix == ".parquet":
        with parquet_errors(file, KEY):
            import pyarrow.parquet as pq

            metadata = pq.read_metadata(file)
            for group in range(metadata.num_row_groups):
                yield (group, group + 1), metadata.row_group(group).total_byte_size
    elif file.suffix == ".jsonl":
        for start in range(0, size, UNIT_BYTES):
            stop = min(start + UNIT_BYTES, size)
            yield (start, stop), stop - start
    else:
        yield None, size


@final
class DatasetSource(Source):
    """A dataset of the library `datasets`, copied into its cache first. A unit is so many rows."""

    def __init__(self, name: str, text_key: str, subset: str | None, split: str) -> None:
        from datasets import Dataset

        data = _load(name, subset, split, streaming=False)
        if not isinstance(data, Dataset):
            raise _not_one_split(name, split)
        _check_column(name, text_key, data.column_names, data.features)
        self._name = name
        self._text_key = text_key
        self._rows = len(data)
        self._data = data.select_columns([text_key])
        self.identity = hash_of(f"{name} {subset} {split} {text_key} {self._rows}".encode())

    def __len__(self) -> int:
        return -(-self._rows // UNIT_ROWS)

    def read(self, unit: int) -> Iterator[Document]:
        rows = range(unit * UNIT_ROWS, min((unit + 1) * UNIT_ROWS, self._rows))
        for first in rows[::1024]:
            stop = min(first + 1024, rows.stop)
            try:
                texts = self._data[first:stop][self._text_key]
            except UnicodeDecodeError as error:  # a column of strings may hold any bytes
                raise ConfigError(f"{KEY}: {self._name}: a text of its rows {first} .. {stop - 1} is not UTF-8") from error
            for row, text in enumerate(texts, start=first):
                yield Document(f"{self._name}:{row}", text or "")


@final
class StreamSource(Source):
    """A dataset of the library `datasets`, read from where it lies. A unit is some row groups of Parquet files, or a file of another format."""

    def __init__(self, name: str, text_key: str, subset: str | None, split: str) -> None:
        from datasets import IterableDataset

        data = _load(name, subset, split, streaming=True)
        if not isinstance(data, IterableDataset):
            raise _not_one_split(name, split)
        files: int = data.num_shards
        if hasattr(data, "reshard"):  # not in the first versions that we take
            data = data.reshard()
        self._units: int = -(-data.num_shards // UNIT_GROUPS) if data.num_shards > files else files
        self._name = name
        self._text_key = text_key
        self._data = data
        self.identity = hash_of(f"{name} {subset} {split} {text_key} {data.num_shards} streamed".encode())
        with self._errors():
            _check_column(name, text_key, data.column_names or [*next(iter(data), {})], data.features or {})

    def __len__(self) -> int:
        return self._units

    def read(self, unit: int) -> Iterator[Document]:
        with self._errors():
            for row, fields in enumerate(self._data.shard(self._units, unit, contiguous=True)):
                text = fields.get(self._text_key) or ""
                if not isinstance(text, str):
                    raise ConfigError(f"{KEY}: {self._name}: {self._text_key!r} is not a string but {type(text).__name__}")
                yield Document(f"{self._name}:{unit}:{row}", text)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # of the network, of the library, of the format
            kept = "what is finished is kept: give the same command again"
            raise ConfigError(f"{KEY}: {self._name} cannot be read ({_reason(error)}); {kept}") from error


def _load(name: str, subset: str | None, split: str, *, streaming: bool) -> object:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every new attempt to reach the hub
    try:
        return load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:  # of the library, of those for the network, or of the dataset's own reader
        advice = "check the name and the network, or download its files and give them as a glob pattern"
        raise ConfigError(f"{_not_here(name)}, and no dataset that can be loaded ({_reason(error)}); {advice}") from error


def _not_here(name: str) -> str:
    return f"{KEY}: {name!r} is no file, folder or glob pattern here"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _not_one_split(name: str, split: str) -> ConfigError:
    return ConfigError(f"split: must name one split of {name}, got {split!r}")


def _check_column(name: str, text_key: str, columns: list[str], features: Mapping[str, object]) -> None:
    """ConfigError unless a column holds strings, as far as its type is known."""
    if text_key not in columns:
        raise ConfigError(f"{KEY}: {name} has no column {text_key!r} (set text_key; legal: {', '.join(columns)})")
    kind = getattr(features[text_key], "dtype", "no scalars") if text_key in features else "string"
    if kind not in ("string", "large_string"):
        raise ConfigError(f"{KEY}: {name}: column {text_key!r} does not hold strings but {kind}")
