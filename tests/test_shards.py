"""Shards on disk: they hold the documents, and whatever is wrong with them is said in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_cases import BOS
from shard_cases import SETTINGS, expected, joined, prepared, write_jsonl

from lit_modules.data import sources
from lit_modules.data import verify as verify_module
from lit_modules.data.shards import INDEX, ShardedTokens, ShardStream, check_tokenizer, checksum_of, hash_of, is_prepared, read_index, token_dtype
from lit_modules.data.tokenizer import ByteTokenizer, Tokenizer
from lit_modules.data.verify import Known, check_shards, verify
from mixers.errors import ConfigError

HASHES = {"tokens_hash": "", "starts_hash": ""}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of several units each."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", 500)
        prepared(folder / "shards", write_jsonl(folder))
    return folder / "shards"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "shards")


def test_shards_hold_the_documents(original: Path) -> None:
    index = read_index(original)
    assert len(index.splits["train"]) > 3
    assert all(shard.tokens >= SETTINGS.shard_tokens for shard in index.splits["train"][:-1])
    for split, documents in expected().items():
        total = index.total(split)
        everything = joined(documents)
        assert (total.documents, total.tokens, total.n_bytes) == (len(documents), len(everything), sum(d.n_bytes for d in documents))
        tokens = ShardedTokens(index, split)
        assert len(tokens) == len(everything)
        assert tokens[:].tolist() == everything
        for start in range(0, len(everything), 97):
            for length in (0, 1, 16, 2000):
                assert tokens[start : start + length].tolist() == everything[start : start + length]
        starts = [np.fromfile(original / f"{shard.name}.starts", "<u8") for shard in index.splits[split]]
        assert sum(map(len, starts)) == len(documents)
    check_shards(index)
    assert {file.name.partition(".")[2] for file in original.iterdir()} == {"tokens", "starts", "json"}


def test_tokens_are_mapped_and_not_read(original: Path) -> None:
    tokens = ShardedTokens(read_index(original), "train")
    assert tokens[3:20].dtype == np.uint16
    assert not tokens[3:20].flags.owndata
    for span in (slice(3, 20), slice(0, None)):  # in one shard, over all
        with pytest.raises(ValueError, match="read-only"):
            tokens[span][0] = 1
    content = pickle.dumps(tokens)
    assert len(content) < 5000
    assert pickle.loads(content)[:].tolist() == tokens[:].tolist()


@pytest.mark.parametrize(("vocab_size", "name"), [(256, "|u1"), (257, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4")])
def test_smallest_width(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(name)


def test_a_folder_is_recognised(original: Path, folder: Path, tmp_path: Path) -> None:
    assert is_prepared(str(original))
    (folder / INDEX).unlink()
    assert is_prepared(str(folder))
    (tmp_path / "text").mkdir()
    assert not any(map(is_prepared, [None, "", str(tmp_path / "none"), str(tmp_path / "text"), str(original / INDEX)]))


def refuse(folder: Path) -> str:
    """The line that opening or checking a folder ends with."""

    def use() -> None:
        index = read_index(folder)
        for split in index.splits:
            ShardStream(index, split)
        check_shards(index)

    with pytest.raises(ConfigError) as caught:
        use()
    message = str(caught.value)
    assert message.startswith("data.path: ")
    assert "\n" not in message
    return message


INDEXES = {
    "empty": (lambda _: "", "shards.json is corrupt (it is not JSON): remove its folder and prepare the shards again"),
    "cut": (lambda text: text[: len(text) // 2], "shards.json is corrupt (it is not JSON)"),
    "deep": (lambda _: "[" * 100_000, "shards.json is corrupt (it is not JSON)"),
    "no object": (lambda _: "[1]", "shards.json is corrupt ('format' is missing, or not what it should be)"),
    "another format": (lambda text: text.replace("lightning-mixers shards", "other"), "its format is 'other'"),
    "of the future": (lambda text: text.replace('"version": 1', '"version": 2'), "is of version 2, this lightning-mixers reads version 1"),
    "one wrong digit": (lambda text: text.replace('"bos_id": 256', '"bos_id": 257'), "corrupt (it was changed: its checksum is another)"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_that_is_wrong(case: str, folder: Path) -> None:
    change, words = INDEXES[case]
    (folder / INDEX).write_text(change((folder / INDEX).read_text()))
    assert words in refuse(folder)


CONTENTS = {  # with a checksum that fits, as a faulty writer would
    "no separator": ({"bos_id": None}, "corrupt ('bos_id' is missing, or not what it should be)"),
    "separator outside": ({"bos_id": 257}, "it has the separator 257 in a vocabulary of 257"),
    "huge vocabulary": ({"vocab_size": 2**70}, "in a vocabulary of 1180591620717411303424"),
    "no text": ({"tokenizer": 1}, "'tokenizer' is missing"),
    "truth": ({"vocab_size": True}, "'vocab_size' is missing"),
    "origin": ({"origin": []}, "'origin' is missing"),
    "splits": ({"splits": []}, "'splits' is missing"),
    "no split": ({"splits": {"train": []}}, "'validation' is missing"),
    "shard": ({"splits": {"train": [1], "validation": []}}, "'name' is missing"),
    "name": ({"splits": {"train": [{"name": "../a"} | dict.fromkeys(("documents", "tokens", "n_bytes"), 0) | HASHES]}}, "train is called '../a'"),
    "size": ({"splits": {"train": [{"name": "train-00000", "documents": -1}]}}, "'documents' is missing"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_content_of_an_index_that_is_wrong(case: str, folder: Path) -> None:
    change, words = CONTENTS[case]
    write_content(folder / INDEX, json.loads((folder / INDEX).read_text()) | change)
    assert words in refuse(folder)


def test_splits_of_one_preparation(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["splits"]["train"].pop()
    write_content(folder / INDEX, content)
    assert "its splits have not as many shards as each other" in refuse(folder)


def test_index_of_an_older_version(folder: Path) -> None:
    """It had no checksum, and did not say how many units a shard joins."""
    content = json.loads((folder / INDEX).read_text())
    del content["checksum"], content["origin"]["shard_units"]
    (folder / INDEX).write_text(json.dumps(content))
    check_shards(read_index(folder))


def test_no_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert refuse(folder) == f"data.path: {folder} has no shards.json: remove that folder and prepare its shards again"
    (folder / ".prepare").mkdir()
    assert "is not finished: give its `prepare` command again" in refuse(folder)
    (folder / INDEX).mkdir()
    assert "shards.json cannot be read: Is a directory" in refuse(folder)


@pytest.mark.fault("shard is missing or truncated", "a file is deleted, or loses its last byte", "nothing: training does not begin", each=2)
@pytest.mark.parametrize("suffix", ["tokens", "starts"])
def test_files_that_are_missing_or_cut(suffix: str, folder: Path) -> None:
    file = folder / f"train-00002.{suffix}"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"train-00002.{suffix} has {len(content) - 1:,} bytes, its index says {len(content):,}: it is truncated" in refuse(folder)
    file.unlink()
    message = refuse(folder)
    assert f"train-00002.{suffix} cannot be read: No such file" in message
    assert message.endswith("; give the `prepare` command of its folder again")


def test_more_shards_than_a_process_may_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(np, "memmap", fail)
    assert "train-00000.tokens cannot be mapped into memory: Too many open files" in refuse(folder)


@pytest.mark.fault("shard is corrupt", "one bit is flipped", "nothing: `prepare --check` names the file")
@pytest.mark.parametrize("suffix", ["tokens", "starts"])
def test_one_wrong_bit(suffix: str, folder: Path) -> None:
    file = folder / f"train-00001.{suffix}"
    content = bytearray(file.read_bytes())
    content[64] ^= 1
    file.write_bytes(content)
    message = refuse(folder)
    assert f"train-00001.{suffix}" in message
    assert "remove it and give the `prepare` command of its folder again" in message


def write_content(index: Path, content: dict) -> None:
    """Writes an index, with the checksum of its content."""
    index.write_text(json.dumps(content | {"checksum": checksum_of(content)}, indent=1))


def write_tokens(folder: Path, change: dict[int, int]) -> None:
    """Changes tokens of a shard, and its checksum, as a faulty writer would."""
    file = folder / "train-00001.tokens"
    before = hash_of(file.read_bytes())
    tokens = np.fromfile(file, "<u2")
    for place, token in change.items():
        tokens[place] = token
    tokens.tofile(file)
    index = folder / INDEX
    write_content(index, json.loads(index.read_text().replace(before, hash_of(file.read_bytes()))))


@pytest.mark.fault("token outside of the vocabulary", "written by a faulty writer, with its checksum", "nothing: the batch is refused")
def test_token_out_of_range(folder: Path) -> None:
    write_tokens(folder, {10: 257})
    assert "train-00001.tokens has the token 257, but its vocabulary has 257 tokens" in refuse(folder)
    index = read_index(folder)
    tokens = ShardedTokens(index, "train")
    first = index.splits["train"][0].tokens
    assert len(tokens[first : first + 10]) == 10
    with pytest.raises(ConfigError, match=r"train-00001\.tokens has the token 257"):
        tokens[first + 5 : first + 11]


def test_separators_that_are_no_documents(folder: Path) -> None:
    write_tokens(folder, {1: BOS})
    assert "train-00001.tokens has a separator where train-00001.starts has no document" in refuse(folder)


def test_documents_without_separators(folder: Path) -> None:
    starts = np.fromfile(folder / "train-00001.starts", "<u8")
    write_tokens(folder, {int(starts[-1]): 65})
    assert f"train-00001.tokens has {len(starts) - 1} documents, its index says {len(starts)}" in refuse(folder)


@pytest.mark.fault("wrong tokenizer", "shards of another one", "nothing: training does not begin")
def test_another_tokenizer(original: Path) -> None:
    class Other(ByteTokenizer):  # type: ignore[misc]
        def __init__(self) -> None:
            Tokenizer.__init__(self, [b"a"], None, "other:1")

    index = read_index(original)
    check_tokenizer(index, ByteTokenizer())
    with pytest.raises(ConfigError, match=r"data\.tokenizer: is other:1, but .*shards was prepared with bytes"):
        check_tokenizer(index, Other())


def test_index_is_complete(original: Path) -> None:
    content = json.loads((original / INDEX).read_text())
    assert (content["tokenizer"], content["vocab_size"], content["bos_id"], content["dtype"]) == ("bytes", 257, BOS, "<u2")
    assert content["origin"].items() >= SETTINGS._asdict().items()
    assert read_index(original).identity != hash_of(b"")


# What a training trusts


@pytest.fixture
def read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read to be compared; nothing is remembered of this folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    hashed = verify_module._hash
    monkeypatch.setattr(verify_module, "_hash", lambda file, *rest: (names.append(file.name), hashed(file, *rest))[1])
    assert folder.is_dir()
    return names


def flip(file: Path) -> None:
    """One bit; size and mtime stay."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[64] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_every_file_is_read_once(folder: Path, read: list[str]) -> None:
    index = read_index(folder)
    files = {f"{shard.name}.{suffix}" for shards in index.splits.values() for shard in shards for suffix in ("tokens", "starts")}
    assert str(verify(index)) == f"{len(files)} of {len(files)} files"
    assert sorted(read) == sorted(files)
    read.clear()
    assert verify(index) == (len(files), len(files))
    assert read == []
    os.utime(folder / "train-00001.tokens")  # written again with what it held
    assert verify(index) == (len(files), len(files))
    assert read == ["train-00001.tokens"]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("suffix", ["tokens", "starts"])
