"""What `prepare` reads: units that are all of a source, however it is cut; datasets of Hugging Face, from their cache or streamed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from data_cases import texts
from shard_cases import SETTINGS, write_jsonl

from lit_modules.data import sources
from lit_modules.data.corpus import Document
from lit_modules.data.prepare import prepare
from lit_modules.data.sources import FileSource, Source
from lit_modules.data.tokenizer import ByteTokenizer
from mixers.errors import ConfigError
from recipes.__main__ import main

ROOT = Path(__file__).parents[1]


def documents_of(source: Source) -> list[str]:
    return [document.text for unit in range(len(source)) for document in source.read(unit) if document.text.strip()]


def test_units_of_lines_are_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a file is cut: within a line, at its end, beyond; with and without a last line feed."""
    path = write_jsonl(tmp_path, 12)
    whole = path.read_bytes()
    for content in (whole, whole.rstrip(b"\n"), whole.replace(b"\n", b"\r\n")):
        path.write_bytes(content)
        everything = documents_of(FileSource(str(path), "text"))
        assert len(everything) == 12
        for size in (*range(1, 40), 100, len(content) - 1, len(content), len(content) + 1):
            monkeypatch.setattr(sources, "UNIT_BYTES", size)
            source = FileSource(str(path), "text")
            assert len(source) == -(-len(content) // size)
            assert documents_of(source) == everything
    assert everything == texts(12)


def test_units_of_parquet_and_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra text")
    rows = {"text": [f"row {i}" for i in range(50)], "id": list(range(50))}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "b.parquet"), batch_size=7)  # rows a group
    for i in range(5):
        (tmp_path / f"a{i}.txt").write_text(f"text {i}")
    whole = FileSource(str(tmp_path), "text")
    assert len(whole) == 1
    monkeypatch.setattr(sources, "UNIT_BYTES", 20)
    source = FileSource(str(tmp_path), "text")
    assert len(source) > 5
    assert documents_of(source) == documents_of(whole) == [f"text {i}" for i in range(5)] + rows["text"]
    assert FileSource(str(tmp_path), "id").identity != source.identity == whole.identity
    with pytest.raises(ConfigError, match=r"source: .*b\.parquet has no column 'body' \(set text_key; legal: text, id\)"):
        documents_of(FileSource(str(tmp_path / "b.parquet"), "body"))
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"source: .*b\.parquet is not a readable Parquet file"):
        FileSource(str(tmp_path), "text")


def test_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra text")
    rows = {"body": ["one", None, "two", "", "three"], "id": [0, 1, 2, 3, 4]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "a.parquet"))
    stored = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    streamed = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    asked = []

    def load(name: str, subset: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, subset, split))
        if name == "not/there":
            raise ConnectionError("Couldn't reach\nthe hub")
        data = streamed if streaming else stored
        return data if name == "some/texts" else {"train": data}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "UNIT_ROWS", 2)
    source = sources.open_source("some/texts", text_key="body", subset="small")
    assert asked == [("some/texts", "small", "train")]
    assert len(source) == 3
    assert documents_of(source) == ["one", "two", "three"]
    assert list(source.read(2)) == [Document("some/texts:4", "three")]
    refused = (
        ("not/there", "body", r"'not/there' is no file, folder or glob pattern here, and no dataset .*\(ConnectionError: Couldn't reach the hub\)"),
        ("some/texts", "text", r"some/texts has no column 'text' \(set text_key; legal: body, id\)"),
        ("some/texts", "id", "column 'id' does not hold strings but int64"),
        ("some/splits", "body", "split: must name one split of some/splits"),
    )
    for stream, (name, key, words) in product((False, True), refused):
        with pytest.raises(ConfigError, match=words):
            sources.open_source(name, text_key=key, stream=stream)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-mixers\[text\]'"):
        sources.open_source("some/texts", text_key="body")
    for name in ("some/texts.jsonl", "./texts", "/some/texts", "a/b/c", "~/texts", "a?", "texts.parquet"):
        with pytest.raises(ConfigError, match="does not exist"):
            sources.open_source(name, text_key="body")


