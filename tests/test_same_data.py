"""`fit` trains on the bytes that were prepared, and goes on with the data and settings of its checkpoint: anything else is said, or refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_cases import CONFIG, one_thread  # noqa: F401
from shard_cases import SETTINGS, prepared, write_jsonl

from lit_modules.checkpoint import read_checkpoint
from lit_modules.data import verify
from recipes.__main__ import main
from recipes.commands.config_files import merge

ROOT = Path(__file__).parents[1]
FIT = ["fit", "--config=config.yaml"]


@pytest.fixture(name="original", scope="module")
def original_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a config and a run. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("original")
    for name, documents in (("shards", 60), ("others", 61)):
        (folder / f"{name}_text").mkdir()
        prepared(folder / name, write_jsonl(folder / f"{name}_text", documents), SETTINGS)
    config = merge(CONFIG, {"data": {"path": "shards", "val_path": None}, "trainer": {"num_sanity_val_steps": 0, "enable_progress_bar": False}})
    (folder / "config.yaml").write_text(yaml.safe_dump(merge(config, {"summary": {"max_new_tokens": 0}})))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(FIT) == 0
    return folder


@pytest.fixture(name="here")
def here_fixture(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    shutil.copytree(original, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/config/*"), key=lambda run: (run / "config.yaml").stat().st_mtime_ns)


def receipt_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "receipt.json").read_text())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[64] ^= 1
    file.write_bytes(content)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "fit") -> str:
    """The one line with which a training is refused; none is begun."""
    capsys.readouterr()
    before = runs(Path())
    assert main([command, *FIT[1:], *arguments]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.strip())
    assert runs(Path()) == before
    return line


# Shards


def test_a_training_verifies_its_shards_once(original: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = len([*(here / "shards").iterdir()]) - 1
    known = f"{files} of {files} files"
    assert receipt_of(*runs(original))["data"]["verified"] == known
    assert main([*FIT, "--trainer.max_steps=1"]) == 0
    assert f"data: verified: {known} of the shards have the checksum in their index\n" in capsys.readouterr().out
    monkeypatch.setattr(verify, "_hash", lambda *_: pytest.fail("is read again"))
    assert main([*FIT, "--trainer.max_steps=1", "--trainer.fast_dev_run=true"]) == 0
    assert f"data: verified: {known} of the shards" in capsys.readouterr().out


@pytest.mark.fault("shard changed after `prepare`", "one bit of a .tokens or .starts file", "nothing: `fit` names the file before the first step")
@pytest.mark.parametrize("suffix", ["tokens", "starts"])
@pytest.mark.usefixtures("here")
def test_a_changed_shard_is_refused(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    flip(Path(f"shards/train-00000.{suffix}"))
    assert refused(capsys) == (
        f"error: data.path: shards/train-00000.{suffix} does not have the checksum of its index: it was changed or is corrupt; "
        "remove it and give the `prepare` command of its folder again (python -m recipes prepare --check --out shards reads all of them)"
    )
    flip(Path(f"shards/train-00000.{suffix}"))
    shutil.copytree("shards", "validation")
    flip(Path(f"validation/validation-00000.{suffix}"))
    assert "error: data.val_path: validation/validation-00000." in refused(capsys, "--data.val_path=validation")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_verifies_what_it_reads(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = runs(here)
    arguments = [command, f"--ckpt_path={run / 'checkpoints/last.ckpt'}"]
    flip(Path("shards/train-00000.tokens"))  # is not read
    assert main(arguments) == 0
    said = capsys.readouterr()
    line = "data: verified: 2 of 2 files of the shards have the checksum in their index"
    assert (line in said.err) == (line not in said.out) == (command == "predict")
    flip(Path("shards/validation-00000.tokens"))
    assert main(arguments) == 2
    assert "error: data.path: shards/validation-00000.tokens does not have the checksum of its index" in capsys.readouterr().err


def test_what_is_not_verified_is_said(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verify, "SECONDS", 0.0)
        assert main(FIT) == 0
        assert main(FIT) == 0
    files = len([*(here / "shards").iterdir()]) - 1
    rest = "the others were not read: `prepare --check` reads all, once"
    assert f"data: verified: 0 of {files} files of the shards have the checksum in their index; {rest}" in capsys.readouterr().out.splitlines()
    whole, none, again = runs(here)
    assert receipt_of(none)["data"]["verified"] == f"0 of {files} files"
    doubt = "what was not read may be other data than its index says"
    for one, other, words in ((whole, none, (files, 0)), (none, again, (0, 0))):
        assert main(["diff", str(one), str(other)]) == 0
        expected = "note: data.verified: a {} of {f} files, b {} of {f} files: {}".format(*words, doubt, f=files)
        assert capsys.readouterr().out.splitlines()[:2] == [expected, "no difference recorded"]
    old = receipt_of(whole)
    del old["data"]["verified"]  # what an older version wrote
    (again / "receipt.json").write_text(json.dumps(old))
    assert main(["diff", str(again), str(whole)]) == 0
    assert f"note: data.verified: a none, b {files} of {files} files: {doubt}" in capsys.readouterr().out
    assert main(["diff", str(whole), str(whole)]) == 0
    assert "note" not in capsys.readouterr().out


@pytest.mark.fault("shard changed, two processes", "torchrun's environment, DDP: one bit", "nothing: both end with the line that names the file")
def test_every_process_ends(here: Path, tmp_path: Path) -> None:
    before = runs(here)
    flip(here / "shards/train-00000.tokens")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "recipes", *FIT, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1"]
    begun = []
    for rank in ("0", "1"):
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
        env = {**os.environ, **names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        said = (tmp_path / rank).open("w")
        begun.append(subprocess.Popen(command, cwd=here, env=env, stdout=said, stderr=said))
    assert [process.wait(timeout=200) for process in begun] == [2, 2]
    for rank in ("0", "1"):
        text = (tmp_path / rank).read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("error: "))
        assert line.startswith("error: data.path: shards/train-00000.tokens does not have the checksum of its index")
        assert "Traceback" not in text
    assert runs(here) == before


# Going on from a checkpoint

RESUME = ["--ckpt_path=last", "--model.max_tokens=384"]
OTHER_DATA = "training documents (hash) of data.path, val_fraction and split_seed: "


@pytest.mark.fault("resumed with other data or settings", "path, seed, boundaries and length changed", "nothing: one line names each", each=4)
@pytest.mark.usefixtures("here")
def test_other_data_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    otherwise = "was trained otherwise: "
    line = refused(capsys, *RESUME, "--seed_everything=1")
    assert line.endswith(f"{otherwise}seed_everything: 0 there, 1 here. Keep what was, or go on with --may_change seed")
    line = refused(capsys, *RESUME, "--data.document_boundaries=false", command="preflight")
    assert line.endswith(
        f"{otherwise}data.document_boundaries: True there, False here. Keep what was, or go on with --may_change document_boundaries"
    )
    line = refused(capsys, *RESUME, "--data.seq_len=16")
    words = "tokens an optimizer step: 64 there, 32 here; data.seq_len: 32 there, 16 here. Keep what was, or go on with --may_change batch,seq_len"
    assert line.endswith(otherwise + words)
    line = refused(capsys, *RESUME, "--data.path=others", "--seed_everything=1", "--may_change=seed")
    assert otherwise + OTHER_DATA in line
    assert line.endswith(". Keep what was, or go on with --may_change data,seed")
    line = refused(capsys, "--may_change=seed,dta")
    assert "may_change: unknown name 'dta'; did you mean 'data'? (legal: batch, data, document_boundaries, seed, seq_len, tokenizer)" in line


def test_what_is_free_to_change(original: Path, here: Path) -> None:
    """The shards at another place, workers, and the batch with the same tokens a step."""
    (here / "shards").rename(here / "elsewhere")
    free = ["--data.path=elsewhere", "--data.num_workers=1", "--data.batch_size=1", "--trainer.accumulate_grad_batches=2"]
    assert main([*FIT, *RESUME, *free]) == 0
    assert receipt_of(runs(here)[-1])["resumed"]["changed"] == {}
    state, before = (read_checkpoint(runs(folder)[-1] / "checkpoints/last.ckpt")["PackedText"] for folder in (here, original))
    assert state == {**before, "samples": 12}


def test_what_may_change(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first,) = runs(here)
    with pytest.warns(UserWarning, match="seed_everything: 0 in the checkpoint's training, 1 here; training starts at sample 0 of these data"):
        assert main([*FIT, *RESUME, "--seed_everything=1", "--data.path=others", "--may_change=seed,data"]) == 0
    run = runs(here)[-1]
    changed = receipt_of(run)["resumed"]["changed"]
    assert changed.keys() == {"seed", "data"}
    assert changed["seed"] == "0 -> 1"
    assert read_checkpoint(run / "checkpoints/last.ckpt")["PackedText"]["samples"] == 4
    capsys.readouterr()
    assert main(["diff", str(first), str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "resumed.changed.seed: a (none), b 0 -> 1" in lines
    assert f"resumed.changed.data: a (none), b {changed['data']}" in lines
    # what goes on from there goes on with that
    assert main([*FIT, "--ckpt_path=last", "--model.max_tokens=448", "--seed_everything=1", "--data.path=others"]) == 0
    assert read_checkpoint(runs(here)[-1] / "checkpoints/last.ckpt")["PackedText"]["samples"] == 6


def test_old_checkpoints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that hold one string for all settings go on, and are held to it; those that hold nothing are refused."""
    path = runs(here)[0] / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    settings = content["PackedText"].pop("settings")
    order = f"{settings['data']} {settings['tokenizer']} {settings['seq_len']} {settings['seed']}"
    torch.save({**content, "PackedText": {**content["PackedText"], "order": order}}, path)
    assert refused(capsys, *RESUME, "--seed_everything=1").endswith("--may_change seed")
    torch.save({**content, "PackedText": {**content["PackedText"], "order": order}}, here / "old.ckpt")
    torch.save({**content, "PackedText": {}}, path)
    assert refused(capsys, *RESUME).endswith("last.ckpt: the checkpoint's state of the data cannot be read: it holds no samples and settings")
    with pytest.warns(UserWarning, match=r"does not say the data.document_boundaries \(here True\) of its training"):
        assert main([*FIT, "--ckpt_path=old.ckpt", "--model.max_tokens=384"]) == 0
    assert read_checkpoint(runs(here)[-1] / "checkpoints/last.ckpt")["PackedText"]["samples"] == 12
