"""Text data: which side of the split a document falls on, what the settings mean, and what a batch holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import BOS, assert_same, data_of, encoded, rows, texts, write_corpus

from lit_modules.data import PackedText
from lit_modules.data.stream import divide
from lit_modules.data.tokenizer import ByteTokenizer
from lit_modules.data.windows import Packer
from mixers.errors import ConfigError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


def test_split_is_stable_and_complete() -> None:
    documents = encoded(texts(300))
    train, validation = divide(documents, 0, 0.1)
    assert 15 <= len(validation) <= 45
    assert {d.digest for d in train} | {d.digest for d in validation} == {d.digest for d in documents}
    assert not {d.digest for d in train} & {d.digest for d in validation}
    more_train, more_validation = divide(encoded(texts(100, seed=1)) + documents, 0, 0.1)
    assert {d.digest for d in train} <= {d.digest for d in more_train}
    assert {d.digest for d in validation} <= {d.digest for d in more_validation}
    assert {d.digest for d in validation} <= {d.digest for d in divide(documents, 0, 0.2)[1]}
    assert {d.digest for d in validation} != {d.digest for d in divide(documents, 1, 0.1)[1]}


def test_streams_hold_each_document_once(corpus: Path) -> None:
    data = data_of(corpus)
    data.setup("fit")
    found = []
    for windows in data._splits.values():
        stream = windows.stream
        assert stream.tokens.dtype == np.uint16
        assert (stream.tokens[stream.starts] == BOS).all()
        assert (stream.tokens == BOS).sum() == len(stream.starts)
        pieces = np.split(stream.tokens, stream.starts[1:])
        found.append([bytes(piece[1:].astype(np.uint8)).decode() for piece in pieces])
    assert sorted(found[0] + found[1]) == sorted(texts(200))
    assert not set(found[0]) & set(found[1])


def test_describe(corpus: Path, tmp_path: Path) -> None:
    about = data_of(corpus).describe()
    train, validation = about["train"], about["validation"]
    assert train["documents"] + validation["documents"] == 200
    assert train["bytes"] + validation["bytes"] == sum(len(text.encode()) for text in texts(200))
    assert train["tokens"] == train["bytes"] + train["documents"]
    assert train["windows"] == (train["tokens"] - 1) // 16
    assert (about["tokenizer"], about["vocab_size"], about["path"]) == ("bytes", 257, str(corpus))
    json.dumps(about)
    (tmp_path / "again").mkdir()
    for i, text in enumerate(reversed(texts(200))):
        (tmp_path / "again" / f"{i}.txt").write_bytes(text.encode())
    again = data_of(tmp_path / "again", seed=7).describe()  # other names, another order
    assert [again[key] for key in ("identity", "train", "validation")] == [about["identity"], train, validation]
    assert data_of(corpus, split_seed=1).describe()["train"]["identity"] != train["identity"]


def test_a_text_key_is_of_files_that_have_keys(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text")
    for path in (str(tmp_path / "a.txt"), None):  # None: the built-in corpus
        with pytest.raises(ConfigError, match=r"data\.text_key: 'body' would be looked up in no file"):
            PackedText(path, text_key="body").setup()
    with pytest.raises(ConfigError, match=r"data\.path: .* has no key 'body'"):
        data_of(corpus, text_key="body").setup()
    with pytest.raises(ConfigError, match=r"data\.path: .*missing.* does not exist"):
        PackedText(str(tmp_path / "missing"), text_key="body").setup()


def test_val_tokens(corpus: Path) -> None:
    full = list(data_of(corpus, batch_size=1).val_dataloader())
    capped = list(data_of(corpus, batch_size=1, val_tokens=5 * 16 + 7, seed=3).val_dataloader())
    assert len(capped) == 5 < len(full)
    for batch, other in zip(capped, full, strict=False):
        assert_same(batch, other)
    assert data_of(corpus, val_tokens=80).describe()["train"] == data_of(corpus).describe()["train"]


def test_corpora_of_their_own(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("v" * 40)
    (tmp_path / "test.txt").write_text("t" * 60)
    data = data_of(corpus, val_path=str(tmp_path / "val.txt"), test_path=str(tmp_path / "test.txt"))
    data.setup("test")
    assert list(data._splits) == ["test"]  # nothing else is read for it
    about = data_of(corpus, val_path=str(tmp_path / "val.txt"), test_path=str(tmp_path / "test.txt")).describe()
    assert [about[name]["documents"] for name in ("train", "validation", "test")] == [200, 1, 1]
    (batch,) = data.test_dataloader()
    assert rows(batch) == [[BOS] + [ord("t")] * 15] + [[ord("t")] * 16] * 2
    plain = data_of(corpus)
    for one, other, third in zip(plain.val_dataloader(), plain.test_dataloader(), plain.predict_dataloader(), strict=True):
        assert_same(one, other)
        assert_same(one, third)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seq_len": 0}, "data.seq_len: must be at least 1, got 0"),
        ({"batch_size": -1}, "data.batch_size: must be at least 1"),
        ({"num_workers": -1}, "data.num_workers: must be at least 0"),
        ({"seed": -1}, "data.seed: must be at least 0"),
        ({"split_seed": -1}, "data.split_seed: must be at least 0"),
        ({"val_fraction": 0.0}, "data.val_fraction: must lie between 0 and 1"),
        ({"val_fraction": 1.0}, "data.val_fraction: must lie between 0 and 1"),
        ({"seq_len": 2**31, "val_tokens": 15}, "data.seq_len: must be below 2**31, got 2147483648"),
        ({"val_tokens": 15}, "data.seq_len: one sequence of 16 tokens is more than data.val_tokens (15): lower it, or raise that"),
        ({"val_tokens": 0}, "data.val_tokens: must be at least 1, got 0"),
        ({"batch_size": 2**27}, "data.batch_size: 134217728 * data.seq_len 16 must be below 2**31"),
        ({"tokenizer": "byte"}, "data.tokenizer: 'byte' does not exist"),
    ],
)
def test_settings_are_checked_before_data_is_read(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PackedText(**({"path": "nowhere", "seq_len": 16} | settings))
    assert words in str(caught.value)


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 15)
    with pytest.raises(ConfigError, match=r"data\.path: .*a\.txt has 16 tokens in all, .* 17: lower data\.seq_len"):
        data_of(tmp_path / "a.txt").setup("fit")
    (tmp_path / "a.txt").write_text("x" * 1000)
    for fraction, purpose in ((1e-9, "validation"), (1 - 1e-9, "training")):
        with pytest.raises(ConfigError, match=rf"has no document for {purpose}.* data\.val_fraction .*data\.val_path"):
            data_of(tmp_path / "a.txt", val_fraction=fraction).setup("fit")
    (tmp_path / "b.txt").write_text("y")
    with pytest.raises(ConfigError, match=r"data\.val_path: .*b\.txt has 2 tokens for validation"):
        data_of(tmp_path / "a.txt", val_path=str(tmp_path / "b.txt")).setup("fit")


def naive_cu_seqlens(windows: list[list[int]]) -> list[int]:
    bounds, position = [], 0
    for window in windows:
        for place, token in enumerate(window[:-1]):
            if place == 0 or token == BOS:
                bounds.append(position)
            position += 1
    return [*bounds, position]


def test_batch_with_boundaries(corpus: Path) -> None:
    data = data_of(corpus)
    inside = ignored = 0
    for step, batch in enumerate(data.train_dataloader()):
        windows = [data.sample(3 * step + j).tolist() for j in range(3)]
        assert batch.inputs.shape == batch.targets.shape == (1, 48)
        assert batch.inputs.dtype == batch.targets.dtype == batch.n_bytes.dtype == torch.int64
        assert batch.inputs[0].tolist() == [token for window in windows for token in window[:-1]]
        targets = [-100 if token == BOS else token for window in windows for token in window[1:]]
        assert batch.targets[0].tolist() == targets
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == naive_cu_seqlens(windows)
        assert batch.n_bytes.shape == ()
        assert batch.n_bytes == sum(target != -100 for target in targets)
        inside += len(batch.cu_seqlens) - 4
        ignored += targets.count(-100)
    assert inside > 100
    assert ignored > 100


def test_batch_without_boundaries(corpus: Path) -> None:
    data = data_of(corpus, document_boundaries=False)
    separators = 0
    for step, batch in enumerate(data.train_dataloader()):
        windows = [data.sample(3 * step + j).tolist() for j in range(3)]
        assert batch.cu_seqlens is None
        assert batch.inputs.tolist() == [window[:-1] for window in windows]
        assert batch.targets.tolist() == [window[1:] for window in windows]
        assert batch.n_bytes == sum(token != BOS for window in windows for token in window[1:])
        separators += int((batch.targets == BOS).sum())
    assert separators > 100


def test_separator_at_either_end_of_a_window() -> None:
    packer = Packer(ByteTokenizer(), 4, document_boundaries=True)
    batch = packer([np.array([BOS, 1, 2, 3, BOS]), np.array([BOS, BOS, 4, BOS, 5])])
    assert batch.inputs.tolist() == [[BOS, 1, 2, 3, BOS, BOS, 4, BOS]]
    assert batch.targets.tolist() == [[1, 2, 3, -100, -100, 4, -100, 5]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 7, 8]
    assert batch.n_bytes == 5


def test_bytes_of_a_trained_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"a": 0, "aa": 1, "Ã©": 2, "<s>": 3}  # "Ã©" are the two bytes of "é"
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    data = PackedText(tokenizer=str(tmp_path / "tokenizer.json"), seq_len=4)
    packed = Packer(data.tokenizer, 4, document_boundaries=True)([np.array([3, 1, 2, 3, 0])])
    assert packed.targets.tolist() == [[1, 2, -100, 0]]
    assert packed.n_bytes == 2 + 2 + 1
