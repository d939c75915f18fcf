"""What the tests of the command line share: a small config, folders to run it in, and a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lit_cases import one_thread as one_thread

from recipes.__main__ import main
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import collect
from recipes.commands.plan import Plan, make_plan

RUN_FILES = {"config.yaml", "receipt.json", "metrics.csv", "hparams.yaml", "checkpoints", "loss_curve.png", "sample.txt"}  # and TensorBoard's

CONFIG: dict[str, Any] = {
    "model": {
        "lm": {
            "vocab_size": 257,
            "d_model": 16,
            "n_layers": 2,
            "mlp_width": 16,
            "layout": ["gdn2", "swa"],
            "mixers": {"gdn2": {"num_heads": 2, "head_dim": 4}, "swa": {"num_heads": 2, "window": 8}},
        },
        "lr": 1e-2,
        "max_tokens": 256,  # 4 steps
        "warmup_tokens": 64,
    },
    "data": {"path": "corpus.txt", "val_path": "corpus.txt", "seq_len": 32, "batch_size": 2, "val_tokens": 64},
    "trainer": {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "val_check_interval": 2, "check_val_every_n_epoch": None},
    "summary": {"max_new_tokens": 5},
}


def plan_of(*arguments: str, needs_tokenizer: bool = False) -> Plan:
    return make_plan(MixersCLI("preflight", collect(list(arguments))).config, needs_tokenizer=needs_tokenizer)


def fill(folder: Path) -> None:
    """The files that CONFIG needs, and itself."""
    (folder / "corpus.txt").write_text("the cat sat on the mat and saw a dog. " * 30)
    (folder / "small.yaml").write_text(yaml.safe_dump(CONFIG))


@pytest.fixture(name="here")
def here_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files that CONFIG needs."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    return tmp_path


@pytest.fixture(name="trained", scope="module")
def trained_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `fit` has run once. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("trained")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "small.yaml"]) == 0
    return folder


def run_of(folder: Path) -> Path:
    """The one run in a folder."""
    (run,) = folder.glob("runs/*/*")
    return run


def last(folder: Path) -> Path:
    return run_of(folder) / "checkpoints" / "last.ckpt"


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def flip(file: Path, tensor: torch.Tensor) -> None:
    """Flips a bit of a tensor in a file."""
    content = bytearray(file.read_bytes())
    place = content.index(tensor.contiguous().numpy().tobytes())
    content[place + 1] ^= 4
    file.write_bytes(content)
