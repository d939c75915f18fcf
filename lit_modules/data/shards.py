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
import shlex
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import numpy as np

from lit_modules.data.stream import TokenArray
from lit_modules.data.tokenizer import Tokenizer
from mixers.errors import ConfigError

INDEX = "shards.json"
WORK = ".prepare"  # inside the folder, what `prepare` needs to go on after it was stopped
FORMAT, VERSION = "lightning-mixers shards", 1
SPLITS = ("train", "validation")
STARTS = np.dtype("<u8")


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
    folder = Path(path).expanduser()
    return folder.is_dir() and ((folder / INDEX).exists() or (folder / WORK).exists() or next(folder.glob("*.tokens"), None) is not None)


def write_index(index: Index) -> None:
    """Writes shards.json, all of it or nothing."""
    content = {"format": FORMAT, "version": VERSION, "dtype": index.dtype.str, **index._asdict()}
    del content["folder"]
    content["splits"] = {split: [shard._asdict() for shard in shards] for split, shards in index.splits.items()}
    replace_file(index.folder / INDEX, json.dumps(content, indent=1).encode())


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
    folder = Path(path).expanduser()
    file = folder / INDEX
    try:
        content = json.loads(file.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        if content["version"] != VERSION:
            raise ConfigError(f"{key}: {file} is of version {content['version']}, this lightning-mixers reads version {VERSION}")
        fields = {field: content[field] for field in ("tokenizer", "vocab_size", "bos_id", "origin")}
        splits = {split: [Shard(**shard) for shard in content["splits"][split]] for split in SPLITS}
    except FileNotFoundError as error:
        state = "is not finished: give its `prepare` command again" if (folder / WORK).exists() else f"has no {INDEX}"
        raise ConfigError(f"{key}: {folder} {state}") from error
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error.strerror or error}") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {file} is corrupt ({type(error).__name__}: {str(error).splitlines()[0]}); prepare the shards again") from error
    return Index(folder, **fields, splits=splits)


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
    elif not any(letter in path for letter in "*?[") and not Path(path).expanduser().exists():
        return f"data.path: {path} does not exist; give a file, folder or glob pattern of text, or make shards: {command}"
    return None


def check_tokenizer(index: Index, tokenizer: Tokenizer, key: str = "data.tokenizer") -> None:
    """ConfigError if the shards were made with another tokenizer."""
    if tokenizer.identity != index.tokenizer:
        raise ConfigError(f"{key}: is {tokenizer.identity}, but {index.folder} was prepared with {index.tokenizer}")


def check_sizes(index: Index, shard: Shard, key: str) -> None:
    """ConfigError if a file of a shard is not there or not as long as the index says."""
    for suffix, size in ((".tokens", shard.tokens * index.dtype.itemsize), (".starts", shard.documents * STARTS.itemsize)):
        file = index.folder / f"{shard.name}{suffix}"
        try:
            found = file.stat().st_size
        except OSError as error:
            raise ConfigError(f"{key}: {file} cannot be read: {error.strerror or error}") from error
        if found != size:
            raise ConfigError(f"{key}: {file} has {found:,} bytes, its index says {size:,}: it is truncated or not of this index; prepare it again")


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
        self._files = [index.folder / f"{shard.name}.tokens" for shard in shards]
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
    return f"{key}: {file} has the token {token}, but its vocabulary has {vocab_size} tokens: the file is corrupt; prepare it again"


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
