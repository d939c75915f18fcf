"""`LitLM`: the model in every precision, exact gradients over accumulation and ranks, values that are not finite, metrics."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lit_cases import (
    Batches,
    exact_gradients,
    fit,
    gradients_of,
    largest_error,
    make_batch,
    make_lit,
    make_lm,
    make_trainer,
    one_thread,  # noqa: F401
    saved,
)

from lit_modules.checkpoint import load_lm, read_checkpoint
from lit_modules.data.windows import IGNORED
from lit_modules.metrics import TokenNLL, scores, sequence_nll, token_nll
from mixers.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..


# Settings and the model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "model.lr: must be positive, got 0.0"),
        ({"lr": math.nan}, "model.lr: must be positive"),
        ({"betas": (0.9, 1.0)}, "model.betas: "),
        ({"weight_decay": -0.1}, "model.weight_decay: "),
        ({"max_tokens": 0}, "model.max_tokens: must be at least 1"),
        ({"max_tokens": 10, "warmup_tokens": 11}, r"model.warmup_tokens: must lie in 0 .. max_tokens = 10, got 11"),
        ({"final_lr_ratio": 1.5}, "model.final_lr_ratio: "),
    ],
)
def test_settings_outside_their_range(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_lit(**settings)
    assert "\n" not in str(error.value)


def test_a_meta_model_is_materialised_with_its_own_initial_values():
    lit = make_lit(make_lm("meta", layout=["gdn2"]))
    lit.configure_model()
    real = make_lm("cpu", layout=["gdn2"])
    for name, parameter in lit.lm.named_parameters():
        assert torch.equal(parameter, real.get_parameter(name)), name


def test_a_model_with_values_is_left_alone():
    lit = make_lit(make_lm("cpu"))
    lit.lm.head.weight.data.fill_(3.0)
    lit.configure_model()
    assert bool((lit.lm.head.weight == 3.0).all())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_declared_parameters_stay_float32(precision, tmp_path):
    lit = make_lit(make_lm(layout=["gdn2"]), lr=1e-4)
    seen = set()

    class Watch(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:  # noqa: ARG002
            gate = pl_module.lm.layers[0].mixer.decay
            gate.register_forward_hook(lambda module, _, gates: seen.update({module.a.dtype, module.delta.dtype, gates[0].dtype}))

    path = saved(tmp_path / "a.ckpt", lit, make_batch(0), precision=precision, max_steps=2, callbacks=[Watch()])
    others = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def check(tensors) -> None:
        for name, tensor in tensors.items():
            assert tensor.dtype == (torch.float32 if ".decay." in name else others), name

    assert seen == {torch.float32}
    check(dict(lit.lm.named_parameters()))
    check({k: v for k, v in read_checkpoint(path)["state_dict"].items() if k.startswith("lm.")})
    check(dict(load_lm(path).named_parameters()))
    again = make_lit(make_lm(layout=["gdn2"]))
    fit(again, make_batch(1), precision=precision, max_steps=2, ckpt_path=path)  # already at step 2: loads and ends
    for name, parameter in again.lm.named_parameters():
        assert torch.equal(parameter, lit.lm.get_parameter(name)), name
        assert parameter.dtype == lit.lm.get_parameter(name).dtype
    drawn = make_lm("cpu", layout=["gdn2"]).get_parameter("layers.0.mixer.decay.a")
    assert not torch.equal(drawn, drawn.bfloat16().float())
    # bfloat16 would have rounded the drawn value by up to 1/256; two steps of lr 1e-4 move it by 2e-4 and less
    assert (lit.lm.layers[0].mixer.decay.a - drawn).abs().max() < 3e-4


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_with_gradients_of_their_own_are_refused(strategy):
    import lightning.pytorch.strategies as strategies

    lit = make_lit()
    kind = getattr(strategies, strategy)
    lit._trainer = SimpleNamespace(strategy=kind.__new__(kind), max_steps=-1)
    with pytest.raises(ConfigError, match=r"trainer\.strategy: "):
        lit.setup("fit")


# The gradient


@pytest.mark.parametrize("boundary", [5, None])
def test_accumulation_equals_one_batch(boundary):
    batches = [make_batch(seed, ignored=ignored, boundary=boundary) for seed, ignored in enumerate((0, 9, 3, 12))]
    lit = make_lit(make_lm("cpu").double())
    start = copy.deepcopy(lit.lm)
    log = fit(lit, *batches, accumulate_grad_batches=4, max_steps=1, precision="64-true")
    assert largest_error(gradients_of(lit.lm), exact_gradients(start, batches)) < 1e-9
    nll = sum(float(token_nll(start(b.inputs, cu_seqlens=b.cu_seqlens)[0], b.targets, reduction="sum")) for b in batches)
    assert log.rows[0]["train/loss"] == pytest.approx(nll / 24, rel=1e-12)
    assert log.rows[0]["train/bpb"] == pytest.approx(nll / math.log(2) / (3 * 24), rel=1e-12)
    assert log.rows[0]["tokens"] == 48  # positions, valid or not


def test_the_shorter_last_window_of_an_epoch_is_normalised_too():
    batches = [make_batch(seed, ignored=2 * seed) for seed in range(6)]
    lit = make_lit(make_lm("cpu").double(), lr=1e-30)  # the weights stay
    start = copy.deepcopy(lit.lm)
    log = fit(lit, *batches, accumulate_grad_batches=4, max_steps=2, precision="64-true")
    assert largest_error(gradients_of(lit.lm), exact_gradients(start, batches[4:])) < 1e-9
    assert [row["tokens"] for row in log.rows] == [48, 72]


def test_micro_batches_of_different_lengths_are_weighted_by_tokens():
    batches = [make_batch(0, tokens=12), make_batch(1, tokens=20, ignored=3), make_batch(2, tokens=6)]
    lit = make_lit(make_lm("cpu").double())
    start = copy.deepcopy(lit.lm)
    fit(lit, *batches, accumulate_grad_batches=3, max_steps=1, precision="64-true")
    assert largest_error(gradients_of(lit.lm), exact_gradients(start, batches)) < 1e-9


def test_a_step_without_any_target_does_no_harm():
    lit = make_lit(make_lm("cpu"))
    fit(lit, make_batch(0, ignored=12), max_steps=1)
    assert all(bool((g == 0).all()) for g in gradients_of(lit.lm).values())


def test_gradients_are_clipped_behind_normalisation():
    batches = [make_batch(0, ignored=10), make_batch(1)]
    lit = make_lit(make_lm("cpu").double())
    start = copy.deepcopy(lit.lm)
    log = fit(lit, *batches, accumulate_grad_batches=2, max_steps=1, precision="64-true", gradient_clip_val=0.01)
    exact = exact_gradients(start, batches)
    norm = math.sqrt(sum(float(g.square().sum()) for g in exact.values()))
    assert log.rows[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-9)
    clipped = {name: g * 0.01 / (norm + 1e-6) for name, g in exact.items()}
    assert largest_error(gradients_of(lit.lm), clipped) < 1e-9


def test_two_processes_equal_one(tmp_path):
    import lit_ddp_worker as worker

    path = tmp_path / "ddp.pt"
    script = Path(__file__).with_name("lit_ddp_worker.py")
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = torch.load(path, weights_only=True), worker.run(devices=1)
    assert largest_error(two["gradients"], one["gradients"]) < 1e-9
    assert largest_error(two["weights"], one["weights"]) < 1e-9
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-9)
    assert two["tokens"] == one["tokens"] == 48
    start = make_lm("cpu").double()
    assert largest_error(two["gradients"], exact_gradients(start, worker.TRAIN)) < 1e-9


# Half precision and values that are not finite


class Overflow(Callback):
    """Puts an infinity into a gradient of given optimizer steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step in self.steps:
            pl_module.lm.head.weight.grad[0, 0] = math.inf


