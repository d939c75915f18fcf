"""Reads documents from text, JSON lines and Parquet files, in an order that depends on their names alone."""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from lit_modules.data.builtin import standard_library
from lit_modules.paths import given_path
from mixers.errors import ConfigError

TEXT_KEY = "text"  # unless a setting says otherwise
KEYED = (".jsonl", ".parquet")  # files in which a text has a key


class Document(NamedTuple):
    """One text and where it came from: a relative path, with `:line` or `:row` where a file holds several."""

    name: str
    text: str


def read_corpus(path: str | None, *, text_key: str = TEXT_KEY, key: str = "data.path") -> Iterator[Document]:
    """The documents of a corpus, one at a time.

    Args:
        path: A file, a folder (read recursively, hidden files and bytecode left out) or a glob pattern. None is the
            built-in corpus.
            `.jsonl` holds a document per line, `.parquet` one per row; any other file is one document of UTF-8 text.
        text_key: The key or column of the text in `.jsonl` and `.parquet` files.
        key: The setting that `path` came from, for error messages.

    Raises:
        ConfigError: a path that does not exist, a file that cannot be read, or not a single document with text in it.
    """
    documents = _read_files(path, text_key, key) if path is not None else map(Document._make, standard_library())
    found = False
    for document in documents:
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise ConfigError(f"{key}: {path} holds no documents (every file is empty)")


def check_text_key(text_key: str, paths: Iterable[str], key: str) -> None:
    """ConfigError if a key other than the usual one would be looked up in no file: none of the paths has .jsonl or .parquet files."""
    if text_key == TEXT_KEY:
        return
    for path in paths:
        try:
            files = find_files(path, key)
        except ConfigError:  # who reads it says why
            return
        if any(file.suffix in KEYED for _, file in files):
            return
    raise ConfigError(f"{key}: {text_key!r} would be looked up in no file: it is of {' and '.join(KEYED)} files, and there are none; leave it out")


def _read_files(path: str, text_key: str, key: str) -> Iterator[Document]:
    for name, file in find_files(path, key):
        yield from read_file(name, file, text_key=text_key, key=key)


def read_file(name: str, file: Path, *, text_key: str, key: str, span: tuple[int, int] | None = None) -> Iterator[Document]:
    """The documents of one file, or of a span of it: row groups of a `.parquet`, bytes of a `.jsonl` (the lines that begin there).

    Raises:
        ConfigError: the file cannot be read, or is not what its name says.
    """
    try:
        if file.suffix == ".jsonl":
            yield from _read_jsonl(name, file, text_key, key, span)
        elif file.suffix == ".parquet":
            yield from _read_parquet(name, file, text_key, key, span)
        else:
            text = _decode(file.read_bytes(), file, 0, key)
            yield Document(name, text.removeprefix("\ufeff"))  # a byte order mark is no part of the text
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error.strerror or error}") from error


def find_files(path: str, key: str) -> list[tuple[str, Path]]:
    """(name, file) of every file that `path` stands for, sorted; names are relative to a folder."""
    root = given_path(path, key)
    if root.is_file():
        return [(root.name, root)]
    if path and root.is_dir():  # an empty setting is not meant to be the current folder
        found = [(file.relative_to(root).as_posix(), file) for file in root.rglob("*") if file.is_file()]
        found = [(name, file) for name, file in found if not any(map(_hidden, name.split("/")))]
        if not found:
            raise ConfigError(f"{key}: {path} is a folder without documents (no files in it)")
        return sorted(found)
    matches = [Path(match) for match in glob.glob(str(root), recursive=True)]
    files = sorted(match for match in matches if match.is_file())
    if not files:
        legal = "a file, a folder, or a glob pattern that matches files"
        raise ConfigError(f"{key}: {path} does not exist (legal: {legal})")
    return [(file.as_posix(), file) for file in files]


