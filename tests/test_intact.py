"""Whether a checkpoint, of one file or sharded, is what was written; and a folder that takes the place of another."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cli_cases import flip

from lit_modules import intact
from lit_modules.checkpoint import read_checkpoint
from lit_modules.intact import check_intact
from lit_modules.sharded import seal
from mixers.errors import ConfigError


@pytest.mark.fault(
    "flipped bit", "any bit of the directory of a checkpoint's file", "nothing: one line says so, or the content is the same", each=200
)
def test_flips_in_a_directory(tmp_path: Path) -> None:
    file, tensor = tmp_path / "a.ckpt", torch.arange(100.0)
    torch.save({"a": tensor, "b": 1}, file)
    whole = file.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    draw, refused = random.Random(0), 0
    for _ in range(200):
        content = bytearray(whole)
        content[draw.randrange(directory, len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        with suppress(ConfigError):
            check_intact(file, "it")
            found = read_checkpoint(file)
            assert torch.equal(found["a"], tensor)
            assert found["b"] == 1
            continue
        refused += 1
    assert refused > 50


@pytest.mark.fault(
    "damaged sharded checkpoint", "one bit of a tensor; any bit of its index; a missing and a truncated shard", "nothing: one line names it", each=103
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_damaged_sharded_checkpoint(tmp_path: Path) -> None:
    folder, tensor = tmp_path / "last.ckpt", torch.arange(100.0)
    dcp.save({"state_dict": {"a": tensor, "b": 1}}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 1}, folder / "meta.pt")
    with pytest.raises(ConfigError, match=r"was never finished \(it holds no metadata.crc32\)"):
        check_intact(folder, "it")
    seal(folder)
    check_intact(folder, "it")
    index, draw = (folder / ".metadata").read_bytes(), random.Random(0)
    for _ in range(100):
        content = bytearray(index)
        content[draw.randrange(len(index))] ^= 1 << draw.randrange(8)
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(ConfigError, match=r"it: is damaged: its .metadata does not match its checksum"):
            check_intact(folder, "it")
    (folder / ".metadata").write_bytes(index)
    (shard,) = folder.glob("*.distcp")
    whole = shard.read_bytes()
    flip(shard, tensor)
    with pytest.raises(ConfigError, match=rf"it/{shard.name}: is damaged: .* does not match its checksum"):
        check_intact(folder, "it")
    shard.write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match="truncated"):
        check_intact(folder, "it")
    shard.unlink()
    with pytest.raises(ConfigError, match="missing"):
        check_intact(folder, "it")


def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a whole one at every moment, though for one moment under another name."""
    target, seen = tmp_path / "last.ckpt", []

    def make(content: str) -> Path:
        part = intact.part_of(target)
        part.mkdir()
        (part / "meta.pt").write_text(content)
        return part

    rename = Path.rename

    def watched(self: Path, to: Path) -> Path:
        done = rename(self, to)
        seen.append(sorted(f"{file.parent.name}: {file.read_text()}" for file in tmp_path.glob("*.ckpt/meta.pt")))
        return done

    monkeypatch.setattr(Path, "rename", watched)
    intact.replace(make("one"), target)
    intact.replace(make("two"), target)
    assert seen == [["last.ckpt: one"], ["last.old.ckpt: one"], ["last.ckpt: two", "last.old.ckpt: one"]]
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