def test_streamed_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library streams local files here, as it does those of the hub."""
    datasets = pytest.importorskip("datasets", reason="needs the extra text")
    everything = [f"{name} {i}" for name in "ab" for i in range(50)]
    for name in "ab":
        texts = {"text": [text for text in everything if text[0] == name], "id": list(range(50))}
        datasets.Dataset.from_dict(texts).to_parquet(str(tmp_path / f"{name}.parquet"), batch_size=7)
        (tmp_path / f"{name}.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts["text"]))
    original = datasets.load_dataset

    def load(kind: str, subset: None, **options: object) -> object:  # noqa: ARG001
        return original(kind, data_files=str(tmp_path / f"*.{kind}"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for kind, units in (("json", 2), ("parquet", 2)):  # a file each; 16 row groups
        source = sources.open_source(kind, text_key="text", stream=True)
        assert len(source) == units
        assert documents_of(source) == everything
    monkeypatch.setattr(sources, "UNIT_GROUPS", 3)
    source = sources.open_source("parquet", text_key="text", stream=True)
    assert len(source) == (6 if hasattr(datasets.IterableDataset, "reshard") else 2)
    assert documents_of(source) == everything
    index = prepare(tmp_path / "out", source, ByteTokenizer(), SETTINGS, origin={}, workers=1)
    assert index.total("train").documents + index.total("validation").documents == 100
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(ConfigError, match=r"source: parquet cannot be read \(FileNotFoundError: .*\); what is finished is kept"):
        documents_of(source)
    with pytest.raises(ConfigError, match="source: json has no column 'body'"):
        sources.open_source("json", text_key="body", stream=True)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text('{"text": 1}')
    with pytest.raises(ConfigError, match=r"source: json: ('text' is not a string but int|column 'text' does not hold strings but int64)"):
        documents_of(sources.open_source("json", text_key="text", stream=True))


def test_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra text")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    arguments = ["--source=some/texts", "--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-m", "recipes", "prepare", *arguments], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: source: 'some/texts' is no file, folder or glob pattern here, and no dataset that can be loaded")
    assert "check the name and the network, or download its files" in done.stderr
    assert not (tmp_path / "out").exists()


PLACES = {  # source, out, and whether the one would find what is in the other
    "the same": ("texts", "texts", True),
    "the same, by another way": ("texts", "texts/../texts/new/..", True),
    "inside": ("texts", "texts/new/out", True),
    "by a link": ("link", "texts/out", True),
    "hidden": ("texts", "texts/.out", False),
    "beside": ("texts", "texts2", False),
    "beside, in a folder around": ("texts/deep", "texts/out", False),
    "beside a file": ("texts/a.txt", "texts/out", False),
    "any file of a pattern": ("texts/**", "texts/out", True),
    "two levels of a pattern": ("texts/*/*", "texts/out", True),
    "one level of a pattern": ("texts/*", "texts/out", False),
    "the index": ("texts/**/*.json*", "texts/out", True),
    "other names": ("texts/**/*.txt", "texts/out", False),
    "hidden from a pattern": ("texts/**/*", "texts/.out", False),
}


@pytest.mark.parametrize("case", PLACES)
def test_shards_do_not_become_part_of_their_source(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they would not, the same command has nothing to do the second time."""
    monkeypatch.chdir(tmp_path)
    Path("texts/deep").mkdir(parents=True)
    Path("link").symlink_to("texts")
    for name in ("a.txt", "deep/b.txt", "deep/c.json"):
        Path("texts", name).write_text("text")
    before = sorted(tmp_path.rglob("*"))
    source, out, inside = PLACES[case]
    command = ["prepare", f"--source={source}", f"--out={out}", "--tokenizer=bytes", "--workers=0"]
    if inside:
        assert main(command) == 2
        said = f"error: out: its shards would be part of --source {source}; give a folder outside of it"
        assert capsys.readouterr().err.splitlines() == [said]
        assert sorted(tmp_path.rglob("*")) == before
    else:
        assert main(command) == main(command) == 0
