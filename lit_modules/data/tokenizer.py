"""Tokenizers that know how many UTF-8 bytes each token stands for, which is what bits per byte are counted by.

Every kind is built from a table: token id -> the bytes it stands for (none for special tokens). Nothing here touches
the network.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt

from lit_modules.paths import given_path
from mixers.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TokenizerJson

KEY = "data.tokenizer"
_METASPACE = "\u2581"  # how sentencepiece and its descendants write a space
_REPLACEMENT = "\ufffd".encode()
# The special token put before every document: the first of these that the file has, else a new id after the last.
_BOS_NAMES = ("<|begin_of_text|>", "<bos>", "<s>", "<|bos|>", "[BOS]", "<|endoftext|>", "<eos>", "</s>", "[EOS]")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: Number of ids, `bos_id` included.
        bos_id: The separator put before every document. `encode` never returns it.
        token_bytes: int64 [vocab_size], UTF-8 bytes that each token stands for; 0 for special tokens.
        identity: Kind and content hash: equal identities encode equally.
    """

    def __init__(self, pieces: list[bytes], bos_id: int | None, identity: str) -> None:
        if bos_id is None:
            bos_id, pieces = len(pieces), [*pieces, b""]
        pieces[bos_id] = b""
        self._pieces = pieces
        self.vocab_size = len(pieces)
        self.bos_id = bos_id
        self.token_bytes: npt.NDArray[np.int64] = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.identity = identity

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids [n] of a text, without special tokens: a special token's name in a text is just text."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens and ids outside the vocabulary are dropped, invalid UTF-8 is U+FFFD."""

    def piece(self, token_id: int) -> bytes:
        """The bytes that one token stands for; an id outside the vocabulary (a padded model) is U+FFFD."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else _REPLACEMENT

    def stream(self) -> StreamDecoder:
        """A decoder for generation: fed one id at a time, it returns text as soon as its characters are complete."""
        return StreamDecoder(self)

    def _plain(self, ids: Iterable[int]) -> list[int]:
        return [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.bos_id]


@final
class StreamDecoder:
    """Holds back the bytes of a character that is split over tokens until the last of them is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, token_id: int) -> str:
        """The text that this token completes, which may be empty."""
        return self._decoder.decode(self._tokenizer.piece(int(token_id)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character never became complete, else nothing."""
        return self._decoder.decode(b"", final=True)


@final
class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, ids 0 to 255; 256 separates documents."""

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)], None, "bytes")

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(self._plain(ids)).decode("utf-8", errors="replace")


@final
class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file.

    The space that most models put before a text counts as a byte, so a text has one byte more than its UTF-8.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise _missing_package("sentencepiece", path) from error
        content = _read(path)
        model = SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ConfigError(f"{KEY}: {path} is not a sentencepiece model") from error
        self._model = model
        bos = next((i for i in (model.bos_id(), model.eos_id()) if i >= 0), None)
        pieces = [self._bytes_of(i) for i in range(model.vocab_size())]
        super().__init__(pieces, bos, _identity("sentencepiece", content))

    def _bytes_of(self, token_id: int) -> bytes:
        model = self._model
        if model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id):
            return b""
        piece = model.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if model.is_byte(token_id) else piece.replace(_METASPACE, " ").encode()

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array(self._model.encode(text, out_type=int), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        known = self._model.vocab_size()  # without a separator of our own
        return str(self._model.decode([i for i in self._plain(ids) if i < known]))


@final
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` file, or a folder with one, read by the `tokenizers` library.

    Exact bytes for byte-level BPE and for models with byte fallback; for others, what a token decodes to on its own.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from tokenizers import Tokenizer as TokenizerJson
        except ImportError as error:
            raise _missing_package("tokenizers", path) from error
        file = given_path(path, KEY)
        file = file / "tokenizer.json" if file.is_dir() else file
        content = _read(file)
        try:
            model = TokenizerJson.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(f"{KEY}: {file} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
        model.no_truncation()  # a file may carry a length limit that would cut documents short
        model.no_padding()
        self._model = model
        bos = next((model.token_to_id(name) for name in _BOS_NAMES if model.token_to_id(name) is not None), None)
        super().__init__(_huggingface_pieces(model), bos, _identity("huggingface", content))

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        self._model.encode_special_tokens = True  # set here because pickling drops it
        return np.array(self._model.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(self._plain(ids), skip_special_tokens=True)


def _huggingface_pieces(model: TokenizerJson) -> list[bytes]:
    """The bytes of every id. What a token's name means is written in the decoder section of the file."""
    steps = _decoder_steps(json.loads(model.to_str())["decoder"])
    vocabulary = {token_id: name for name, token_id in model.get_vocab(with_added_tokens=False).items()}
    added = model.get_added_tokens_decoder()
    pieces = [b""] * (max([*vocabulary, *added]) + 1)  # ids may have holes
    byte_of = {char: value for value, char in enumerate(_byte_level_alphabet())}
    for token_id, name in vocabulary.items():
        if "ByteLevel" in steps and all(char in byte_of for char in name):
            pieces[token_id] = bytes(byte_of[char] for char in name)
        elif "ByteFallback" in steps and len(name) == 6 and name.startswith("<0x"):
            pieces[token_id] = bytes([int(name[3:5], 16)])
        elif "ByteFallback" in steps or "Metaspace" in steps:
            pieces[token_id] = name.replace(_METASPACE, " ").encode()
        else:
            pieces[token_id] = model.decode([token_id]).encode()
    for token_id, token in added.items():
        pieces[token_id] = b"" if token.special else token.content.encode()
    return pieces


def _decoder_steps(decoder: dict[str, Any] | None) -> set[str]:
    """The types in a decoder section, which may be a sequence of decoders."""
    if decoder is None:
        return set()
    return {str(decoder["type"])}.union(*map(_decoder_steps, decoder.get("decoders", [])))


def _byte_level_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(value if value in printable else next(others)) for value in range(256)]


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a setting names.

    Args:
        spec: `bytes`; a `tokenizer.json` file or a folder that holds one; or a sentencepiece model (a file of any other
            name, or a folder that holds `tokenizer.model`).

    Raises:
        ConfigError: no such file, not a tokenizer, or the library for it is not installed.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = given_path(spec, KEY)
    if path.is_dir():
        path = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), path)
        if path.is_dir():
            raise ConfigError(f"{KEY}: folder {spec} holds neither tokenizer.json nor tokenizer.model")
    if not path.is_file():
        legal = "bytes, a local tokenizer.json or sentencepiece model file, or a folder with one"
        raise ConfigError(f"{KEY}: {spec!r} does not exist (legal: {legal})")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _read(path: str | Path) -> bytes:
    try:
        return given_path(path, KEY).read_bytes()
    except OSError as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error.strerror or error}") from error


def _identity(kind: str, content: bytes) -> str:
    return f"{kind}:{hashlib.blake2b(content, digest_size=16).hexdigest()}"


def _missing_package(package: str, path: str | Path) -> ConfigError:
    return ConfigError(f"{KEY}: {path} needs {package}: pip install 'lightning-mixers[text]'")
