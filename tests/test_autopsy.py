"""Steps that are not finite: the run stops on every strategy and says why, or leaves the step out where that is allowed."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lit_cases import Log, fit, make_batch, make_lit, make_lm, make_trainer, one_thread, saved  # noqa: F401

from lit_modules import autopsy
from lit_modules.autopsy import FILE
from lit_modules.data import PackedText, sources
from lit_modules.tracer import Tracer, bad_tensors
from mixers import registry
from mixers.contract import small_settings
from mixers.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..


class Spoil(Callback):
    """Multiplies the output of a module by infinity at given steps, for one micro-batch; keeps the weights in front of every step."""

    def __init__(self, module: str, *steps: int, micro_batch: int = 0, accumulate: int = 1) -> None:
        self.module, self.steps, self.micro_batch, self.accumulate, self.on = module, steps, micro_batch, accumulate, False
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.bad: list[torch.Tensor] = []  # inputs of micro-batches

    def on_train_start(self, trainer, pl_module) -> None:  # noqa: ARG002
        def look(_, args) -> None:
            self.on = any(args[0] is inputs for inputs in self.bad)

        pl_module.lm.register_forward_pre_hook(look)
        pl_module.lm.get_submodule(self.module).register_forward_hook(lambda _, __, y: y * math.inf if self.on else y)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step in self.steps and batch_idx % self.accumulate == self.micro_batch:
            self.bad.append(batch.inputs)
        self.weights.setdefault(trainer.global_step, copy.deepcopy(pl_module.lm.state_dict()))


def stopped(folder: Path, lit: Any, *batches: Any, **settings: Any) -> tuple[str, dict[str, Any]]:
    """The error of a training that stops, and its autopsy."""
    with pytest.raises(FloatingPointError) as error:
        fit(lit, *(batches or (make_batch(0),)), default_root_dir=folder, max_steps=5, **settings)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"; the weights were not changed; autopsy: {folder / FILE}")
    return str(error.value), json.loads((folder / FILE).read_text())


# Where the fault lies


@pytest.mark.fault("loss that is not finite", "a layer's output times infinity", "the step: the run stops, its autopsy names layer and gates")
def test_an_activation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lit = make_lit(make_lm(n_layers=2, layout=["gdn2", "swa"]))
    spoil = Spoil("layers.1.mlp.up", 2, micro_batch=1, accumulate=3)
    error, about = stopped(tmp_path, lit, *map(make_batch, range(3)), callbacks=[spoil], accumulate_grad_batches=3)
    assert error.startswith("step 2 (after 72 tokens): loss is nan and gradient norm is nan;")
    assert (about["step"], about["tokens"], about["rank"], about["micro_batch"], about["micro_batches"]) == (2, 72, 0, 1, 3)
    expected = {"kind": "activation", "tensor": "output of layers.1.mlp.up", "layer": 1, "mixer": "swa"}
    assert {key: about["first"][key] for key in expected} == expected
    assert about["first"]["not_finite"] == about["first"]["of"] == 12 * 12
    assert about["bad_parameters"] == []
    assert about["gates"]["0 (gdn2)"].keys() == {"g", "b", "w"}
    assert about["samples"] is None  # these batches have no numbers
    assert [step["step"] for step in about["last_steps"]] == [0, 1]
    assert all(step["grad_norm"] > 0 and step["lr"] > 0 for step in about["last_steps"])
    assert about["seeds"]["initial_values"] == 0
    said = capsys.readouterr().err
    assert "autopsy: step 2 (after 72 tokens): loss is nan and gradient norm is nan" in said
    assert "  first: activation: output of layers.1.mlp.up, 144 of 144 not finite, layer 1 (swa)" in said
    assert "  micro-batch 2 of 3 on rank 0" in said
    assert all(torch.equal(value, lit.lm.state_dict()[name]) for name, value in spoil.weights[2].items())


def test_between_two_modules_of_a_mixer() -> None:
    """Gates are computed in no module of their own: what comes in first is named."""
    lm = make_lm("cpu", layout=["deltanet"], mixers={"deltanet": {"num_heads": 2, "head_dim": 4}})
    gates_of = lm.layers[0].mixer.gates_of
    lm.layers[0].mixer.gates_of = lambda *outputs: gates_of(*outputs)._replace(w=torch.full((1, 12, 2, 1), math.nan))
    tracer = Tracer(lm)
    with tracer.attached():
        lm(make_batch(0).inputs)
    assert tracer.first["tensor"] == "input of layers.0.mixer.norm"
    assert tracer.gates["0 (deltanet)"]["w"]["not_finite"] == 24
    assert tracer.gates["0 (deltanet)"]["b"]["not_finite"] == 0


@pytest.mark.fault("weight that is not finite", "NaN written into a weight between two steps", "the step: the run stops, the weight is named")
def test_a_weight(tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # noqa: ARG002
            if trainer.global_step == 1:
                pl_module.lm.layers[0].mixer.f_proj[1].weight.data[0, 0] = math.nan

    _, about = stopped(tmp_path, make_lit(make_lm(layout=["gdn2"])), callbacks=[Break()])
    name = "layers.0.mixer.f_proj.1.weight"
    assert about["first"] == {"kind": "parameter", "tensor": name, "layer": 0, "mixer": "gdn2"}
    assert about["bad_parameters"] == [name]
    assert about["gates"]["0 (gdn2)"]["g"]["not_finite"] > 0  # on a CPU too: NaN goes through the delta rule


class Overflow(Callback):
    """Puts an infinity into a gradient, which the step run again does not show."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step in self.steps:
            pl_module.lm.head.weight.grad[0, 0] = math.inf


