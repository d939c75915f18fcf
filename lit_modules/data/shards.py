"""Tokenized text on disk: a folder of shards, which `python -m recipes prepare` writes and `PackedText` maps into memory.

A folder holds for each split (train, validation) and shard
    train-00000.tokens    unsigned integers, little-endian, of the smallest width that holds the vocabulary: documents, each [bos, tokens...]
    train-00000.starts    uint64, little-endian: where each of its documents begins, counted in tokens of this shard
and shards.json, the index, which is written last: without it the folder is not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import numpy as np

from lit_modules.data.stream import TokenArray
from lit_modules.data.tokenizer import Tokenizer
from lit_modules.paths import given_path
from mixers.errors import ConfigError

INDEX = "shards.json"
WORK = ".prepare"  # inside the folder, what `prepare` needs to go on after it was stopped
FORMAT, VERSION = "lightning-mixers shards", 1
SPLITS = ("train", "validation")
STARTS = np.dtype("<u8")
OWN = re.compile(rf"{re.escape(WORK)}|({'|'.join(SPLITS)})-\d{{5,}}(\.tokens|\.starts)?((\.\d+)?\.tmp)?|{re.escape(INDEX)}\.\d+\.tmp")
AGAIN = "give the `prepare` command of its folder again"  # which makes what is missing, and nothing else


class Shard(NamedTuple):
    """One shard of one split: its sizes, and a hash of each of its two files."""

    name: str
    documents: int
    tokens: int
    n_bytes: int  # of the texts, in UTF-8
    tokens_hash: str
    starts_hash: str


class Index(NamedTuple):
    """What shards.json says; `origin` is what the shards were made from."""

    folder: Path
    tokenizer: str
    vocab_size: int
    bos_id: int
    origin: dict[str, Any]
    splits: dict[str, list[Shard]]

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        return token_dtype(self.vocab_size)

    def total(self, split: str) -> Shard:
        """The sums over all shards of a split. Its hashes are those of all hashes."""
        shards = self.splits[split]
        hashes = ["".join(getattr(shard, field) for shard in shards) for field in ("tokens_hash", "starts_hash")]
        sums = [sum(getattr(shard, field) for shard in shards) for field in ("documents", "tokens", "n_bytes")]
        return Shard(split, *sums, *(hash_of(text.encode()) for text in hashes))

    @property
    def identity(self) -> str:
        """A hash of everything in the shards."""
        return hash_of("".join(self.total(split).tokens_hash for split in SPLITS).encode())


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest unsigned integer that holds every token id."""
    dtype: np.dtype[np.unsignedinteger[Any]] = np.min_scalar_type(vocab_size - 1).newbyteorder("<")
    return dtype


def hash_of(content: bytes) -> str:
    """The checksum of a file's bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def is_prepared(path: str | None) -> bool:
    """Whether a path is a folder that `prepare` has written or begun to write."""
    if not path:
        return False
    folder = given_path(path, "data.path")
    return folder.is_dir() and ((folder / INDEX).exists() or any(is_own(file.name) for file in folder.glob("*")))


def is_own(name: str) -> bool:
    """Whether `prepare` gives a file such a name, the index aside."""
    return OWN.fullmatch(name) is not None


def files_of(folder: Path, name: str) -> tuple[Path, Path]:
    """The files of a shard: tokens, and starts of documents."""
    return folder / f"{name}.tokens", folder / f"{name}.starts"


def write_index(index: Index) -> None:
    """Writes shards.json, all of it or nothing."""
    content = {"format": FORMAT, "version": VERSION, "dtype": index.dtype.str, **index._asdict()}
    del content["folder"]
    content["splits"] = {split: [shard._asdict() for shard in shards] for split, shards in index.splits.items()}
    content["checksum"] = checksum_of(content)
    replace_file(index.folder / INDEX, json.dumps(content, indent=1).encode())


def checksum_of(content: dict[str, Any]) -> str:
    """The checksum of what shards.json says, itself aside."""
    return hash_of(json.dumps({key: value for key, value in content.items() if key != "checksum"}, sort_keys=True).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file under another name, makes sure that it is on the disk, and renames it; leaves nothing behind if that fails."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            sync(file)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def sync(file: BinaryIO) -> None:
    """Waits until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def read_index(path: str | Path, key: str = "data.path") -> Index:
    """The index of a folder.

    Raises:
        ConfigError: there is none, or it is not one that this version can read.
    """
    folder = given_path(path, key)
    file = folder / INDEX
    try:
        raw = file.read_bytes()
    except FileNotFoundError as error:
        state = f"has no {INDEX}" + (": remove that folder and prepare its shards again" if is_prepared(str(folder)) else "")
        state = "is not finished: give its `prepare` command again" if (folder / WORK).exists() else state
        raise ConfigError(f"{key}: {folder} {state}") from error
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error.strerror or error}") from error
    try:
        return _parse(folder, raw, key)
    except ValueError as error:
        raise ConfigError(f"{key}: {file} is corrupt ({error}): remove its folder and prepare the shards again") from error


