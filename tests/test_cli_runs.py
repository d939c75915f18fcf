"""What `fit` leaves behind and goes on from: run folders, saved configs, checkpoints, precedence; and `generate`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_cases import CONFIG, RUN_FILES, here_fixture, last, one_thread, run_of, trained_fixture  # noqa: F401

from lit_modules.checkpoint import read_checkpoint
from lit_modules.lit_lm import LitLM
from recipes.__main__ import main
from recipes.commands.checkpoints import with_checkpoint
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import collect
from recipes.commands.run_folder import make_run_folder

# --- the run folder ---


def test_run_folder_holds_everything(trained: Path) -> None:
    run = run_of(trained)
    assert run.parent == trained / "runs" / "small"
    names = {file.name for file in run.iterdir()}
    assert {name for name in names if not name.startswith("events.out.tfevents")} == RUN_FILES
    assert len(names) == len(RUN_FILES) + 1
    assert (run / "metrics.csv").read_text().count("\n") > 4
    assert read_checkpoint(last(trained))["global_step"] == 4
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["lm"] == {**CONFIG["model"]["lm"], "norm_eps": 1e-5, "init_std": 0.02}
    assert saved["trainer"]["default_root_dir"] == "runs/small"
    assert saved["trainer"]["check_val_every_n_epoch"] is None
    assert saved["seed_everything"] == 0


def test_saved_config_runs_again_unchanged(here: Path, trained: Path) -> None:
    saved = run_of(trained) / "config.yaml"
    assert main(["fit", "--config", str(saved), "--trainer.default_root_dir=elsewhere"]) == 0
    (run,) = here.glob("elsewhere/*")
    again = yaml.safe_load((run / "config.yaml").read_text())
    again["trainer"]["default_root_dir"] = "runs/small"
    assert again == yaml.safe_load(saved.read_text())
    weights = [read_checkpoint(file)["state_dict"] for file in (last(trained), run / "checkpoints" / "last.ckpt")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (here / "runs").exists()


def test_a_config_may_hold_characters_of_every_plane(here: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = yaml.safe_load((run_of(trained) / "config.yaml").read_text())
    wrong["data"]["path"] = "no 𠮷, no 💥"
    (here / "wide.yaml").write_text(yaml.safe_dump(wrong, allow_unicode=True), encoding="utf-8")
    assert main(["fit", "--config", "wide.yaml"]) != 0
    assert "no 𠮷, no 💥" in capsys.readouterr().err


def test_every_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [make_run_folder(str(tmp_path / "runs")).path for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.is_dir() for folder in folders)


def test_fast_dev_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.rglob("*"))
    assert main(["fit", "--config", "small.yaml", "--trainer.fast_dev_run=true"]) == 0
    assert sorted(here.rglob("*")) == before
    assert "run folder: none" in capsys.readouterr().out


def test_last_checkpoint_is_that_of_the_last_step(here: Path) -> None:
    """Lightning's ModelCheckpoint alone would leave that of step 3."""
    assert main(["fit", "--config", "small.yaml", "--checkpoint.every_n_train_steps=3"]) == 0
    assert read_checkpoint(last(here))["global_step"] == 4
    assert {file.name for file in last(here).parent.iterdir()} == {"last.ckpt", "epoch=0-step=3.ckpt"}


# --- checkpoints and precedence ---