@pytest.mark.fault("gradient that is not finite", "an infinity put into a gradient", "the step: the run stops, the weight is named")
def test_a_gradient_that_the_step_run_again_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, about = stopped(tmp_path, make_lit(), callbacks=[Overflow(1)])
    expected = {"kind": "gradient", "tensor": "head.weight", "note": "the step run again is finite", "layer": None, "mixer": None}
    assert about["first"] == expected
    assert about["bad_gradients"] == ["head.weight"]
    assert "first: gradient: head.weight; the step run again is finite" in capsys.readouterr().err


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_gates_of_every_mixer(name: str) -> None:
    expected = {
        **{key: {"g", "b", "w"} for key in ("gdn2", "kda", "gdn")},
        **{"deltanet": {"b", "w"}, "gla": {"g"}, "mamba2": {"g", "w"}},
        "mamba3": {"g", "w", *(f"step_size.{gate}" for gate in ("g", "zeta", "behind", "theta", "delta"))},
    }
    lm = make_lm("cpu", d_model=16, layout=[name], mixers={name: small_settings(name, {})})
    tracer = Tracer(lm)
    with tracer.attached():
        lm(make_batch(0).inputs)
    assert tracer.first is None
    gates = tracer.ranges().get(f"0 ({name})", {})
    assert gates.keys() == expected.get(name, set())
    assert all(gate["min"] <= gate["max"] and gate["not_finite"] == 0 for gate in gates.values())
    if "g" in gates:
        assert gates["g"]["max"] <= 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.modules())  # all are gone