def would_find(path: str, file: Path, key: str) -> bool:
    """Whether `find_files` finds a file of this name too, once it is there."""
    root, parts = given_path(path, key), file.expanduser().resolve().parts
    pattern = root.resolve().parts
    if root.is_dir():
        return parts[: len(pattern)] == pattern and not any(map(_hidden, parts[len(pattern) :]))
    return _matches(parts, pattern)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a glob pattern."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    first, wild = pattern[0], glob.has_magic(pattern[0])
    if wild and parts[0].startswith(".") and not first.startswith("."):
        return first == "**" and _matches(parts, pattern[1:])  # which stands for no folder, too
    if first == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], first) and _matches(parts[1:], pattern[1:])


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _decode(raw: bytes, file: Path, offset: int, key: str) -> str:
    """Decodes bytes that stand at `offset` of `file`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ConfigError(f"{key}: {file} is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {at})") from error


def _read_jsonl(name: str, file: Path, text_key: str, key: str, span: tuple[int, int] | None) -> Iterator[Document]:
    start, stop = span or (0, file.stat().st_size)
    with file.open("rb") as lines:
        if start:  # in the middle of a line, unless the byte before ends one
            lines.seek(start - 1)
            start += len(lines.readline()) - 1
        for number, raw in enumerate(lines, start=1):
            if start >= stop:
                return
            line = _decode(raw, file, start, key).removeprefix("\ufeff")
            if line.strip():
                where = f"{file} line {number}" if span is None else f"{file} line at byte {start}"
                yield Document(f"{name}:{number}", _json_text(line, where, text_key, key))
            start += len(raw)


def _json_text(line: str, where: str, text_key: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{key}: {where} is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ConfigError(f"{key}: {where} cannot be read: its JSON is nested too deeply") from error
    except ValueError as error:  # Python's own limit
        raise ConfigError(f"{key}: {where} cannot be read: it has an integer of more than {sys.get_int_max_str_digits():,} digits") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{key}: {where} is not a JSON object with a key {text_key!r}")
    if text_key not in record:
        legal = ", ".join(map(str, record)) or "none"
        raise ConfigError(f"{key}: {where} has no key {text_key!r} (set {_text_setting(key)}; legal: {legal})")
    text = record[text_key]
    if not isinstance(text, str):
        raise ConfigError(f"{key}: {where}: {text_key!r} is not a string but {type(text).__name__}")
    if not _encodable(text):
        raise ConfigError(f"{key}: {where}: {text_key!r} is not UTF-8 text (half of a surrogate pair)")
    return text


def _text_setting(key: str) -> str:
    """What the setting of the text's key is called beside the setting of the path."""
    return f"{key.rpartition('.')[0]}.text_key".removeprefix(".")


def _encodable(text: str) -> bool:
    try:  # JSON may escape half of a surrogate pair, which no UTF-8 text can hold
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(name: str, file: Path, text_key: str, key: str, span: tuple[int, int] | None) -> Iterator[Document]:
    with parquet_errors(file, key):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.ParquetFile(file)
        field_names = table.schema_arrow.names
        if text_key not in field_names:
            legal = ", ".join(field_names)
            raise ConfigError(f"{key}: {file} has no column {text_key!r} (set {_text_setting(key)}; legal: {legal})")
        kind = table.schema_arrow.field(text_key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(f"{key}: {file}: column {text_key!r} does not hold strings but {kind}")
        row, groups = 0, range(*(span or (0, table.num_row_groups)))
        before = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        for batch in table.iter_batches(batch_size=1024, row_groups=[*groups], columns=[text_key]):
            for text in _texts(batch.column(0), file, before + row, key):
                yield Document(f"{name}:{row}", text or "")  # a null is an empty text, and passed over like one
                row += 1


def _texts(column: Any, file: Path, first: int, key: str) -> list[str | None]:
    """The texts of a column that begins at row `first` of a file. pyarrow takes any bytes for a string."""
    try:
        texts: list[str | None] = column.to_pylist()
    except UnicodeDecodeError:
        for row, text in enumerate(column, start=first):
            try:
                text.as_py()
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{key}: {file} row {row} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start})"
                ) from error
        raise
    return texts


@contextmanager
def parquet_errors(file: Path, key: str) -> Iterator[None]:
    """Makes one line of what pyarrow, or its absence, raises."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ConfigError(f"{key}: {file} needs pyarrow: pip install 'lightning-mixers[text]'") from error
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter: names of columns
        raise ConfigError(f"{key}: {file} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
