"""Reading documents: what is found, in which order, and what a user sees when a file is wrong."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from lit_modules.data.builtin import standard_library
from lit_modules.data.corpus import check_text_key, read_corpus
from mixers.errors import ConfigError


def test_builtin_corpus() -> None:
    documents = dict(standard_library())
    assert sum(len(text.encode()) for text in documents.values()) > 5_000_000
    assert "def dumps(" in documents["json/__init__.py"]
    assert "asyncio/base_events.py" in documents
    assert "conditional" in documents["pydoc/topics/if"]
    assert "isinstance(obj, class_or_tuple" in documents["pydoc/builtins"]
    folders = {part for name in documents for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    assert "pydoc_data/topics.py" not in documents
    rendered = [text for name, text in documents.items() if name.startswith("pydoc/") and "topics" not in name]
    assert not any("0x7f" in text or sys.executable in text or str(Path.home()) in text for text in rendered)
    assert list(documents.items()) == list(standard_library())
    assert [document.name for document in read_corpus(None)] == [name for name in documents if documents[name].strip()]


def test_builtin_corpus_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"data\.path: this Python has no standard library source"):
        list(read_corpus(None))


def test_folder_file_and_glob(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"\xff")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"\xff")
    (tmp_path / "b" / "z.rst").write_bytes(b"\xef\xbb\xbfz\r\n")
    (tmp_path / "a.txt").write_text("é", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "c.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n{"text": ""}')
    pq.write_table(pa.table({"text": ["p", None, "q"], "id": [1, 2, 3]}), tmp_path / "d.parquet")
    expected = [("a.txt", "é"), ("b/z.rst", "z\r\n"), ("c.jsonl:1", "one"), ("c.jsonl:3", "two")]
    expected += [("d.parquet:0", "p"), ("d.parquet:2", "q")]
    assert list(read_corpus(str(tmp_path))) == expected
    assert list(read_corpus(str(tmp_path / "a.txt"))) == [("a.txt", "é")]
    assert [document.text for document in read_corpus(str(tmp_path / "**" / "*.[tr]*t"))] == ["é", "z\r\n"]


@pytest.mark.parametrize(
    ("files", "found"), [(["a.txt"], False), (["a.txt", "b.jsonl"], True), (["b.parquet"], True), ([], True)], ids=["text", "both", "parquet", "none"]
)
def test_a_text_key_that_no_file_has_use_for(files: list[str], found: bool, tmp_path: Path) -> None:
    """Without files, the path is what is wrong."""
    for name in files:
        (tmp_path / name).write_text("x")
    check_text_key("text", [], "text_key")
    with (
        nullcontext()
        if found
        else pytest.raises(ConfigError, match=r"text_key: 'body' would be looked up in no file: it is of \.jsonl and \.parquet")
    ):
        check_text_key("body", [str(tmp_path)], "text_key")


def test_text_key(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text('{"body": "one"}')
    pq.write_table(pa.table({"body": pa.array(["two"], pa.large_string())}), tmp_path / "b.parquet")
    assert [document.text for document in read_corpus(str(tmp_path), text_key="body")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "no documents"),
        ("a.txt", b"ab\xffcd", "not UTF-8 text (byte 0xff at offset 2)"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"t\xff', "not UTF-8 text (byte 0xff at offset 18)"),
        ("a.jsonl", b'{"body": 1, "id": 2}', "line 1 has no key 'text' (set data.text_key; legal: body, id)"),
        ("a.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": 1}', "line 1: 'text' is not a string but int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "line 2: 'text' is not a string but NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}', "surrogate"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
    ],
)
def test_unreadable_files(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        list(read_corpus(str(path)))
    message = str(caught.value)
    assert message.startswith(f"data.path: {path}")
    assert words in message
    assert "\n" not in message


def test_unusable_parquet_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(ConfigError, match=r"a\.parquet has no column 'text' \(set data\.text_key; legal: id, body\)"):
        list(read_corpus(str(path)))
    with pytest.raises(ConfigError, match="column 'id' does not hold strings but int64"):
        list(read_corpus(str(path), text_key="id"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"data\.path: .*a\.parquet needs pyarrow: pip install"):
        list(read_corpus(str(path), text_key="body"))


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.txt", ""])
def test_missing_path(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: .*does not exist"):
        list(read_corpus(str(tmp_path / path) if path else ""))


def test_empty_folder_names_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.test_path: .* is a folder without documents"):
        list(read_corpus(str(tmp_path), key="data.test_path"))