@pytest.mark.fault(
    "loss that is not finite", "a layer's output times infinity, data from text and from shards", "the step: the autopsy names the samples"
)
@pytest.mark.parametrize("prepared", [False, True])
def test_samples(prepared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers give the very tokens of the micro-batch, and their places are those in the stream or the shards."""
    if prepared:
        from shard_cases import prepared as prepare
        from shard_cases import write_jsonl

        monkeypatch.setattr(sources, "UNIT_BYTES", 500)  # several shards
        index = prepare(tmp_path / "shards", write_jsonl(tmp_path))
        path = str(tmp_path / "shards")
    else:
        (tmp_path / "corpus.txt").write_text("the cat sat on the mat and saw a dog. " * 60)
        path = str(tmp_path / "corpus.txt")
    data = PackedText(path, val_path=path, seq_len=16, batch_size=2, seed=3)
    lit = make_lit(make_lm(vocab_size=257))
    spoil = Spoil("head", 2, micro_batch=1, accumulate=2)
    trainer = make_trainer(default_root_dir=tmp_path / "run", callbacks=[spoil], accumulate_grad_batches=2, limit_val_batches=0)
    with pytest.raises(FloatingPointError):
        trainer.fit(lit, datamodule=data)
    about = json.loads((tmp_path / "run" / FILE).read_text())
    assert about["samples"]["step"] == [8, 11]
    places = about["samples"]["micro_batch"]
    assert [place["sample"] for place in places] == [10, 11]
    inputs = spoil.bad[-1].view(2, 16)
    for place, row in zip(places, inputs, strict=True):
        assert data.sample(place["sample"])[:-1].tolist() == row.tolist()
        first, behind = place["tokens"]
        assert behind - first == 17
        assert sum(piece["tokens"][1] - piece["tokens"][0] for piece in place["in"]) == 17
        assert bytes(int(t) for t in row if t != 256).decode(errors="replace").startswith(place["begins"][:10])
        for piece in place["in"]:
            lowest, highest = piece["documents"]
            if prepared:
                tokens = torch.from_file(str(tmp_path / "shards" / f"{piece['shard']}.tokens"), dtype=torch.int16, size=piece["tokens"][1])
                starts = torch.from_file(str(tmp_path / "shards" / f"{piece['shard']}.starts"), dtype=torch.int64, size=highest + 1)
                assert starts[lowest] <= piece["tokens"][0]
                assert starts[highest] < piece["tokens"][1]
                assert len(tokens[piece["tokens"][0] :]) == piece["tokens"][1] - piece["tokens"][0]
                assert piece["shard"] in {shard.name for shard in index.splits["train"]}
            else:
                assert (lowest, highest) == (0, 0)
    if prepared:
        assert len(index.splits["train"]) > 1


@pytest.mark.fault("autopsy cannot be written", "a file is in the way of its folder", "the file: its lines are on stderr")
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file is in the way")
    with pytest.raises(FloatingPointError, match=r"the weights were not changed$"):
        fit(make_lit(), make_batch(0), max_steps=1, default_root_dir=tmp_path / "run", callbacks=[Spoil("head", 0)])
    said = capsys.readouterr().err
    assert f"autopsy: {tmp_path / 'run' / FILE} could not be written" in said
    assert "  first: activation: output of head" in said


def test_an_autopsy_that_fails_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out\nof memory")

    monkeypatch.setattr(autopsy, "run_again", no_memory)
    with pytest.raises(FloatingPointError, match=r"step 0 .*: loss is nan and gradient norm is nan; the weights were not changed$"):
        fit(make_lit(), make_batch(0), max_steps=1, default_root_dir=tmp_path, callbacks=[Spoil("head", 0)])
    assert "autopsy: failed: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err


def test_bad_tensors_keep_their_order() -> None:
    tensors = {"c": torch.tensor([1.0]), "b": torch.tensor([math.nan]), "a": torch.tensor([-math.inf])}
    assert bad_tensors(tensors.items()) == ["b", "a"]


# Skipped steps


@pytest.mark.fault(
    "loss that is not finite, with max_skipped_steps: 2",
    "a layer's output times infinity",
    "the steps that are skipped: the third one stops the run",
    each=3,
)
def test_steps_may_be_skipped_up_to_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, log = Spoil("layers.0.mlp.up", 1, 3, 4), Log()
    lit = make_lit(make_lm("cpu"), max_skipped_steps=2)
    error, about = stopped(tmp_path, lit, *map(make_batch, range(7)), callbacks=[spoil, log])
    assert error.startswith("step 4 (after 48 tokens): loss is nan and gradient norm is nan (steps skipped before: 2);")
    assert about["step"] == 4
    assert [row["tokens"] for row in log.rows] == [12, 24, 36, 48]  # the schedule and the data go on
    assert [row["train/skipped"] for row in log.rows] == [0, 1, 1, 2]
    assert [math.isfinite(row["train/loss"]) for row in log.rows] == [True, False, True, False]

    def same(a: int, b: int) -> bool:
        return all(torch.equal(value, spoil.weights[b][name]) for name, value in spoil.weights[a].items())

    assert [same(step, step + 1) for step in range(4)] == [False, True, False, True]
    said = capsys.readouterr().err
    assert "step 1 (after 12 tokens): loss is nan and gradient norm is nan; skipped, 1 of at most 2" in said


@pytest.mark.fault(
    "loss that is not finite, with max_skipped_steps: 1",
    "a layer's output times infinity",
    "the skipped step: weights and optimizer are those without it",
)
def test_a_skipped_step_is_as_if_its_batch_were_not_there(tmp_path: Path) -> None:
    """Weights and the optimizer's state, bitwise, at the learning rates of the same tokens."""
    results = []
    for spoiled in (True, False):
        lit = make_lit(make_lm("cpu"), max_skipped_steps=1, lr=1e-2, max_tokens=10**12)  # the learning rate stays
        batches = [make_batch(0), make_batch(1), make_batch(2)] if spoiled else [make_batch(0), make_batch(2)]
        path = saved(tmp_path / f"{spoiled}.ckpt", lit, *batches, max_steps=len(batches), callbacks=[Spoil("head", 1)] if spoiled else [])
        results.append((lit.lm.state_dict(), torch.load(path, weights_only=True)))
    (weights, skipping), (expected, plain) = results
    assert all(torch.allclose(value, expected[name], rtol=0, atol=1e-12) for name, value in weights.items())
    states = [content["optimizer_states"][0]["state"] for content in (skipping, plain)]
    assert {int(state["step"]) for state in states[0].values()} == {2}
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[1])
    assert skipping["lightning_mixers"] == {"format": 1, "tokens": 36, "skipped": 1}
    again = make_lit(make_lm("cpu"), max_skipped_steps=1)
    with pytest.raises(FloatingPointError, match="steps skipped before: 1"):  # counted over resumed runs
        fit(again, make_batch(3), ckpt_path=tmp_path / "True.ckpt", max_steps=5, callbacks=[Spoil("head", 3)])


