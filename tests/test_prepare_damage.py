"""`prepare` where files were damaged, or are of something else: the shards are the same bytes, or one line says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_cases import here_fixture, one_thread  # noqa: F401
from shard_cases import SETTINGS, content_of, prepared, stopped, write_jsonl

from lit_modules.data import sources
from lit_modules.data.prepare import Progress
from lit_modules.data.shards import INDEX, WORK, checksum_of, read_index
from lit_modules.data.verify import check_shards
from mixers.errors import ConfigError
from recipes.__main__ import main

OTHER = SETTINGS._replace(val_fraction=0.5)


@pytest.fixture(autouse=True)
def _short_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 500)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path)


@pytest.fixture
def whole(tmp_path: Path, source: Path) -> dict[str, bytes]:
    """What nobody stopped or damaged."""
    return content_of(prepared(tmp_path / "whole", source).folder)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": flip,
    "cut": halve,
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "another's": lambda file: shutil.copy(file.parent / "00000008.part", file),
}


# --- stopped in the middle ---


@pytest.mark.fault(
    "a file of a stopped `prepare` is damaged",
    "one bit is flipped; cut, empty, zeros, longer, or another file's content",
    "nothing: what it held is made again",
    each=2,
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_part_or_record_that_is_damaged(damage: str, tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    for number, pattern in enumerate(("*.part", "*.record")):
        out = stopped(tmp_path / str(number), source, 9)
        files = sorted((out / WORK).glob(pattern))
        assert files
        DAMAGES[damage](files[0])
        assert content_of(prepared(out, source).folder) == whole


def test_a_part_that_is_damaged_before_it_is_joined(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    damaged = []

    def report(_: Progress) -> None:
        for part in sorted((tmp_path / "out" / WORK).glob("*.part"))[:1]:
            flip(part)
            damaged.append(part)

    assert content_of(prepared(tmp_path / "out", source, report=report).folder) == whole
    assert len(damaged) > 3


@pytest.mark.fault(
    "the plan of a stopped `prepare` is damaged",
    "empty, cut, one bit; gone on with by the same settings, and by others",
    "nothing: units of one are never joined with those of the other",
    each=2,
)
@pytest.mark.parametrize("damage", ["one bit", "cut", "empty"])
def test_a_plan_that_is_damaged(damage: str, tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    """Parts and records know what they are of: the same settings go on with them, and others take none."""
    heard: list[Progress] = []
    out = stopped(tmp_path / "out", source, 9)
    DAMAGES[damage](out / WORK / "plan")
    assert content_of(prepared(out, source, report=heard.append).folder) == whole
    assert heard[0].earlier_units == 9
    out = stopped(tmp_path / "other", source, 9)
    DAMAGES[damage](out / WORK / "plan")
    other = content_of(prepared(tmp_path / "others", source, OTHER).folder)
    assert content_of(prepared(out, source, OTHER, report=heard.append).folder) == other != whole
    assert heard[-1].earlier_units == 0


def test_a_plan_that_something_has_come_of(tmp_path: Path, source: Path) -> None:
    out = stopped(tmp_path / "out", source, 1)
    before = content_of(out / WORK)
    with pytest.raises(ConfigError, match=r"was begun with another val_fraction \(0\.2, not 0\.5\); give another folder, or remove this one"):
        prepared(out, source, OTHER)
    assert content_of(out / WORK) == before


def test_a_start_that_failed_stands_in_nobodys_way(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        prepared(tmp_path / "out", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="it holds no documents"):  # which is known when all is done
        prepared(tmp_path / "out", tmp_path / "a.txt")
    assert content_of(prepared(tmp_path / "out", source).folder) == whole


def test_files_of_others_are_left_alone(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out", source, 9)
    others = ("notes.tmp", "my.tokens", "train-0.tokens")
    ours = ("train-00000.tmp", "train-00000.starts.7.tmp", "train-00099.tokens", "shards.json.7.tmp", f"{WORK}/plan.7.tmp")
    for name in (*others, *ours):
        (out / name).write_text("x")
    assert content_of(prepared(out, source).folder) == whole | dict.fromkeys(others, b"x")


@pytest.mark.parametrize("name", ["plan", "00000000.part", "00000.record"])
def test_a_folder_in_the_place_of_a_file(name: str, tmp_path: Path, source: Path) -> None:
    (tmp_path / "out" / WORK / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"^out: .*{name} cannot be written: Is a directory; mend that, or give another folder$"):
        prepared(tmp_path / "out", source)


# --- complete shards ---


@pytest.mark.fault("a file of finished shards is cut or missing", "cut, deleted; the same command again", "nothing: that shard is made again", each=2)
@pytest.mark.parametrize("suffix", ["tokens", "starts"])
def test_complete_shards_that_are_damaged(suffix: str, tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    """Only the units of that shard are read, also when the repair was stopped."""
    file = tmp_path / "whole" / f"train-00002.{suffix}"
    for damage, words in ((Path.unlink, "cannot be read: No such file or directory"), (halve, "it is truncated or not of this index")):
        damage(file)
        said: list[str] = []
        heard: list[Progress] = []
        units = json.loads(whole[INDEX])["origin"]["shard_units"]
        assert units[2] > 1
        stopped(file.parent, source, sum(units) - 1)
        assert content_of(prepared(file.parent, source, say=said.append, report=heard.append).folder) == whole
        assert (said, len(heard), heard[0].earlier_units) == ([], 1, sum(units) - 1)
        damage(file)
        prepared(file.parent, source, say=said.append, report=heard.append)
        assert len(said) == 1
        assert words in said[0]
        assert len(heard) == 1 + units[2]
        assert content_of(file.parent) == whole


@pytest.mark.parametrize("units", [None, [], "1", [1], [0.5], [-1]])
def test_shards_whose_units_are_not_known(units: object, tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    """As in the index of an older version: all of them are made again."""
    content = json.loads(whole[INDEX])
    content["origin"]["shard_units"] = units
    (tmp_path / "whole" / INDEX).write_text(json.dumps(content | {"checksum": checksum_of(content)}))
    (tmp_path / "whole" / "train-00002.starts").unlink()
    heard: list[Progress] = []
    assert content_of(prepared(tmp_path / "whole", source, report=heard.append).folder) == whole
    assert heard[0].earlier_units == 0


@pytest.mark.usefixtures("whole")
def test_shards_without_an_index(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "whole"
    halve(folder / INDEX)
    with pytest.raises(ConfigError, match=r"out: .*shards\.json is corrupt \(it is not JSON\): remove its folder and prepare the shards again"):
        prepared(folder, source)
    (folder / INDEX).unlink()
    before = content_of(folder)
    with pytest.raises(ConfigError, match=r"out: .*whole has no shards\.json: remove that folder and prepare its shards again"):
        prepared(folder, source)
    assert content_of(folder) == before
    shutil.rmtree(folder)
    check_shards(prepared(folder, source))


@pytest.mark.usefixtures("whole")
def test_a_shard_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, *_: object) -> None:
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(np, "fromfile", fail)
    with pytest.raises(ConfigError, match=r"data\.path: .*train-00000\.starts cannot be read: Input/output error"):
        check_shards(read_index(tmp_path / "whole"))


# --- the command line ---


def test_a_shard_of_another_text_is_not_made_again(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    """The other shards hold the rest of the old one: some documents would be there twice, others not at all."""
    out = prepared(tmp_path / "out", source).folder
    text, lost = source.read_text(), out / "train-00001.tokens"
    for repeated in range(2):
        if lost.exists():
            lost.unlink()
        source.write_text("".join(reversed(text.splitlines(keepends=True))))
        with pytest.raises(ConfigError, match=r"train-00001 made again is not what it was .*: the source has other text now; restore it, or remove"):
            prepared(out, source)
        assert not lost.exists(), repeated
    source.write_text(text)
    assert content_of(prepared(out, source).folder) == whole


def test_what_fit_advises_works(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare = [
        "prepare",
        f"--source={write_jsonl(here)}",
        "--out=shards",
        "--tokenizer=bytes",
        "--val_fraction=0.2",
        "--shard_tokens=1500",
        "--workers=0",
    ]
    fit = ["fit", "--config=small.yaml", "--data.path=shards", "--data.val_path=null", "--data.val_tokens=64"]
    assert main(prepare) == 0
    file = Path("shards/train-00001.tokens")
    halve(file)
    assert main(fit) == 2
    assert "it is truncated or not of this index; give the `prepare` command of its folder again" in capsys.readouterr().err
    assert main(prepare) == 0
    assert f"note: {file} has " in capsys.readouterr().out
    flip(file)
    assert main(fit) == 2
    assert f"{file} does not have the checksum of its index: it was changed or is corrupt; remove it and give" in capsys.readouterr().err
    file.unlink()
    assert main(prepare) == 0
    assert main(fit) == 0
