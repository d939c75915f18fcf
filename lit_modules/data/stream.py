"""From documents to a token stream: each is encoded on its own, goes to one side of the split, and has its place there.

Side and place are hashes of the text, so neither file names nor other documents have a say in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lit_modules.data.corpus import Document, read_corpus
from lit_modules.data.tokenizer import KEY, Tokenizer
from mixers.errors import ConfigError

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.unsignedinteger]


class EncodedDocument(NamedTuple):
    """`[bos, tokens...]`, a hash of the text, and its length in UTF-8 bytes."""

    tokens: TokenArray
    digest: bytes
    n_bytes: int


class Tokens(Protocol):
    """Token ids, [n], of which slices are read: an array, or prepared shards."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> TokenArray: ...


class Stream(Protocol):
    """What windows are cut from: a `TokenStream`, or a `ShardStream`."""

    @property
    def tokens(self) -> Tokens: ...

    @property
    def documents(self) -> int:
        """How many there are."""

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all texts."""

    @property
    def identity(self) -> str:
        """A hash of the content."""


class TokenStream(NamedTuple):
    """Documents one after the other.

    tokens [n]; starts [documents], the index of each document's bos; UTF-8 bytes in all; a hash of the texts.
    """

    tokens: TokenArray
    starts: Int64Array
    n_bytes: int
    identity: str

    @property
    def documents(self) -> int:
        return len(self.starts)


def encode_corpus(path: str | None, tokenizer: Tokenizer, *, text_key: str, key: str) -> list[EncodedDocument]:
    """All documents of a corpus, see `read_corpus` for the arguments and errors."""
    return [encode_document(document, tokenizer) for document in read_corpus(path, text_key=text_key, key=key)]


def encode_document(document: Document, tokenizer: Tokenizer) -> EncodedDocument:
    """Tokens in the smallest unsigned type that holds the vocabulary.

    Raises:
        ConfigError: the tokenizer returns an id that is not in its vocabulary.
    """
    raw = document.text.encode("utf-8")
    ids = tokenizer.encode(document.text)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise ConfigError(f"{KEY}: {tokenizer.identity} makes a token outside its {tokenizer.vocab_size} of the text {document.name}")
    tokens = np.empty(len(ids) + 1, dtype=np.min_scalar_type(tokenizer.vocab_size - 1))
    tokens[0], tokens[1:] = tokenizer.bos_id, ids
    return EncodedDocument(tokens, hashlib.blake2b(raw, digest_size=16).digest(), len(raw))


def divide(documents: Iterable[EncodedDocument], split_seed: int, val_fraction: float) -> tuple[list[EncodedDocument], list[EncodedDocument]]:
    """(train, validation). A side depends on the text alone: new documents move no other, copies stay together."""
    train: list[EncodedDocument] = []
    validation: list[EncodedDocument] = []
    for document in documents:
        (validation if validates(document, split_seed, val_fraction) else train).append(document)
    return train, validation


def validates(document: EncodedDocument, split_seed: int, val_fraction: float) -> bool:
    """Whether a document is on the side of validation."""
    return keyed_hash("split", split_seed, document.digest) < val_fraction * 2**64


def concatenate(documents: Sequence[EncodedDocument], seed: int) -> TokenStream | None:
    """The stream of some documents, in an order drawn by `seed`; None of none."""
    if not documents:
        return None
    ordered = sorted(documents, key=lambda document: keyed_hash("order", seed, document.digest))
    lengths = np.array([len(document.tokens) for document in ordered], dtype=np.int64)
    tokens = np.concatenate([document.tokens for document in ordered])
    tokens.setflags(write=False)  # windows are views of it
    n_bytes = sum(document.n_bytes for document in ordered)
    return TokenStream(tokens, np.cumsum(lengths) - lengths, n_bytes, identity_of(ordered))


def identity_of(documents: Iterable[EncodedDocument]) -> str:
    """A hash of the texts, whatever their order and names."""
    digests = sorted(document.digest for document in documents)
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def keyed_hash(purpose: str, seed: int, content: bytes) -> int:
    """64 bits drawn by (seed, content), independent from one purpose to another."""
    key = f"{purpose} {seed}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "little")
