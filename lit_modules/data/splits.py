"""The documents that train, validate and test, cut into windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

from lit_modules.data.corpus import check_text_key
from lit_modules.data.order import place
from lit_modules.data.shards import Index, ShardStream, check_tokenizer, is_prepared, read_index, what_is_missing
from lit_modules.data.stream import EncodedDocument, Stream, concatenate, divide, encode_corpus, identity_of
from lit_modules.data.tokenizer import Tokenizer
from lit_modules.data.windows import Windows, look_up
from lit_modules.paths import given_path
from mixers.errors import ConfigError


@final
class Splits(Mapping[str, Windows]):
    """Windows by the names train, validation, and test if it has a corpus of its own; only what has been read is in it.

    Args:
        paths: Of the settings path, val_path and test_path; see `PackedText`, as for the rest.
        tokenizer: Makes the tokens.
        tokenizer_name: How the setting names it.

    Raises:
        ConfigError: a path that the system takes for none.

    Attributes:
        identity: A hash of all documents of `path`; None until they are read.
    """

    def __init__(
        self,
        paths: Mapping[str, str | None],
        tokenizer: Tokenizer,
        tokenizer_name: str,
        *,
        seq_len: int,
        val_fraction: float,
        val_tokens: int | None,
        text_key: str,
        seed: int,
        split_seed: int,
    ) -> None:
        self.identity: str | None = None
        self._paths = paths
        for key, path in paths.items():
            if path:
                given_path(path, f"data.{key}")
        self._tokenizer = tokenizer
        self._tokenizer_name = tokenizer_name
        self._seq_len = seq_len
        self._val_fraction = val_fraction
        self._val_tokens = val_tokens
        self._text_key = text_key
        self._seed = seed
        self._split_seed = split_seed
        self._windows: dict[str, Windows] = {}

    def __getitem__(self, name: str) -> Windows:
        return self._windows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._windows)

    def __len__(self) -> int:
        return len(self._windows)

    def read(self, stage: str | None) -> None:
        """Reads and tokenizes what a stage of Lightning needs (everything if None), once.

        Raises:
            ConfigError: a corpus that cannot be read, or is too small.
        """
        if not self._windows:
            texts = [path for path in self._paths.values() if path is not None and not is_prepared(path)]
            check_text_key(self._text_key, texts, "data.text_key")
        testing, test_path = stage in ("test", "predict"), self._paths["test_path"]
        if "train" not in self._windows and not (testing and test_path is not None):
            self._read_train_and_validation()
        if "test" not in self._windows and test_path is not None and (testing or stage is None):
            self._windows["test"] = self._cut(self._whole("test_path", test_path), "testing", "test_path")

    def shown(self, key: str) -> str:
        """The path of a setting, for messages."""
        return self._paths[key] or "the built-in corpus"

    def _read_train_and_validation(self) -> None:
        path, val_path = self._paths["path"], self._paths["val_path"]
        if problem := what_is_missing(path, self._tokenizer_name):
            raise ConfigError(problem)
        train, validation, identity = self._prepared() if is_prepared(path) else self._encoded()
        source = "path"
        if val_path is not None:
            validation, source = self._whole("val_path", val_path), "val_path"
        limit = None if self._val_tokens is None else self._val_tokens // self._seq_len
        windows = self._cut(validation, "validation", source, limit=limit)
        self._windows |= {"validation": windows, "train": self._cut(train, "training", "path", seed=self._seed)}
        self.identity = identity

    def _prepared(self) -> tuple[Stream, Stream, str]:
        """The streams for training and validation of prepared shards, and a hash of all of them."""
        index = self._index("path", self._paths["path"])
        return ShardStream(index, "train"), ShardStream(index, "validation"), index.identity

    def _encoded(self) -> tuple[Stream | None, Stream | None, str]:
        """Those of a corpus of text; without one for validation if that has a corpus of its own."""
        documents = self._encode("path", self._paths["path"])
        identity = identity_of(documents)
        validation: list[EncodedDocument] = []
        if self._paths["val_path"] is None:
            self._require_tokens(sum(len(document.tokens) for document in documents), "in all", "path")
            documents, validation = divide(documents, self._split_seed, self._val_fraction)
        # Not by `seed` where it does not train: runs with several seeds are validated on the same windows.
        return concatenate(documents, self._seed), concatenate(validation, self._split_seed), identity

    def _whole(self, key: str, path: str) -> Stream | None:
        """The stream of a corpus that does not train. Of prepared shards, their validation documents, or all of them if they were not divided."""
        if not is_prepared(path):
            return concatenate(self._encode(key, path), self._split_seed)
        index = self._index(key, path)
        return ShardStream(index, "validation" if index.total("validation").documents else "train", f"data.{key}")

    def _index(self, key: str, path: str | None) -> Index:
        index = read_index(str(path), f"data.{key}")
        check_tokenizer(index, self._tokenizer)
        return index

    def _encode(self, key: str, path: str | None) -> list[EncodedDocument]:
        return encode_corpus(path, self._tokenizer, text_key=self._text_key, key=f"data.{key}")

    def _cut(self, stream: Stream | None, purpose: str, key: str, *, seed: int | None = None, limit: int | None = None) -> Windows:
        if stream is None or not stream.documents:
            other = f"data.val_fraction (now {self._val_fraction}) or data.split_seed" if stream is None else "--val_fraction of `prepare`"
            raise ConfigError(
                f"data.{key}: {self.shown(key)} has no document for {purpose}: it needs more documents, another {other}, or a data.val_path"
            )
        self._require_tokens(len(stream.tokens), f"for {purpose}", key)
        return Windows(stream, self._seq_len, seed=seed, limit=limit, drawn=place if isinstance(stream, ShardStream) else look_up)

    def _require_tokens(self, tokens: int, purpose: str, key: str) -> None:
        if tokens < self._seq_len + 1:
            raise ConfigError(
                f"data.{key}: {self.shown(key)} has {tokens} tokens {purpose}, and one sequence needs "
                f"{self._seq_len + 1}: lower data.seq_len (now {self._seq_len}) or add text"
            )
