"""What a run leaves for comparing it with another: its receipt, `diff`, and what is said when memory runs out."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import CONFIG, fill, here_fixture, one_thread, plan_of, run_of  # noqa: F401

from kernels.tiles import Key, Tile
from lit_modules.autopsy import FILE as AUTOPSY
from lit_modules.checkpoint import read_checkpoint
from lit_modules.decoder_lm import DecoderLM
from lit_modules.lit_lm import LitLM
from mixers.init import watched
from recipes.__main__ import main
from recipes.commands import diff as diff_command
from recipes.commands import diff_plot, out_of_memory, receipt
from recipes.commands.diff import SECTIONS, differences

ROOT = Path(__file__).parents[1]


def receipt_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "receipt.json").read_text())


def losses_of(run: Path) -> list[tuple[str, str]]:
    """As they stand in the file."""
    with (run / "metrics.csv").open() as table:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(table) if row["train/loss"]]


@pytest.fixture(name="runs", scope="module")
def runs_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some runs of one config. Tests must not write into them."""
    folder = tmp_path_factory.mktemp("runs")
    fill(folder)
    (folder / "other.txt").write_text("a dog sat on a cat and saw the mat. " * 30)
    found: dict[str, Path] = {}

    def fit(name: str, *arguments: str) -> None:
        before = set(folder.glob("out/*"))
        assert main(["fit", *arguments]) == 0
        (found[name],) = set(folder.glob("out/*")) - before

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit("first", "--config=small.yaml", "--trainer.default_root_dir=out")
        fit("again", f"--config={found['first']}/config.yaml")
        fit("rounded", f"--config={found['first']}/config.yaml", "--trainer.precision=bf16-true")
        fit("seeded", f"--config={found['first']}/config.yaml", "--seed_everything=1", "--model.lr=0.02", "--data.path=other.txt")
        fit("longer", f"--config={found['first']}/config.yaml", f"--ckpt_path={found['first']}/checkpoints/last.ckpt", "--model.max_tokens=384")
    return found


# The receipt


def test_a_receipt_says_what_the_run_was(runs: dict[str, Path]) -> None:
    about = receipt_of(runs["first"])
    assert about["outcome"] == {"state": "finished", "step": 4, "tokens": 256}
    assert about["started"] <= about["ended"]
    assert about["command"] == ["python", "-m", "recipes", "fit", "--config=small.yaml", "--trainer.default_root_dir=out"]
    assert about["config"] == {"file": "config.yaml", "sha256": hashlib.sha256((runs["first"] / "config.yaml").read_bytes()).hexdigest()}
    assert about["data"]["tokenizer"] == "bytes"
    assert about["data"]["train"]["bytes"] == 38 * 30
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["lightning"]
    assert len(about["source"]["sha256"]) == 64
    assert (about["source"]["commit"] is not None) == (ROOT / ".git").exists()
    assert about["machine"]["threads"] == torch.get_num_threads()
    assert (about["processes"], about["strategy"], about["resumed"]) == (1, "SingleDeviceStrategy", None)
    first, second = about["backends"]
    assert first.startswith("layers 0 (gdn2): ")
    assert "delta_rule" in first
    assert "reference (tensors are on cpu)" in first
    assert second == "layers 1 (swa): torch's scaled_dot_product_attention, one document at a time (no kernel for cpu)"