def test_a_changed_byte_is_refused(suffix: str, known: bool, folder: Path, read: list[str]) -> None:
    index, file = read_index(folder), folder / f"train-00001.{suffix}"
    if known:
        verify(index)
        read.clear()
    flip(file)
    for _ in range(2):  # it is not remembered as a good one
        with pytest.raises(ConfigError) as caught:
            verify(index)
        assert str(caught.value) == (
            f"data.path: {file} does not have the checksum of its index: it was changed or is corrupt; "
            f"remove it and give the `prepare` command of its folder again (python -m recipes prepare --check --out {folder} reads all of them)"
        )
    assert not known or read == [file.name] * 2


def test_an_index_that_is_changed_with_its_file(folder: Path, read: list[str]) -> None:
    verify(read_index(folder))
    read.clear()
    write_tokens(folder, {1: 65})
    assert verify(read_index(folder)).known > 0
    assert read == ["train-00001.tokens"]


def test_files_for_which_there_was_no_time(folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(folder)
    monkeypatch.setattr(verify_module, "SECONDS", 0.0)
    files = 2 * sum(map(len, index.splits.values()))
    assert verify(index) == (0, files)
    assert read == []
    check_shards(index)  # `prepare --check` reads them, once and for all
    assert verify(index) == (files, files)
    assert read == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"folder": 1}', '{"folder": "FOLDER", "files": [1]}', '{"folder": "FOLDER", "files": {"a": 1}}']
)
def test_what_is_remembered_may_be_torn(content: str, folder: Path, read: list[str]) -> None:
    index = read_index(folder)
    verify(index)
    count = len(read)
    Known(folder).file.write_text(content.replace("FOLDER", str(folder.resolve())))
    assert verify(index) == (count, count)
    assert len(read) == 2 * count
    assert verify(index) == (count, count)
    assert len(read) == 2 * count


def test_folders_that_cannot_be_written_to(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shards' own never needs to be; without the cache all is read the next time, and that is said."""
    index, before = read_index(folder), sorted(folder.iterdir())
    folder.chmod(0o555)
    verify(index)
    folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before
    assert capsys.readouterr().err == ""
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))
    read.clear()
    for _ in range(2):
        assert verify(index).known == len(before) - 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("data: that shards are good could not be kept (Not a directory: ")
    assert len(read) == 2 * (len(before) - 1)


def test_a_file_that_cannot_be_read(folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(folder)
    said: list[str] = []
    monkeypatch.setattr(verify_module, "_stamp", lambda *_: [2**31, 0, 0, ""])
    verify(index, say=said.append)
    files = len(read)
    assert said == [f"data.path: reading {2 * files:.1f} GiB of shards, once, to compare them with their checksums (for 120 s at most)"]
    Known(folder).file.unlink()
    (folder / "train-00000.starts").unlink()
    with pytest.raises(ConfigError, match=r"^data\.path: .*train-00000\.starts cannot be read: No such file or directory$"):
        verify(index)
