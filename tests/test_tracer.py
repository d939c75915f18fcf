"""What an autopsy blames a gradient that is not finite on, wherever it comes from, and the ranges that it gives beside."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lit_cases import make_batch, make_lit, make_lm, one_thread  # noqa: F401
from test_autopsy import stopped
from torch.utils.checkpoint import checkpoint

from lit_modules.autopsy import FILE
from lit_modules.metrics import token_nll
from lit_modules.tracer import run_again, value_range

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..


class Broken(torch.autograd.Function):
    """Its input; the gradient of that is spoiled, and no others are."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, ctx.by), None


class BrokenWeight(torch.autograd.Function):
    """x * weight, with a gradient of the weight alone that is not finite."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * weight, torch.full_like(weight, math.inf)


class Break(Callback):
    """Puts something behind a module's forward when training starts."""

    def __init__(self, module: str, behind: Any) -> None:
        self.module, self.behind = module, behind

    def on_train_start(self, trainer, pl_module) -> None:  # noqa: ARG002
        pl_module.lm.get_submodule(self.module).register_forward_hook(self.behind)


BEHIND = ["layers.0.mlp", "layers.0", "layers.1.mixer.o_proj", "layers.1.mlp_norm", "norm", "head", "embedding"]


@pytest.mark.fault(
    "gradient that is not finite", "a backward pass that returns NaN", "the step: the run stops, the module is named", each=len(BEHIND)
)
@pytest.mark.parametrize("module", BEHIND)
def test_a_backward_pass_that_returns_nan_is_named_and_not_what_it_reaches(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def behind(_, __, y):
        return (Broken.apply(y[0], math.nan), y[1]) if isinstance(y, tuple) else Broken.apply(y, math.nan)

    error, about = stopped(tmp_path, make_lit(make_lm(n_layers=2, layout=["gdn2", "swa"])), callbacks=[Break(module, behind)])
    assert error.startswith("step 0 (after 0 tokens): gradient norm is nan;")
    first = about["first"]
    assert (first["kind"], first["tensor"], first["op"]) == ("gradient", f"backward of {module}", "BrokenBackward")
    assert first["not_finite"] == first["of"] == 12 * (31 if module == "head" else 8)
    number = int(module[7]) if module.startswith("layers") else None
    assert (first["layer"], first["mixer"]) == (number, None if number is None else ("gdn2", "swa")[number])
    assert f"  first: gradient: backward of {module} (BrokenBackward), " in capsys.readouterr().err


def test_the_backward_pass_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lit = make_lit()
    nll = lit._nll
    monkeypatch.setattr(lit, "_nll", lambda batch: (Broken.apply(nll(batch)[0], math.inf), nll(batch)[1]))
    _, about = stopped(tmp_path, lit)
    assert about["first"] | {"shape": []} == about["first"]
    assert (about["first"]["tensor"], about["first"]["layer"]) == ("backward of the loss", None)


def test_a_gradient_of_a_parameter_alone(tmp_path: Path) -> None:
    lit = make_lit(make_lm("cpu", n_layers=2))
    norm = lit.lm.layers[0].mlp_norm
    _, about = stopped(tmp_path, lit, callbacks=[Break("layers.0.mlp_norm", lambda _, __, y: BrokenWeight.apply(y, norm.weight))])
    assert about["first"]["tensor"] == "backward of layers.0.mlp_norm"
    assert about["bad_gradients"] == ["layers.0.mlp_norm.weight"]
    assert about["first"]["not_finite"] == 8


def test_finite_gradients_whose_sum_is_not(tmp_path: Path) -> None:
    def twice(_, __, y):
        return Broken.apply(y, 2e38) + Broken.apply(y, 2e38)

    _, about = stopped(tmp_path, make_lit(make_lm(n_layers=2)), callbacks=[Break("layers.1.mlp.down", twice)])
    assert about["first"]["tensor"] == "sum of gradients in layers.1.mlp.down"


def test_the_backward_pass_of_a_norm_whose_forward_hides_an_overflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """x**2 is infinite, so x / its root is 0 and the loss finite: what a learning rate that is far too large leads to. Ranges say why."""
    lit = make_lit(make_lm("cpu", n_layers=2, layout=["gdn2", "swa"]))
    with torch.no_grad():
        lit.lm.layers[1].mlp.down.weight.mul_(1e30)
        lit.lm.norm.weight.mul_(1e20)  # and the gradient of that root overflows, times 0
    error, about = stopped(tmp_path, lit)
    assert error.startswith("step 0 (after 0 tokens): gradient norm is nan;")
    assert (about["first"]["kind"], about["first"]["tensor"]) == ("gradient", "backward of norm")
    ranges = about["ranges"]
    assert ranges.keys() == {"embedding", "0 (gdn2)", "1 (swa)", "norm", "head"}
    weight = lit.lm.layers[1].mlp.down.weight.detach()
    low, high = float(weight.min()), float(weight.max())
    expected = {"min": low, "max": high, "abs_max": max(-low, high), "largest": "layers.1.mlp.down.weight"}
    assert ranges["1 (swa)"]["parameters"] == expected
    assert 1e20 < ranges["1 (swa)"]["output"]["abs_max"] < 1e30
    assert ranges["norm"]["output"] == {"min": 0, "max": 0, "abs_max": 0, "not_finite": 0}
    largest = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  largest: ")]
    size, output = expected["abs_max"], ranges["1 (swa)"]["output"]["abs_max"]
    assert largest == [f"  largest: parameter {size:.3g} in layers.1.mlp.down.weight, output {output:.3g} of layer 1 (swa)"]


def test_a_forward_that_overflows(tmp_path: Path) -> None:
    lit = make_lit(make_lm("cpu", n_layers=2))
    with torch.no_grad():
        lit.lm.layers[0].mlp.up.weight.fill_(1e38)
    _, about = stopped(tmp_path, lit)
    assert (about["first"]["kind"], about["first"]["tensor"]) == ("activation", "output of layers.0.mlp.up")
    assert about["ranges"]["0 (attention)"]["output"]["not_finite"] > 0
    text = (tmp_path / FILE).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_module_that_is_run_again_for_its_backward_pass(reentrant: bool) -> None:
    """Activation checkpointing in a plug-in: its modules are called twice, the second time out of order."""
    lm = make_lm("cpu", n_layers=2)
    up, mlp = lm.layers[0].mlp.up, lm.layers[0].mlp
    inside = mlp.forward
    mlp.forward = lambda x: checkpoint(inside, x, use_reentrant=reentrant)
    up.register_forward_hook(lambda _, __, y: Broken.apply(y, math.nan))
    (found,) = run_again(lm, make_batch(0), lambda batch: token_nll(lm(batch.inputs)[0], batch.targets, reduction="sum"))
    assert found["first"]["tensor"] == f"backward of layers.0.mlp{'' if reentrant else '.up'}"
    assert found["first"]["op"] == ("CheckpointFunctionBackward" if reentrant else "BrokenBackward")


def test_ranges_leave_out_what_is_not_finite() -> None:
    x = torch.tensor([math.nan, -3.0, math.inf, 2.0])
    assert value_range(x) == {"min": -3, "max": 2, "not_finite": 2}
    assert math.isnan(value_range(x[:1])["min"])
    assert value_range(x[:1])["not_finite"] == 1
    assert math.isnan(value_range(x[:0])["max"])  # an empty shard