def test_a_loss_scale_that_overflows_is_no_skipped_step() -> None:
    lit = make_lit(make_lm("cpu"), max_skipped_steps=1)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    log = fit(lit, make_batch(0), max_steps=3, plugins=[plugin], callbacks=[Overflow(0, 1)])
    assert [row["train/skipped"] for row in log.rows] == [0, 0, 0]
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = copy.deepcopy(lit.lm.state_dict())
    log = fit(lit, make_batch(0), max_steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], callbacks=[Overflow(0)])
    assert [row["train/skipped"] for row in log.rows] == [1]  # at the least scale it is
    assert all(torch.equal(value, before[name]) for name, value in lit.lm.state_dict().items())


def test_a_number_below_0() -> None:
    with pytest.raises(ConfigError, match=r"model\.max_skipped_steps: must be at least 0, got -1"):
        make_lit(max_skipped_steps=-1)


# Several processes


@pytest.mark.fault(
    "loss that is not finite on one of two processes",
    "a layer's output times infinity on rank 1, under ddp and fsdp2",
    "the step: all processes skip it, or stop, together",
    each=2,
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_processes_skip_and_stop_together(strategy: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("guard_worker.py")
    done = subprocess.run([sys.executable, script, strategy, tmp_path], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for result in results:
        assert result["error"].startswith("step 2 (after 96 tokens): loss is nan and gradient norm is nan (steps skipped before: 1); the weights")
        assert [row["train/skipped"] for row in result["rows"]] == [0, 1]
        assert result["moved"]
        assert result["unchanged"]
        assert result["optimizer_steps"] == [1]
    about = json.loads((tmp_path / "run" / FILE).read_text())
    assert (about["rank"], about["micro_batch"], about["first"]["tensor"]) == (1, 1, "output of layers.1.mlp.up")
    assert about["run"]["processes"] == 2
    assert about["gates"]["0 (gdn2)"].keys() == {"g", "b", "w"}
    for result in results:  # of the whole, whatever a rank holds
        low, high = result["down"]
        expected = {"min": low, "max": high, "abs_max": max(-low, high), "largest": "layers.1.mlp.down.weight"}
        assert about["ranges"]["1 (swa)"]["parameters"] == expected
    assert done.stderr.count("autopsy: step 2") == 1
    backward = json.loads((tmp_path / "backward" / FILE).read_text())
    assert (backward["rank"], backward["first"]["tensor"], backward["first"]["op"]) == (1, "backward of layers.0.mlp.up", "BrokenBackward")
    assert {result["refused"] for result in results} == {"model: training cannot begin: head.weight: has values that are not finite"}
    assert [line.partition("weight")[0] for line in done.stderr.splitlines() if line.startswith("audit")] == [
        "audit: warning: layers.0.mixer.k_proj.",
        "audit: warning: layers.1.mixer.q_proj.",
        "audit: error: head.",
    ]