def test_a_loss_scale_may_overflow_and_its_gradient_is_exact():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    lit = make_lit(make_lm("cpu"), lr=1e-30)
    start = copy.deepcopy(lit.lm)
    batches = [make_batch(0, ignored=6), make_batch(1)]
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    log = fit(lit, *batches, accumulate_grad_batches=2, max_steps=3, plugins=[plugin], callbacks=[Overflow(1)], gradient_clip_val=1e9)
    assert [math.isfinite(row["train/grad_norm"]) for row in log.rows] == [True, False, True]
    assert scaler.get_scale() == 2.0**9
    # autocast computes in float16: 5e-3 of the largest entry
    assert largest_error(gradients_of(lit.lm), exact_gradients(start, batches)) < 5e-3


def test_a_step_that_a_loss_scale_skips_leaves_the_weights():
    lit = make_lit(make_lm("cpu"))
    before = copy.deepcopy(lit.lm.state_dict())
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit(lit, make_batch(0), max_steps=1, plugins=[plugin], callbacks=[Overflow(0)], gradient_clip_val=1.0)
    assert all(torch.equal(value, before[name]) for name, value in lit.lm.state_dict().items())


def test_overflow_at_the_least_loss_scale_is_an_error():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    with pytest.raises(FloatingPointError, match="gradient norm is inf"):
        fit(make_lit(), make_batch(0), max_steps=1, plugins=[plugin], callbacks=[Overflow(0)])


