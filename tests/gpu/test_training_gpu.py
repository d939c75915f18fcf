"""Trainings on a GPU, from the command line: killed and gone on with to the bit; on two GPUs as on one. Needs Lightning beside torch."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lit_modules.checkpoint import read_checkpoint

pytestmark = pytest.mark.gpu

STEPS = 40
FIT = ["-m", "recipes", "fit", "--config", "quickstart", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
       "--trainer.limit_val_batches", "0", "--summary.max_new_tokens", "0", "--checkpoint.every_n_train_steps", "5",
       "--trainer.max_steps", str(STEPS), "--ckpt_path", "auto", "--trainer.default_root_dir"]  # fmt: skip
ONE = ["--trainer.devices", "1"]  # without it Lightning takes all
EXACT = [*ONE, "--trainer.precision", "bf16-mixed", "--trainer.deterministic", "true"]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def start(root: Path, *settings: str) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    with (root / "said").open("a") as said:
        return subprocess.Popen([sys.executable, *FIT, str(root), *settings], stdout=said, stderr=subprocess.STDOUT, text=True)


def finish(root: Path, *settings: str) -> None:
    code = start(root, *settings).wait(300)
    assert code == 0, (root / "said").read_text()[-3000:]


def losses(root: Path) -> dict[int, str]:
    """As they stand in the files, by step; two runs must say the same of a step that both have taken."""
    found: dict[int, str] = {}
    for file in sorted(root.glob("*/metrics.csv"), key=lambda file: file.stat().st_mtime):
        for row in csv.DictReader(file.read_text().splitlines()):
            if row["train/loss"]:
                assert found.setdefault(int(row["step"]), row["train/loss"]) == row["train/loss"], row
    return found


def end(root: Path) -> dict[str, Any]:
    return read_checkpoint(max(root.glob("*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime))


@pytest.mark.long
def test_killed_twice_and_resumed_to_the_bit(tmp_path: Path) -> None:
    """Layers of GDN-2 and windows of attention, in bfloat16: losses, weights and optimizer state of the training that nobody killed."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(whole, *EXACT)
    for step in (8, 21):
        process = start(cut, *EXACT)
        until = time.time() + 300
        while max(losses(cut), default=0) < step:
            assert process.poll() is None, (cut / "said").read_text()[-3000:]
            assert time.time() < until, f"no step {step} yet"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finish(cut, *EXACT)
    assert len(list(cut.glob("*/metrics.csv"))) == 3
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == STEPS
    one, other = end(whole), end(cut)
    assert one["global_step"] == other["global_step"] == STEPS
    torch.testing.assert_close(other["state_dict"], one["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(other["optimizer_states"], one["optimizer_states"], rtol=0, atol=0)


@TWO
@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2_zero2"])
def test_two_gpus_train_as_one(strategy: str, tmp_path: Path) -> None:
    """Losses of 40 steps in float32, to 1e-4."""
    micro_batches = "--trainer.accumulate_grad_batches"
    finish(tmp_path / "one", *ONE, "--trainer.precision", "32-true", micro_batches, "4")
    finish(tmp_path / "two", "--trainer.precision", "32-true", micro_batches, "2", "--trainer.devices", "2", "--trainer.strategy", strategy)
    one, two = ({step: float(loss) for step, loss in losses(tmp_path / name).items()} for name in ("one", "two"))
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=1e-4)
