"""Text that Python cannot take up, though it is written as its file's format asks: one line, wherever it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import here_fixture, one_thread  # noqa: F401

from lit_modules.data.processes import unordered
from lit_modules.data.sources import DatasetSource
from mixers.errors import ConfigError
from recipes.__main__ import main

pa = pytest.importorskip("pyarrow", reason="needs the extra text")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..
GOOD = b'{"text": "good"}\n'
LINES = {  # what follows two good lines, and what is said of it
    "digits": (b'{"text": "x", "id": ' + 5000 * b"7" + b"}\n", "it has an integer of more than 4,300 digits"),
    "depth": (b'{"text": "x", "id": ' + 100_000 * b"[" + 100_000 * b"]" + b"}\n", "its JSON is nested too deeply"),
}


def not_utf8() -> object:
    """Six strings, the fifth of which is no text."""
    content = b"abcdx\xfff"
    offsets = pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in (0, 1, 2, 3, 4, 6, 7)))
    return pa.Array.from_buffers(pa.string(), 6, [None, offsets, pa.py_buffer(content)])


def write(case: str) -> tuple[str, str, str]:
    """A damaged file in the current folder; what `fit` and what `prepare` says of it."""
    if case == "bytes":
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": not_utf8()}), "damaged.parquet", row_group_size=2)
        line = "damaged.parquet row 4 is not UTF-8 text (byte 0xff at offset 1)"
        return "damaged.parquet", line, line
    content, words = LINES[case]
    Path("damaged.jsonl").write_bytes(2 * GOOD + content)
    return "damaged.jsonl", f"damaged.jsonl line 3 cannot be read: {words}", f"damaged.jsonl line at byte {2 * len(GOOD)} cannot be read: {words}"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", ["bytes", *LINES])
def test_one_line_that_says_where(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, in_fit, in_prepare = write(case)
    assert main(["fit", "--config=small.yaml", f"--data.path={path}"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: data.path: {in_fit}"]
    assert not Path("runs").exists()
    for workers in (0, 1):
        assert main(["prepare", f"--source={path}", "--tokenizer=bytes", f"--out=out{workers}", f"--workers={workers}"]) == 2
        assert capsys.readouterr().err.splitlines() == [f"error: source: {in_prepare}"]


def test_a_name_of_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "other": ["y"]}), file)
    file.write_bytes(file.read_bytes().replace(b"other", b"\xff\xfeher"))
    arguments = [f"--source={file}", "--tokenizer=bytes", f"--out={tmp_path / 'out'}", "--workers=0"]
    code, said = main(["prepare", *arguments]), capsys.readouterr().err.splitlines()
    assert (code, len(said)) == (2, 1)
    assert said[0].startswith(f"error: source: {file} is not a readable Parquet file: ")


def test_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra text")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset(pa.table({"text": not_utf8()})))
    with pytest.raises(ConfigError, match=r"source: some/texts: a text of its rows 0 \.\. 5 is not UTF-8"):
        list(DatasetSource("some/texts", "text", None, "train").read(0))


# --- errors of worker processes ---


class OddError(Exception):
    """Cannot be made again from what it was made of."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fails(item: str) -> None:
    if item == "odd":
        raise OddError(1, 2)
    {}[item]


def test_what_a_worker_did_not_expect_is_no_killed_worker() -> None:
    """It comes through as what it is, and says where it arose."""
    with pytest.raises(KeyError, match="missing") as caught:
        list(unordered(fails, ["missing"], 1))
    assert "in fails" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="OddError: 1 and 2"):
        list(unordered(fails, ["odd"], 1))
