"""Several processes: DDP and FSDP2 train as one process does, from the same initial values, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import parallel_worker as worker
import pytest
import torch
from cli_cases import ended, fill
from lit_cases import make_lm, make_trainer, one_thread  # noqa: F401

from lit_modules.checkpoint import load_lm, read_checkpoint
from lit_modules.parallel import STRATEGIES, check_precision, check_strategy_name, lost_process
from lit_modules.sharded import read_sharded
from lit_modules.units import plan
from mixers.errors import ConfigError
from recipes.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..
TOLERANCE = {"64-true": 1e-9, "32-true": 1e-4}  # relative: sums over two processes are added up in another order

Results = dict[Any, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def one(folder: Path) -> Results:
    """The trainings of one process, and its checkpoints in the folder."""
    torch.set_num_threads(1)
    results: Results = {}
    for model, precision in worker.CASES:
        save = folder / f"auto-{precision}.ckpt" if (model, precision) in worker.RESUMED else None
        results[model, precision] = worker.train(model, precision, "auto", save=save)
    return results


@pytest.fixture(scope="module")
def two(folder: Path, one: Results) -> Results:  # noqa: ARG001 (its checkpoints)
    """The trainings of two processes."""
    script = Path(worker.__file__)
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Results = torch.load(folder / "results.pt", weights_only=True)
    return found


def error_of(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest over all tensors, relative to the largest entry of each."""
    assert got.keys() == expected.keys()
    return max(float((got[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


def assert_same(got: Results, expected: Results, precision: str, *, steps: int) -> None:
    """Loss, gradient norm, learning rate and tokens of the last steps; weights and validation behind them."""
    tolerance = TOLERANCE[precision]
    assert len(got["rows"]) == steps
    for row, target in zip(got["rows"], expected["rows"][-steps:], strict=True):
        assert row == pytest.approx(target, rel=tolerance)
    assert error_of(got["weights"], expected["weights"]) < tolerance
    assert got["val"] == pytest.approx(expected["val"], rel=tolerance)
    assert set(got["val"]) == {"val/loss", "val/perplexity", "val/bpb"}


# --- training ---


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
@pytest.mark.parametrize(("model", "precision"), worker.CASES)
def test_two_processes_train_as_one(model: str, precision: str, strategy: str, one: Results, two: Results) -> None:
    expected = one[model, precision]
    assert any(row["train/grad_norm"] > 0.5 for row in expected["rows"])  # clipped
    assert_same(two[model, precision, strategy], expected, precision, steps=worker.STEPS)
    assert two[model, precision, strategy]["sharded"] == [strategy != "ddp"] * len(expected["weights"])  # behind a validation


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("model", worker.MODELS)
def test_initial_values_are_those_of_one_process_bit_for_bit(model: str, strategy: str, one: Results, two: Results) -> None:
    expected = {name: p.detach() for name, p in make_lm("cpu", **worker.MODELS[model]).named_parameters()}
    for found in (one[model, "32-true"], two[model, "32-true", strategy]):
        assert found["initial"].keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found["initial"].items())


@pytest.mark.fault(
    "loss that is not finite on one of two processes", "NaN in its logits", "nothing: all stop at the same step, before the weights change"
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_nan_on_one_rank_stops_all_of_them(strategy: str, two: Results) -> None:
    bad = two["nan", strategy]
    assert bad["error"][0].startswith("step 3 (after 144 tokens): loss is nan and gradient norm is nan")
    assert [line.partition(";")[0] for line in bad["error"]] == [bad["error"][0].partition(";")[0]] * 2
    assert len(bad["rows"]) == 3
    assert bad["tokens"] == 144
    assert all(value.isfinite().all() for value in bad["weights"].values())


# --- parameters that stay float32 ---


@pytest.mark.parametrize("precision", worker.HALVES)
def test_dtypes_of_a_sharded_model_in_storage_in_a_forward_and_in_its_checkpoint(precision: str, folder: Path, two: Results) -> None:
    """Also of what is no fp32 parameter: bf16-mixed gathers the linear layers in bfloat16 and nothing else."""
    lm = make_lm(**worker.MODELS["mamba3-kda-mamba2"])
    fp32, found = lm.parameter_groups().fp32, two[precision, "fsdp2"]
    linear = {f"{name}.{own}" for name, m in lm.named_modules() if isinstance(m, torch.nn.Linear) for own, _ in m.named_parameters()}
    assert {name.split(".")[-1] for name in fp32} >= {"a", "delta", "dt_bias", "D"}
    unused = {"layers.1.mixer.norm.norm.weight"}  # read by the module around it
    assert found["seen"].keys() == dict(lm.named_parameters()).keys() - unused
    for name, dtype in found["seen"].items():
        half = name in linear or (precision == "bf16-true" and name not in fp32)
        assert dtype == ("torch.bfloat16" if half else "torch.float32"), name
    assert found["stored"] == {name: str(p.dtype) for name, p in load_lm(folder / f"{precision}.ckpt").named_parameters()}
    for name, dtype in found["stored"].items():
        assert dtype == ("torch.float32" if precision == "bf16-mixed" or name in fp32 else "torch.bfloat16"), name


@pytest.mark.parametrize("precision", worker.HALVES)
def test_half_precision_is_that_of_one_process(precision: str, two: Results) -> None:
    """The first loss is the same to the bit; after an update a sum in another order may round a weight to its neighbour in bfloat16."""
    expected = worker.train("mamba3-kda-mamba2", precision, "auto", max_steps=3)
    found = two[precision, "fsdp2"]
    assert found["rows"][0]["train/loss"] == pytest.approx(expected["rows"][0]["train/loss"], rel=1e-12)
    for row, target in zip(found["rows"], expected["rows"], strict=True):
        assert row["train/loss"] == pytest.approx(target["train/loss"], rel=1e-3)
        assert row["train/grad_norm"] == pytest.approx(target["train/grad_norm"], rel=1e-2)


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision: fsdp2 takes 32-true, 64-true, bf16-mixed, bf16-true, got 16-true"):
        make_trainer(strategy="fsdp2", devices=2, precision="16-true")


@pytest.mark.parametrize("name", [*STRATEGIES, "ddp_find_unused_parameters_true", "ddp_fork", "single_device"])
def test_strategies_that_train_are_not_refused(name: str) -> None:
    check_strategy_name(name)


def test_a_config_for_a_gpu_is_looked_at_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (note,) = check_precision("auto", "16-mixed", "auto", here=False)
    assert note == "trainer.precision: 16-mixed needs a GPU; a CPU takes 32-true, 64-true, bf16-mixed, bf16-true; there is no GPU here"
    with pytest.raises(ConfigError, match="16-mixed needs a GPU"):
        check_precision("auto", "16-mixed", "auto", here=True)
    with pytest.raises(ConfigError, match="16-mixed needs a GPU"):
        check_precision("auto", "16-mixed", "cpu", here=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert check_precision("ddp", "16-mixed", "auto", here=True) == []


def test_every_parameter_is_in_one_unit() -> None:
    lm = make_lm(**worker.MODELS["mamba3-kda-mamba2"])
    units, fp32 = plan(lm), lm.parameter_groups().fp32
    names = [name for unit in units for name in unit.names]
    assert sorted(names) == sorted(name for name, _ in lm.named_parameters())
    for unit in units:
        assert not unit.names & fp32 or unit.names <= fp32, "they stay float32, all others of a unit do not"
    assert units[0].module is lm  # FSDP2 takes the first for the outermost


def test_a_parameter_of_several_blocks_is_gathered_with_the_whole_model() -> None:
    lm = make_lm(n_layers=2, layout=["gdn2"])
    lm.layers[1].mlp.up.weight = lm.layers[0].mlp.up.weight
    lm.head.weight = lm.embedding.weight
    outermost = plan(lm)[0]
    assert outermost.module is lm
    assert {"layers.0.mlp.up.weight", "embedding.weight"} <= outermost.names
    lm.layers[1].mixer.decay = lm.layers[0].mixer.decay
    with pytest.raises(TypeError, match=r"layers\.0\.mixer\.\w+\.\w+: stays float32 and is in several mixers"):
        plan(lm)


# --- checkpoints ---


@pytest.mark.parametrize(("writer", "reader"), worker.CROSSED)
def test_two_processes_go_on_from_any_checkpoint(writer: str, reader: str, one: Results, two: Results) -> None:
    model, precision = worker.RESUMED[0]
    assert_same(two[precision, writer, reader], one[model, precision], precision, steps=worker.STEPS - worker.HALF)


@pytest.mark.parametrize(("writer", "reader"), worker.CROSSED[:2])
def test_they_do_in_float32(writer: str, reader: str, one: Results, two: Results) -> None:
    model, precision = worker.RESUMED[1]
    assert_same(two[precision, writer, reader], one[model, precision], precision, steps=worker.STEPS - worker.HALF)


@pytest.mark.parametrize("writer", ["ddp", "fsdp2", "folder"])
@pytest.mark.parametrize(("model", "precision"), worker.RESUMED)
def test_one_process_goes_on_from_any_checkpoint(writer: str, model: str, precision: str, folder: Path, one: Results, two: Results) -> None:  # noqa: ARG001
    path = folder / f"{writer}-{precision}.ckpt"
    if writer == "folder":
        out = folder / f"{model}.ckpt"
        assert main(["consolidate", str(path), "--out", str(out)]) == 0
        path = out
    result = worker.train(model, precision, "auto", resume=path)
    assert_same(result, one[model, precision], precision, steps=worker.STEPS - worker.HALF)


@pytest.mark.parametrize("writer", ["ddp", "fsdp2", "folder"])
def test_a_checkpoint_says_the_same_whoever_wrote_it(writer: str, folder: Path, two: Results) -> None:  # noqa: ARG001
    """The state of the optimizer too, by the same numbers: Lightning numbers it otherwise under FSDP2."""
    expected = read_checkpoint(folder / "auto-64-true.ckpt")
    path = folder / f"{writer}-64-true.ckpt"
    found = read_sharded(path, "folder") if path.is_dir() else read_checkpoint(path)
    assert found.keys() == expected.keys()
    assert error_of(found["state_dict"], expected["state_dict"]) < 1e-9
    (states,), (targets,) = found["optimizer_states"], expected["optimizer_states"]
    assert states["param_groups"] == targets["param_groups"]
    assert states["state"].keys() == targets["state"].keys()
    for number, target in targets["state"].items():
        assert error_of(states["state"][number], target) < 1e-9, number
    assert found["lm"] == expected["lm"]


@pytest.mark.fault(
    "sharded checkpoint that is not whole", "files of it missing, cut or overwritten, a bit flipped", "nothing: one line names the file", each=6
)
def test_consolidate_refuses_what_is_none(folder: Path, two: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    good = folder / "folder-64-true.ckpt"
    shards = sorted(file.name for file in good.glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"]
    for name in ("missing", "short", "unfinished", "pickle", "foreign", "flipped"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "missing" / shards[1]).unlink()
    (tmp_path / "short" / shards[1]).write_bytes((good / shards[1]).read_bytes()[:-100])
    (tmp_path / "unfinished" / ".metadata").unlink()
    (tmp_path / "pickle" / ".metadata").write_bytes(b"none")
    torch.save({"epoch": 1}, tmp_path / "foreign" / "meta.pt")
    content = bytearray((good / shards[0]).read_bytes())
    values = max(re.finditer(rb"(?s)data/0FB(.*?)PK", bytes(content)), key=lambda found: len(found[1]))
    content[(values.start(1) + values.end(1)) // 2] ^= 4
    (tmp_path / "flipped" / shards[0]).write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "good.whole.ckpt").touch()
    shutil.copytree(good, tmp_path / "good.ckpt")
    for arguments, message in (
        (["nothing"], "no such folder"),
        (["file"], "is not a folder"),
        (["empty"], r"is no sharded checkpoint, or one that was never finished \(it holds no meta.pt\)"),
        (["unfinished"], r"never finished \(it holds no .metadata\)"),
        (["pickle"], "its .metadata does not match its checksum"),
        (["missing"], r"the shard __1_0.distcp is missing \(it has 2\)"),
        (["short"], "the shard __1_0.distcp is truncated"),
        (["foreign"], "it has no key 'lightning_mixers'"),
        (["flipped"], "__0_0.distcp: is damaged: "),
        (["good.ckpt"], "out: .*good.whole.ckpt exists"),
        (["good.ckpt", "--out", "none/a.ckpt"], "out: .*a.ckpt cannot be written"),
    ):
        given = [str(tmp_path / word) if not word.startswith("-") else word for word in arguments]
        assert main(["consolidate", *given]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.count("\n") == 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a full disk would
    try:
        assert main(["consolidate", str(tmp_path / "good.ckpt"), "--out", str(tmp_path / "out.ckpt")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    full = f"error: out: {tmp_path / 'out.ckpt'} cannot be written: File too large; nothing of it is left\n"
    assert capsys.readouterr().err == full
    assert not [file.name for file in tmp_path.iterdir() if "out.ckpt" in file.name]
    assert main(["consolidate", str(tmp_path / "good.ckpt"), "--out", str(tmp_path / "out.ckpt")]) == 0
    assert not [file.name for file in tmp_path.iterdir() if "part" in file.name]
    with pytest.raises(ConfigError, match=r"is a folder; of a sharded checkpoint `python -m recipes consolidate"):
        load_lm(good)


# --- the command line ---


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(name="killed", scope="module", params=[("ddp", 1), ("fsdp2_sharded_checkpoint", 0)], ids=str)
def killed_fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one of two processes of a training was killed behind a checkpoint, and the other one has ended by itself."""
    strategy, victim = request.param
    folder = tmp_path_factory.mktemp("killed")
    fill(folder)
    options = ["--trainer.devices=2", f"--trainer.strategy={strategy}", "--checkpoint.every_n_train_steps=2", "--model.max_tokens=10000000"]
    command = [sys.executable, "-m", "recipes", "fit", "--config=small.yaml", "--trainer.val_check_interval=5", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=said)
    pids = [process.pid]
    try:
        wait_for(lambda: list(folder.glob("runs/*/*/checkpoints/last.ckpt")) or process.poll() is not None)
        pids += map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        assert len(pids) == 2
        os.kill(pids[victim], signal.SIGKILL)
        wait_for(lambda: all(map(ended, pids)))
    finally:
        for pid in pids:
            if not ended(pid):
                os.kill(pid, signal.SIGKILL)
    assert process.wait() != 0
    return folder


@pytest.mark.fault(
    "one of two processes dies",
    "SIGKILL in the middle of a training; DDP: the second, FSDP2: the first",
    "the steps since the last checkpoint; the other process ends by itself",
)
def test_a_killed_process_ends_the_training_and_costs_the_steps_since_the_last_checkpoint(
    killed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(killed)
    said = (killed / "said").read_text()
    (line,) = [line for line in said.splitlines() if "another process of this training has ended (" in line or "Forcefully terminating" in line]
    assert line.startswith("error: process ") or "Child process with PID" in line  # ours, or Lightning's if it looked before
    assert "Traceback" not in said
    (path,) = killed.glob("runs/*/*/checkpoints/last.ckpt")
    one = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.accumulate_grad_batches=2"]
    if path.is_dir():
        for command in (["generate"], ["validate", *one], ["fit", "--config=small.yaml", "--model.max_tokens=10000000", *one]):
            assert main([*command, f"--ckpt_path={path}"]) == 2
            assert f"python -m recipes consolidate {path}" in capsys.readouterr().err
        assert main(["consolidate", str(path)]) == 0
        path = path.with_name("last.whole.ckpt")
    step = read_checkpoint(path)["global_step"]
    assert step > 0
    assert step % 2 == 0
    assert main(["fit", "--config=small.yaml", f"--ckpt_path={path}", *one, "--model.max_tokens=10000000", f"--trainer.max_steps={step + 2}"]) == 0
    newest = max(killed.glob("runs/*/*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    assert read_checkpoint(newest)["global_step"] == step + 2
    assert main(["validate", *one, f"--ckpt_path={path}", "--data.path=corpus.txt"]) == 0
    assert main(["generate", f"--ckpt_path={path}", "--max_new_tokens=3"]) == 0


def test_errors_that_mean_that_another_process_has_ended() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6052.\nThis is typically"
    nccl = "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, NCCL version 2.27\nncclRemoteError: A call"
    store = "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
    found = [RuntimeError(gloo), torch.distributed.DistBackendError(nccl), torch.distributed.DistNetworkError(store)]
    for error, words in zip(found, ("Connection closed by peer", "ncclRemoteError", "remote server shutdown"), strict=True):
        line = lost_process(error)
        assert line is not None
        assert line.startswith(f"process 0: another process of this training has ended ({words}): ")
        assert "\n" not in line
    for other in (
        RuntimeError("Connection closed by peer"),
        RuntimeError("gloo timed out"),
        torch.distributed.DistBackendError("unhandled cuda error"),
    ):
        assert lost_process(other) is None


def test_how_a_process_that_this_one_has_started_ended() -> None:
    gloo = RuntimeError("gloo: Connection reset by peer")
    for code, words in (("os.kill(os.getpid(), 9)", "was killed by SIGKILL"), ("sys.exit(3)", "with exit code 3")):
        child = subprocess.Popen([sys.executable, "-c", f"import os, sys; {code}"])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert f"pid {child.pid} {words};" in str(lost_process(gloo))
        assert child.wait() in (-9, 3)  # it can still be asked