def test_last_goes_on_where_the_newest_run_stopped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    first = last(here)
    assert main(["fit", "--config", "small.yaml", "--model.max_tokens=384", "--ckpt_path=last"]) == 0
    second = max(here.glob("runs/small/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    assert second != first
    assert (read_checkpoint(first)["global_step"], read_checkpoint(second)["global_step"]) == (4, 6)
    saved = yaml.safe_load((second.parents[1] / "config.yaml").read_text())
    assert Path(saved["ckpt_path"]).resolve() == first.resolve()
    assert "step 6/6" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_settings_come_from_command_line_then_file_then_checkpoint_then_default(trained: Path) -> None:
    """The checkpoint has gdn2 with 2 heads of 4; its other settings are the defaults."""

    def gdn2(*arguments: str) -> dict[str, Any]:
        request, _ = with_checkpoint(collect([*arguments, f"--ckpt_path={last(trained)}"]))
        return MixersCLI("fit", request).config.model.lm.mixers["gdn2"]

    Path("file.yaml").write_text("model: {lm: {mixers: {gdn2: {head_dim: 5, conv_size: 3}}}}")
    assert gdn2() == {"num_heads": 2, "head_dim": 4}
    assert gdn2("--config=file.yaml") == {"num_heads": 2, "head_dim": 5, "conv_size": 3}
    assert gdn2("--config=file.yaml", "--model.lm.mixers.gdn2.head_dim=6") == {"num_heads": 2, "head_dim": 6, "conv_size": 3}


def test_checkpoint_alone_says_what_its_model_is(here: Path, trained: Path) -> None:
    assert main(["fit", f"--ckpt_path={last(trained)}", "--data.path=corpus.txt", "--data.val_path=corpus.txt", "--data.seq_len=32",
                 "--data.batch_size=2", "--model.max_tokens=257", "--model.warmup_tokens=0", "--trainer.accelerator=cpu",
                 "--trainer.max_steps=5"]) == 0  # fmt: skip
    assert read_checkpoint(last(here))["global_step"] == 5


def test_settings_of_the_optimizer_come_from_the_command_line(here: Path, trained: Path) -> None:
    """A checkpoint's optimizer brings its own along."""
    assert main(["fit", "--config=small.yaml", f"--ckpt_path={last(trained)}", "--model.max_tokens=320", "--model.weight_decay=0.5",
                 "--model.betas=[0.5, 0.25]"]) == 0  # fmt: skip
    (state,) = read_checkpoint(last(here))["optimizer_states"]
    assert [(group["weight_decay"], tuple(group["betas"])) for group in state["param_groups"]] == [(0.5, (0.5, 0.25)), (0.0, (0.5, 0.25))]


def test_settings_that_are_not_the_models_come_from_the_command_line(here: Path, trained: Path) -> None:
    """Lightning's own command line would take lr from the checkpoint's hyperparameters."""
    assert main(["fit", "--config=small.yaml", f"--ckpt_path={last(trained)}", "--model.lr=0.5", "--model.max_tokens=320"]) == 0
    saved = yaml.safe_load((run_of(here) / "config.yaml").read_text())
    assert saved["model"]["lr"] == 0.5


# --- generate ---


def generated(trained: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["generate", f"--ckpt_path={last(trained)}", "--prompt=the ", *arguments]) == 0
    return capsys.readouterr().out


def test_generate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(trained, capsys, "--seed=3", "--max_new_tokens=20")
    assert text == generated(trained, capsys, "--seed=3", "--max_new_tokens=20")
    assert text != generated(trained, capsys, "--seed=4", "--max_new_tokens=20")
    assert text.startswith("the ")
    assert text.endswith("\n")
    likeliest = generated(trained, capsys, "--temperature=0", "--seed=3")
    assert likeliest == generated(trained, capsys, "--temperature=0", "--seed=4")
    assert text == generated(trained, capsys, "--seed=3", "--max_new_tokens=20", "--tokenizer=bytes", "--device=cpu")


def test_generate_reads_no_damaged_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """torch.load does not see a bit that is wrong."""
    content = bytearray(last(trained).read_bytes())
    weight = read_checkpoint(last(trained))["state_dict"]["lm.head.weight"].contiguous().numpy().tobytes()
    content[content.index(weight) + 1] ^= 4
    (tmp_path / "flipped.ckpt").write_bytes(content)
    assert main(["generate", f"--ckpt_path={tmp_path / 'flipped.ckpt'}", "--tokenizer=bytes"]) == 2
    assert "flipped.ckpt: is damaged: " in capsys.readouterr().err


def test_generate_stops_at_the_end_of_the_document(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A model whose head says nothing but the separator."""
    content = read_checkpoint(last(trained))
    content["state_dict"] = {name: value.clone() for name, value in content["state_dict"].items()}
    content["state_dict"]["lm.head.weight"].zero_()[256] = 1e4 * torch.ones(16)
    file = tmp_path / "stops.ckpt"
    torch.save(content, file)
    ends = []
    for sign in (1, -1):  # the separator is the likeliest token for one sign of the head's input
        content["state_dict"]["lm.head.weight"][256] *= sign
        torch.save(content, file)
        capsys.readouterr()
        assert main(["generate", f"--ckpt_path={file}", "--tokenizer=bytes", "--prompt=a", "--temperature=0", "--max_new_tokens=3"]) == 0
        ends.append(capsys.readouterr().out)
    assert "a\n" in ends


# --- diff ---


@pytest.mark.parametrize("content", [None, "", "step,train/loss\n"])
def test_no_losses_are_no_equal_losses(content: str | None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("receipt.json", "config.yaml"):
        (tmp_path / name).write_bytes((run_of(trained) / name).read_bytes())
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    capsys.readouterr()
    assert main(["diff", str(run_of(trained)), str(tmp_path)]) == 2
    said = capsys.readouterr()
    where = f"metrics.csv of b: {tmp_path.name}"
    assert (said.out, said.err) == ("", f"error: nothing to compare: no difference is recorded, and {where} has no train/loss\n")
    about = json.loads((tmp_path / "receipt.json").read_text())
    (tmp_path / "receipt.json").write_text(json.dumps({**about, "processes": 2}))
    assert main(["diff", str(run_of(trained)), str(tmp_path)]) == 1  # what is recorded is told all the same
    assert capsys.readouterr().out.splitlines() == ["processes: a 1, b 2", "train/loss: not compared: no step has a loss in both runs"]


@pytest.mark.fault("pre-emption", "SIGTERM while `validate`, `test` and `predict` run", "no result, which one line and exit code 143 say", each=3)
@pytest.mark.usefixtures("here")
def test_an_evaluation_that_is_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config=small.yaml", "--trainer.max_steps=2"]) == 0
    capsys.readouterr()
    for command, method, result in (("validate", "validation_step", "/bpb"), ("test", "test_step", "/bpb"), ("predict", "predict_step", '"nll"')):
        with monkeypatch.context() as patch:
            patch.setattr(LitLM, method, stop)
            assert main([command, "--ckpt_path=last"]) == 143
        said = capsys.readouterr()
        assert "stopped by SIGTERM before the end: the same command line begins again" in said.err
        assert result not in said.out
        assert main([command, "--ckpt_path=last"]) == 0
        assert result in capsys.readouterr().out


def stop(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