def _parse(folder: Path, raw: bytes, key: str) -> Index:
    """ValueError with a line for the user if it is no index."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if (found := _value(content, "format", str)) != FORMAT:
        raise ValueError(f"its format is {found!r}")
    if (version := _value(content, "version", int)) != VERSION:
        raise ConfigError(f"{key}: {folder / INDEX} is of version {version}, this lightning-mixers reads version {VERSION}")
    if content.get("checksum", expected := checksum_of(content)) != expected:  # there is none in those of older versions
        raise ValueError("it was changed: its checksum is another")
    vocab_size, bos_id = _value(content, "vocab_size", int), _value(content, "bos_id", int)
    if not bos_id < vocab_size <= 2**32:
        raise ValueError(f"it has the separator {bos_id} in a vocabulary of {vocab_size}")
    splits = {split: _parse_shards(_value(content, "splits", dict), split) for split in SPLITS}
    if len({*map(len, splits.values())}) > 1:
        raise ValueError("its splits have not as many shards as each other")
    return Index(folder, _value(content, "tokenizer", str), vocab_size, bos_id, _value(content, "origin", dict), splits)


def _parse_shards(splits: object, split: str) -> list[Shard]:
    shards, numbers = [], ("documents", "tokens", "n_bytes")
    for place, fields in enumerate(_value(splits, split, list)):
        shards.append(Shard(*(_value(fields, field, int if field in numbers else str) for field in Shard._fields)))
        if shards[-1].name != f"{split}-{place:05}":
            raise ValueError(f"shard {place} of {split} is called {shards[-1].name!r}")
    return shards


def _value(content: object, key: str, kind: type) -> Any:
    value = content.get(key) if isinstance(content, dict) else None
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise ValueError(f"{key!r} is missing, or not what it should be")
    return value


def what_is_missing(path: str | None, tokenizer: str) -> str | None:
    """Why a training on `path` cannot begin, in one line with the command that mends it; None if nothing is known to be missing."""
    if not path:
        return None
    command = f"python -m recipes prepare --source FILES_OR_DATASET --tokenizer {shlex.quote(tokenizer)} --out {shlex.quote(path)}"
    if is_prepared(path):
        try:
            read_index(path)
        except ConfigError as error:
            return f"{error} ({command})"
    elif not any(letter in path for letter in "*?[") and not given_path(path, "data.path").exists():
        return f"data.path: {path} does not exist; give a file, folder or glob pattern of text, or make shards: {command}"
    return None


def check_tokenizer(index: Index, tokenizer: Tokenizer, key: str = "data.tokenizer") -> None:
    """ConfigError if the shards were made with another tokenizer."""
    if tokenizer.identity != index.tokenizer:
        raise ConfigError(f"{key}: is {tokenizer.identity}, but {index.folder} was prepared with {index.tokenizer}")


def what_is_wrong(folder: Path, shard: Shard, dtype: np.dtype[Any]) -> str | None:
    """Which file of a shard is not there or not as long as it should be, in words; None if both are."""
    for file, size in zip(files_of(folder, shard.name), (shard.tokens * dtype.itemsize, shard.documents * STARTS.itemsize), strict=True):
        try:
            found = file.stat().st_size
        except OSError as error:
            return f"{file} cannot be read: {error.strerror or error}"
        if found != size:
            return f"{file} has {found:,} bytes, its index says {size:,}: it is truncated or not of this index"
    return None


def check_sizes(index: Index, shard: Shard, key: str) -> None:
    """ConfigError if a file of a shard is not there or not as long as the index says."""
    if wrong := what_is_wrong(index.folder, shard, index.dtype):
        raise ConfigError(f"{key}: {wrong}; {AGAIN}")


@final
class ShardedTokens:
    """The tokens of a split, [n], mapped and not read: a slice is an array, a view where it lies in one shard.

    Raises:
        ConfigError: when it is made, a file that is missing or has a wrong size; when it is sliced, an id outside the vocabulary.
    """

    def __init__(self, index: Index, split: str, key: str = "data.path") -> None:
        self._arguments = index, split, key
        self._vocab_size = index.vocab_size
        self._key = key
        shards = index.splits[split]
        for shard in shards:
            check_sizes(index, shard, key)
        shards = [shard for shard in shards if shard.tokens]  # nothing can be mapped of an empty file
        self._files = [files_of(index.folder, shard.name)[0] for shard in shards]
        self._maps = [_map(file, index.dtype, key) for file in self._files]
        self._ends = np.cumsum([len(tokens) for tokens in self._maps], dtype=np.int64)

    def __reduce__(self) -> tuple[type[ShardedTokens], tuple[Index, str, str]]:
        return ShardedTokens, self._arguments  # another process maps the files itself

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, span: slice) -> TokenArray:
        start, stop, _ = span.indices(len(self))
        if start >= stop:
            return np.empty(0, np.uint8)
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right").tolist()
        pieces = [self._piece(shard, start, stop) for shard in range(first, last + 1)]
        tokens = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        tokens.setflags(write=False)
        return tokens

    def _piece(self, shard: int, start: int, stop: int) -> TokenArray:
        """What one shard has of the span start .. stop of all tokens."""
        begin = int(self._ends[shard]) - len(self._maps[shard])
        tokens = self._maps[shard][max(start - begin, 0) : stop - begin]
        if int(tokens.max()) >= self._vocab_size:
            raise ConfigError(out_of_range(self._key, self._files[shard], int(tokens.max()), self._vocab_size))
        return tokens


def _map(file: Path, dtype: np.dtype[Any], key: str) -> TokenArray:
    try:
        tokens: TokenArray = np.memmap(file, dtype, "r").view(np.ndarray)
    except OSError as error:  # not readable, or too many of them
        raise ConfigError(f"{key}: {file} cannot be mapped into memory: {error.strerror or error}") from error
    return tokens


def out_of_range(key: str, file: Path, token: int, vocab_size: int) -> str:
    return f"{key}: {file} has the token {token}, but its vocabulary has {vocab_size} tokens: the file is corrupt; remove it and {AGAIN}"


@final
class ShardStream:
    """A split of prepared shards, with what a `TokenStream` has that windows and reports need."""

    def __init__(self, index: Index, split: str, key: str = "data.path") -> None:
        total = index.total(split)
        self.index, self.split, self.key = index, split, key
        self.tokens = ShardedTokens(index, split, key)
        self.documents = total.documents
        self.n_bytes = total.n_bytes
        self.identity = total.tokens_hash
