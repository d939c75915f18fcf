"""Tokenizers: round trips, the bytes each token stands for, streaming, and what a user sees when a file is wrong."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_modules.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from mixers.errors import ConfigError

TEXT = "Héllo wörld,  日本語 🎉 <|endoftext|> <s> a\tb\r\n  x"
LINES = [f"the {animal} sat on the mat, said the {animal}; ünder {i}" for i in range(40) for animal in ("cat", "dog")]


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as GPT-2's, with a length limit and padding saved into the file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(LINES, trainer)
    model.add_tokens(["日本"])
    model.enable_truncation(10)
    model.enable_padding(length=10)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="session")
def byte_fallback_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE with metaspaces and byte fallback, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(fallback)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    model.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    content = json.loads(model.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are ordinary tokens there
    path = tmp_path_factory.mktemp("byte_fallback") / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.identity) == (257, 256, "bytes")
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.token_bytes.dtype == np.int64
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0]
    assert tokenizer.decode([256, *ids, 256]) == TEXT
    assert tokenizer.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert len(tokenizer.encode("")) == 0


@pytest.mark.parametrize(
    ("fixture", "kind", "bos", "extra_bytes"),
    [
        ("byte_level_file", HuggingFaceTokenizer, 0, 0),
        ("byte_fallback_file", HuggingFaceTokenizer, 1, 1),  # the space put before a text counts
        ("sentencepiece_file", SentencePieceTokenizer, 1, 1),
    ],
)
def test_trained(fixture: str, kind: type, bos: int, extra_bytes: int, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    tokenizer = load_tokenizer(str(path))
    assert isinstance(tokenizer, kind)
    assert tokenizer.bos_id == bos
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[bos] == 0
    for text in [TEXT, TEXT * 30, *LINES]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert bos not in ids  # the name of a special token is only text in a document
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + extra_bytes
        assert tokenizer.decode([bos, *ids, bos]) == text
    stream = tokenizer.stream()
    streamed = "".join([stream(int(token)) for token in tokenizer.encode(TEXT)]) + stream.flush()
    assert streamed == " " * extra_bytes + TEXT
    folder = load_tokenizer(str(path.parent))
    copy = pickle.loads(pickle.dumps(tokenizer))
    for other in (folder, copy):
        assert other.identity == tokenizer.identity
        assert other.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_added_token_counts_its_bytes(byte_level_file: Path) -> None:
    tokenizer = load_tokenizer(str(byte_level_file))
    (token,) = tokenizer.encode("日本")
    assert tokenizer.token_bytes[token] == 6


def test_separator_is_appended_where_the_file_has_none(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.vocab_size, tokenizer.token_bytes.tolist()) == (2, 3, [1, 1, 0])
    assert tokenizer.decode([2, 0, 2]) == "a"


def test_stream_waits_for_whole_characters() -> None:
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream()
    steps = [stream(token) for token in [tokenizer.bos_id, *tokenizer.encode("é日🎉!")]]
    assert steps == ["", "", "é", "", "", "日", "", "", "", "🎉", "!"]
    assert stream.flush() == ""
    assert stream(0xE6) == ""
    assert stream(0x61) == "\ufffda"  # the character before can no longer become complete
    assert stream(0xE6) == ""
    assert stream.flush() == "\ufffd"
    assert stream(100_000) == "\ufffd"  # a model padded beyond the vocabulary


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("byte", None, "does not exist (legal: bytes"),
        ("folder", "", "neither tokenizer.json nor tokenizer.model"),
        ("broken.json", "{", "is not a tokenizer.json"),
        ("broken.model", "no model", "is not a sentencepiece model"),
    ],
)
def test_errors(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(path))
    message = str(caught.value)
    assert message.startswith("data.tokenizer: ")
    assert words in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize(("package", "name"), [("tokenizers", "tokenizer.json"), ("sentencepiece", "t.model")])
def test_missing_package(package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"data\.tokenizer: .*{package}: pip install 'lightning-mixers\[text\]'"):
        load_tokenizer(str(tmp_path / name))