def test_initial_weights_are_those_of_the_model_whatever_it_trains_in(runs: dict[str, Path]) -> None:
    hashes = {name: receipt_of(run)["initial_weights"] for name, run in runs.items()}
    assert hashes["first"] == hashes["again"] == hashes["rounded"] == hashes["longer"] != hashes["seeded"]
    drawn: dict[str, torch.Tensor] = {}
    with watched(lambda name, value: drawn.update({name: value})):
        lm = DecoderLM(**CONFIG["model"]["lm"], seed=0)
    assert drawn.keys() == dict(lm.named_parameters()).keys()
    assert all(value.dtype == torch.float32 for value in drawn.values())
    assert torch.equal(drawn["layers.0.mixer.decay.a"], lm.get_parameter("layers.0.mixer.decay.a"))
    lines = []
    for name in sorted(drawn):
        content = f"{list(drawn[name].shape)} torch.float32".encode() + drawn[name].numpy().tobytes()
        lines.append(f"{name} {hashlib.sha256(content).hexdigest()}")
    assert hashes["first"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_a_resumed_run_names_its_checkpoint_and_the_receipt_of_its_run(runs: dict[str, Path]) -> None:
    about = receipt_of(runs["longer"])
    assert Path(about["resumed"]["checkpoint"]).resolve() == (runs["first"] / "checkpoints/last.ckpt").resolve()
    assert Path(about["resumed"]["receipt"]).resolve() == (runs["first"] / "receipt.json").resolve()
    assert about["outcome"] == {"state": "finished", "step": 6, "tokens": 384}


def test_environment_and_tiles(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("MY_PASSWORD", "secret")
    monkeypatch.setattr("kernels.tiles.used", {("delta_rule", "forward", Key("sm_90", 2, 128)): Tile(8, 3, {"BT": 64})})
    assert main(["fit", "--config=small.yaml", "--trainer.max_steps=1"]) == 0
    about = receipt_of(run_of(here))
    assert about["environment"].items() >= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}.items()
    assert "secret" not in json.dumps(about)
    assert about["tiles"] == {"delta_rule forward: sm_90, 2 bytes, size 128": {"BT": 64, "num_warps": 8, "num_stages": 3}}


def broken(monkeypatch: pytest.MonkeyPatch, fault: Callable[[LitLM], None], at: int = 2) -> None:
    """Lets something happen in the forward pass of an optimizer step."""
    step = LitLM.training_step

    def training_step(self: LitLM, batch: Any) -> torch.Tensor:
        if self.trainer.global_step == at:
            fault(self)
        return step(self, batch)

    monkeypatch.setattr(LitLM, "training_step", training_step)


def raising(error: BaseException) -> Callable[[LitLM], None]:
    def fault(_: LitLM) -> None:
        raise error

    return fault


def test_a_run_that_is_killed_leaves_a_receipt_of_a_running_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    broken(monkeypatch, lambda _: seen.append(receipt_of(run_of(here))))
    assert main(["fit", "--config=small.yaml"]) == 0
    assert seen[0]["outcome"] == {"state": "running"}
    assert seen[0]["initial_weights"] == receipt_of(run_of(here))["initial_weights"] is not None


@pytest.mark.parametrize("how", ["interrupted", "terminated", "failed"])
def test_how_a_run_ended(how: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {
        "interrupted": lambda _: os.kill(os.getpid(), signal.SIGINT),
        "terminated": lambda _: os.kill(os.getpid(), signal.SIGTERM),
        "failed": raising(RuntimeError("some\nthing")),
    }
    broken(monkeypatch, faults[how])
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        if how == "failed":
            with pytest.raises(RuntimeError, match="some"):
                main(["fit", "--config=small.yaml"])
        else:
            assert main(["fit", "--config=small.yaml"]) == {"interrupted": 130, "terminated": 143}[how]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    outcome = receipt_of(run_of(here))["outcome"]
    assert outcome["state"] == ("failed" if how == "failed" else "stopped")
    assert outcome["step"] == (2 if how == "failed" else 3)
    assert outcome["what"] == {"interrupted": "Stopped: SIGINT", "terminated": "Stopped: SIGTERM", "failed": "RuntimeError: some thing"}[how]


@pytest.mark.fault("loss that is not finite, from the command line", "a learning rate of 1e30", "the step: exit code 1, the autopsy is named")
def test_a_training_that_diverges_names_its_autopsy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config=small.yaml", "--model.lr=1e30", "--model.warmup_tokens=0"]) == 1
    run = run_of(here)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert said[-1].startswith("error: step 1 (after 64 tokens): ")
    assert Path(said[-1].partition("; autopsy: ")[2]).resolve() == (run / AUTOPSY).resolve()
    about = json.loads((run / AUTOPSY).read_text())
    assert about["samples"]["step"] == [2, 3]
    assert [place["sample"] for place in about["samples"]["micro_batch"]] == [2, 3]
    outcome = receipt_of(run)["outcome"]
    assert (outcome["state"], outcome["autopsy"]) == ("failed", AUTOPSY)
    assert outcome["what"].startswith("FloatingPointError: step 1")


def test_two_processes_say_it_once(here: Path) -> None:
    arguments = ["--model.lr=1e30", "--model.warmup_tokens=0", "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=1"]
    command = [sys.executable, "-m", "recipes", "fit", "--config=small.yaml", *arguments]
    done = subprocess.run(command, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1
    assert done.stderr.count("autopsy: step 1 (after 64 tokens)") == 1
    assert "Traceback" not in done.stderr
    about = receipt_of(run_of(here))
    assert (about["processes"], about["strategy"], about["outcome"]["state"]) == (2, "DDPStrategy", "failed")
    assert json.loads((run_of(here) / AUTOPSY).read_text())["samples"]["step"] == [2, 3]


def test_a_receipt_that_cannot_be_written_fails_no_training(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    broken(monkeypatch, lambda _: monkeypatch.setattr(receipt, "replace_file", full), at=0)
    assert main(["fit", "--config=small.yaml", "--trainer.max_steps=1"]) == 0
    assert receipt_of(run_of(here))["outcome"] == {"state": "running"}
    assert "receipt.json could not be written: No space left on device" in capsys.readouterr().err


# A saved config, and diff


def diff(capsys: pytest.CaptureFixture[str], *paths: Path) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main(["diff", *map(str, paths)])
    return code, capsys.readouterr().out.splitlines()


def test_a_saved_config_runs_again_unchanged(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, again = receipt_of(runs["first"]), receipt_of(runs["again"])
    assert {key: first[key] for key in SECTIONS} == {key: again[key] for key in SECTIONS}
    assert first["config"]["sha256"] == again["config"]["sha256"]
    assert losses_of(runs["first"]) == losses_of(runs["again"])
    assert len(losses_of(runs["first"])) == 4
    weights = [read_checkpoint(runs[name] / "checkpoints/last.ckpt")["state_dict"] for name in ("first", "again")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    same = ["no difference recorded", "train/loss: the same in all 4 steps that both have"]
    assert diff(capsys, runs["first"], runs["again"]) == (0, same)
    assert diff(capsys, runs["first"] / "receipt.json", runs["again"]) == (0, same)


def test_differences_come_in_the_order_of_their_weight(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = diff(capsys, runs["first"], runs["seeded"])
    assert code == 1
    first, seeded = receipt_of(runs["first"]), receipt_of(runs["seeded"])
    assert f"data.identity: a {first['data']['identity']}, b {seeded['data']['identity']}" in lines
    assert "data.path: a corpus.txt, b other.txt" in lines
    assert lines.index(f"initial_weights: a {first['initial_weights']}, b {seeded['initial_weights']}") < lines.index(
        "config.model.lr: a 0.01, b 0.02"
    )
    assert [line.split(".")[0].split(":")[0] for line in lines if not line.startswith("data")] == [
        "initial_weights",
        *["config"] * 2,
        "train/loss",
    ]
    (a, b) = (losses_of(runs[name])[0][1] for name in ("first", "seeded"))
    assert lines[-1].startswith(f"train/loss: differs first at step 0: a {float(a)!r}, b {float(b)!r} (")


def test_precision_and_resuming(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = diff(capsys, runs["first"], runs["rounded"])
    assert code == 1
    assert lines[0] == "config.trainer.precision: a (none), b bf16-true"
    code, lines = diff(capsys, runs["first"], runs["longer"])
    assert code == 1
    assert lines[0] == "config.model.max_tokens: a 256, b 384"
    assert any(line.startswith("resumed.checkpoint: a (none), b ") for line in lines)
    assert "outcome: a finished at step 4, b finished at step 6" in lines


def test_losses_that_differ_for_no_recorded_reason(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("receipt.json", "config.yaml", "metrics.csv"):
        (tmp_path / name).write_bytes((runs["first"] / name).read_bytes())
    loss = losses_of(tmp_path)[2][1]
    (tmp_path / "metrics.csv").write_text((tmp_path / "metrics.csv").read_text().replace(loss, "5.0"))
    code, lines = diff(capsys, runs["first"], tmp_path)
    assert code == 1
    assert lines[0] == "no difference recorded"
    assert lines[1].startswith("train/loss: differs first at step 2: ")
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,wrong\n")
    assert main(["diff", str(runs["first"]), str(tmp_path)]) == 2
    assert "metrics.csv: is not a table of metrics" in capsys.readouterr().err
    (tmp_path / "metrics.csv").write_bytes((runs["first"] / "metrics.csv").read_bytes())
    (tmp_path / "config.yaml").write_text("model: {}")
    code, lines = diff(capsys, runs["first"], tmp_path)
    assert code == 0
    assert "config.yaml has been changed since its run" in lines[0]


def test_every_section_is_compared(runs: dict[str, Path]) -> None:
    about = receipt_of(runs["first"])
    for section in SECTIONS:
        changed = {**about, section: {"something": "else"}}
        assert next(line.partition(".")[0].partition(":")[0] for line in differences(about, changed, None)) == section
    assert list(differences(about, about, None)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist (legal: a run folder, or its receipt.json)"),
        ("no json", "is no receipt: it is not valid JSON"),
        ("[1]", "is no receipt that this version can read (it needs receipt: 1, has list)"),
        ('{"receipt": 1}', "is no whole receipt: config, data, outcome is missing"),
        ('{"receipt": 1, "config": {}, "data": {}, "outcome": {}}', "is no whole receipt: config.sha256 is missing"),
        ('{"receipt": 2}', "is no receipt that this version can read (it needs receipt: 1, has 2)"),
    ],
)
def test_bad_receipts(content: str | None, message: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "receipt.json").write_text(content)
    assert main(["diff", str(runs["first"]), str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: b: {tmp_path / 'receipt.json'} {message}"


def test_a_picture_of_both_losses(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that went on from another is drawn with it; the picture is a PNG."""
    drawn: list[diff_plot.Curve] = []
    monkeypatch.setattr(diff_command, "draw", lambda path, *curves: (drawn.extend(curves), diff_plot.draw(path, *curves)))
    assert main(["diff", str(runs["again"]), str(runs["longer"]), f"--plot={tmp_path / 'losses.png'}"]) == 1
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    whole, longer = drawn
    own = {int(step): float(loss) for step, loss in losses_of(runs["longer"])}
    assert longer.losses == {**{int(step): float(loss) for step, loss in losses_of(runs["first"])}, **own}
    assert longer.began == [min(own)]
    assert all(longer.losses[step] == loss for step, loss in whole.losses.items())
    assert whole.began == []
    capsys.readouterr()
    assert main(["diff", str(runs["first"]), str(runs["again"]), f"--plot={tmp_path / 'missing' / 'losses.png'}"]) == 2
    assert "error: plot: " in capsys.readouterr().err
    shutil.copy(runs["first"] / "receipt.json", tmp_path)
    assert main(["diff", str(runs["first"]), str(tmp_path), f"--plot={tmp_path / 'losses.png'}"]) == 2
    assert capsys.readouterr().err == f"error: plot: run b: {tmp_path.name} has no train/loss in its metrics.csv\n"


@pytest.mark.parametrize("arguments", [[], ["one"], ["one", "two", "three"]])
def test_diff_wants_two_runs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# Out of memory


ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\nof which ..")


@pytest.mark.fault("out of memory", "torch.OutOfMemoryError raised in a forward pass", "the step: the last whole one is saved, exit code 1")
def test_a_training_that_runs_out_of_memory(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken(monkeypatch, raising(ERROR))
    assert main(["fit", "--config=small.yaml", "--checkpoint.every_n_train_steps=1"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert line.startswith("error: out of memory: tried to allocate 2.00 GiB; largest on a device, roughly: ")
    assert "lower data.batch_size first: 1, with trainer.accumulate_grad_batches 2 (as many tokens a step)" in line
    assert receipt_of(run_of(here))["outcome"]["what"].startswith("OutOfMemoryError: CUDA out of memory.")
    content = read_checkpoint(run_of(here) / "checkpoints/last.ckpt")
    assert (content["global_step"], content["lightning_mixers"]["tokens"]) == (2, 128)


CPU = ["--config=quickstart", "--trainer.accelerator=cpu"]
SMALL_BATCH = ["--data.batch_size=1", "--data.seq_len=16"]
LOWER = "lower data.batch_size first: "


@pytest.mark.parametrize(
    ("arguments", "sharded", "largest", "advice"),
    [
        (["--data.batch_size=6"], False, "activations", LOWER + "3, with trainer.accumulate_grad_batches 2 (as many"),
        (["--data.batch_size=5"], False, "activations", LOWER + "2, with trainer.accumulate_grad_batches 3 (nearly as many"),
        (["--data.batch_size=1", "--data.seq_len=65536"], False, "activations", "lower data.seq_len first (now 65,536; data.batch_size is 1)"),
        (SMALL_BATCH, False, "optimizer", "trainer.strategy fsdp2 on more devices, or trainer.precision bf16-true"),
        (SMALL_BATCH, True, "optimizer", "lower trainer.precision first: bf16-true; or share the model"),
        (["--model.lm.vocab_size=200000"], False, "logits", LOWER),
    ],
)
def test_advice(arguments: list[str], sharded: bool, largest: str, advice: str) -> None:
    line = out_of_memory.explain(plan_of(*CPU, *arguments), ERROR, sharded=sharded)
    assert line is not None
    assert "\n" not in line
    assert line.startswith(f"out of memory: tried to allocate 2.00 GiB; largest on a device, roughly: {largest} ")
    assert advice in line


def test_a_sharded_model_is_shared() -> None:
    plan = plan_of(*CPU, *SMALL_BATCH, "--trainer.devices=4")
    one, shared = (out_of_memory.memory_of(plan, sharded=sharded) for sharded in (False, True))
    assert shared.optimizer == one.optimizer // 4
    assert (shared.activations, shared.logits) == (one.activations, one.logits)


def test_only_errors_about_memory_are_explained() -> None:
    plan = plan_of(*CPU)
    assert out_of_memory.explain(plan, RuntimeError("shape mismatch"), sharded=False) is None
    host = RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert out_of_memory.explain(plan, host, sharded=False) is not None
    assert out_of_memory.explain(plan, MemoryError(), sharded=False) is not None