def test_a_gradient_that_is_not_finite_is_an_error():
    lit = make_lit()
    with pytest.raises(FloatingPointError) as error:
        fit(lit, make_batch(0), max_steps=5, callbacks=[Overflow(2)])
    assert str(error.value) == "step 2 (after 24 tokens): gradient norm is inf; the weights were not changed"
    assert all(bool(p.isfinite().all()) for p in lit.lm.parameters())


def test_a_loss_that_is_not_finite_is_an_error():
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # noqa: ARG002
            pl_module.lm.head.weight.data[3] = math.nan

    with pytest.raises(FloatingPointError, match=r"step 0 \(after 0 tokens\): loss is nan and gradient norm is nan") as error:
        fit(make_lit(make_lm("cpu")), make_batch(0), max_steps=1, callbacks=[Spoil()])
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-true", True), ("bf16-mixed", True), ("16-mixed", False)])
def test_adamw_on_cuda_is_fused_unless_a_loss_scale_is_in_the_way(precision, fused):
    lit = make_lit(make_lm(layout=["gdn2"]))
    log = fit(lit, make_batch(0, ignored=3), accelerator="gpu", devices=1, precision=precision, max_steps=3, gradient_clip_val=1.0)
    assert [bool(group["fused"]) for group in log.trainer.optimizers[0].param_groups] == [fused, fused]
    assert log.rows[-1]["train/loss"] < log.rows[0]["train/loss"]


# Metrics


def test_evaluation_is_per_token_and_per_byte():
    batches = [make_batch(0, ignored=1), make_batch(1, ignored=11)]
    lit = make_lit(make_lm("cpu").double())
    for stage, run in (("val", make_trainer(precision="64-true").validate), ("test", make_trainer(precision="64-true").test)):
        (metrics,) = run(lit, Batches(*batches), verbose=False)
        nll = sum(float(token_nll(lit.lm(b.inputs, cu_seqlens=b.cu_seqlens)[0], b.targets, reduction="sum")) for b in batches)
        expected = {"loss": nll / 12, "perplexity": math.exp(nll / 12), "bpb": nll / math.log(2) / 36}
        assert metrics == pytest.approx({f"{stage}/{name}": value for name, value in expected.items()}, rel=1e-12)


def test_metric_sums_stay_float64():
    metric = torch.nn.ModuleDict({"nll": TokenNLL()}).to(dtype=torch.bfloat16).half()["nll"]
    for _ in range(3):
        metric.update(torch.tensor(1e8 + 1, dtype=torch.float64), torch.tensor(10**8 + 1), torch.tensor(2))
    assert metric.nll.dtype == torch.float64
    assert metric.compute() == scores(3e8 + 3, 3e8 + 3, 6)
    assert metric.compute().loss == 1.0


def test_scores_of_nothing_and_of_too_much():
    assert all(math.isnan(value) for value in scores(0.0, 0, 0))
    assert scores(2000.0, 2, 1).perplexity == math.inf
    assert math.isnan(scores(math.nan, 2, 1).perplexity)


def test_loss_of_half_precision_logits_is_float32():
    logits = torch.randn(2, 3, 5).bfloat16()
    targets = torch.tensor([[1, IGNORED, 2], [0, 4, IGNORED]])
    nll = token_nll(logits, targets)
    reference = -logits.double().log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), reference * (targets != IGNORED), rtol=1e-5, atol=1e-6)


def test_prediction_is_by_document_or_by_row():
    packed, rows = make_batch(0, ignored=7, boundary=5), make_batch(0, ignored=7, boundary=None)
    lit = make_lit(make_lm("cpu").double())
    (by_document,) = make_trainer(precision="64-true").predict(lit, Batches(packed))
    assert by_document.tokens.tolist() == [0, 5]
    for piece, nll in zip((slice(0, 5), slice(5, 12)), by_document.nll, strict=True):
        alone = lit.lm(packed.inputs[:, piece])[0]
        assert float(nll) == pytest.approx(float(token_nll(alone, packed.targets[:, piece], reduction="sum")), abs=1e-10)
    (by_row,) = make_trainer(precision="64-true").predict(lit, Batches(rows))
    assert by_row.tokens.tolist() == [5]
    assert sequence_nll(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), None).nll.tolist() == pytest.approx([3 * math.log(4)] * 2)
