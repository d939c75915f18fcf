"""The audit of parameters before a training: silent on every fresh model, one line for every fault."""

from __future__ import annotations

import math

import pytest
import torch
from lit_cases import fit, make_batch, make_lit, make_lm, one_thread  # noqa: F401
from torch import nn

from lit_modules.audit import Finding, audit, without_gradient
from lit_modules.autopsy import StepGuard
from lit_modules.decoder_lm import DecoderLM
from lit_modules.metrics import token_nll
from mixers import registry
from mixers.contract import VARIANTS, small_settings
from mixers.errors import ConfigError
from mixers.layers import FP32Module

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..

CASES = {name: (name, {}) for name in registry.BUILT_IN} | VARIANTS


def lm_of(case: str, n_layers: int = 2) -> DecoderLM:
    name, extra = CASES[case]
    return make_lm("cpu", d_model=16, n_layers=n_layers, layout=[name], mixers={name: small_settings(name, extra)})


def backward(lm: DecoderLM) -> None:
    batch = make_batch(0)
    token_nll(lm(batch.inputs, cu_seqlens=batch.cu_seqlens)[0], batch.targets, reduction="sum").backward()


def matrix_of(lm: DecoderLM) -> tuple[str, nn.Parameter]:
    """The first matrix of the first mixer."""
    return next((f"layers.0.mixer.{n}", p) for n, p in lm.mixers()[0].named_parameters() if n.endswith("proj.weight"))


def decay_of(lm: DecoderLM) -> tuple[str, nn.Parameter] | None:
    """A parameter with a declared range."""
    for prefix, module in lm.named_modules():
        if isinstance(module, FP32Module) and (ranges := module.initial_ranges()):
            return f"{prefix}.{next(iter(ranges))}", module.get_parameter(next(iter(ranges)))
    return None


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_model_has_no_finding(case: str) -> None:
    lm = lm_of(case)
    assert audit(lm) == []
    assert audit(lm.to(torch.bfloat16)) == []
    lm = lm_of(case)
    backward(lm)
    assert without_gradient(lm) == []


@pytest.mark.fault(
    "initial weight constant or not finite",
    "a matrix of each mixer is filled with a number, or gets a NaN or an infinity",
    "nothing: the audit names it before the first step",
    each=3,
)
@pytest.mark.parametrize("case", registry.BUILT_IN)
def test_every_fault_is_one_finding(case: str) -> None:
    lm = lm_of(case)
    name, weight = matrix_of(lm)
    before = weight.detach().clone()
    weight.data.fill_(0.5)
    assert audit(lm) == [Finding(name, "is 0.5 everywhere, and Linear draws values that differ")]
    weight.data.copy_(before)[0, 0] = math.nan
    assert audit(lm) == [Finding(name, "has values that are not finite", fatal=True)]
    weight.data.copy_(before)[0, 0] = math.inf
    assert audit(lm) == [Finding(name, "has values that are not finite", fatal=True)]


WITH_DECAY = [case for case in registry.BUILT_IN if decay_of(lm_of(case))]


def test_the_mixers_with_a_declared_decay() -> None:
    assert WITH_DECAY == ["gdn2", "kda", "gdn", "mamba2", "mamba3"]


@pytest.mark.fault(
    "decay out of range, or in bfloat16",
    "10 is added to a decay parameter of each mixer; it is rounded",
    "nothing: the audit names it before the first step",
    each=2,
)
@pytest.mark.parametrize("case", WITH_DECAY)
def test_faults_of_decays(case: str) -> None:
    lm = lm_of(case)
    name, decay = decay_of(lm)
    decay.data[0] += 10
    (finding,) = audit(lm)
    assert finding.name == name
    assert finding.what.startswith("starts at ")
    assert "outside of" in finding.what
    assert not finding.fatal
    assert audit(lm, fresh=False) == []  # training may take it there
    decay.data = decay.data.bfloat16()
    assert audit(lm) == [Finding(name, "is declared float32 but stored in bfloat16", fatal=True)]


@pytest.mark.fault("two layers with the same weights", "one is copied to the other", "nothing: the audit names it before the first step")
def test_layers_with_the_same_weights_unless_they_are_tied() -> None:
    lm = make_lm("cpu", n_layers=2)
    first, second = (block.mixer.q_proj for block in lm.layers)
    second.weight.data.copy_(first.weight.data)
    assert audit(lm) == [Finding("layers.1.mixer.q_proj.weight", "has the same values as layers.0.mixer.q_proj.weight and is not tied to it")]
    second.weight = first.weight
    assert audit(lm) == []


class Fixed(nn.Linear):
    """A plug-in's layer that starts at the same values wherever it is, and with a bias that is constant on purpose."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.arange(self.weight.numel(), dtype=torch.float32).view_as(self.weight))
            self.bias.fill_(3.0)


def test_what_reset_parameters_makes_so_is_on_purpose() -> None:
    lm = make_lm("cpu", n_layers=2)
    for block in lm.layers:
        block.mixer.o_proj = Fixed(8, 8)
    assert audit(lm) == []


@pytest.mark.fault(
    "parameter without a gradient",
    "a layer's output is cut from the graph, or multiplied by 0",
    "nothing: the audit names it at the first step",
    each=2,
)
def test_parameters_without_a_gradient() -> None:
    lm = make_lm("cpu", n_layers=2)
    lm.layers[0].mlp.register_forward_hook(lambda _, __, y: y.detach())
    lm.layers[1].mlp.up.register_forward_hook(lambda _, __, y: 0 * y)
    assert without_gradient(lm) is None  # no backward pass has been
    backward(lm)
    cut = [f"layers.0.mlp.{part}.weight" for part in ("gate", "up", "down")] + ["layers.0.mlp_norm.weight"]
    zero = [f"layers.1.mlp.{part}.weight" for part in ("gate", "up", "down")] + ["layers.1.mlp_norm.weight"]
    found = {finding.name: finding.what for finding in without_gradient(lm) or ()}
    assert found == dict.fromkeys(cut, "gets no gradient at the first step") | dict.fromkeys(
        zero, "its gradient at the first step is zero everywhere"
    )
    lm.layers[0].mlp.requires_grad_(False)  # frozen is no fault
    assert len(without_gradient(lm)) == 5


def test_a_training_prints_warnings_and_refuses_what_cannot_train(capsys: pytest.CaptureFixture[str]) -> None:
    lit = make_lit(make_lm("cpu"))
    lit.lm.layers[0].mixer.q_proj.weight.data.fill_(0.25)
    lit.lm.layers[0].mlp.register_forward_hook(lambda _, __, y: y.detach())
    fit(lit, make_batch(0, ignored=12), make_batch(1), max_steps=3)  # no target and so no gradient at all in the first step
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("audit")]
    assert said[0] == "audit: warning: layers.0.mixer.q_proj.weight: is 0.25 everywhere, and Linear draws values that differ"
    cut = ["mlp_norm", "mlp.gate", "mlp.up", "mlp.down"]
    assert said[1:] == [f"audit: warning: layers.0.{part}.weight: gets no gradient at the first step" for part in cut]
    lit = make_lit(make_lm("cpu"))
    for parameter in lit.lm.parameters():
        parameter.register_hook(torch.zeros_like)
    fit(lit, make_batch(0), make_batch(1), max_steps=2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("audit")]
    assert said == ["audit: warning: model: its gradient is zero in every parameter: nothing is learned"]
    lit = make_lit(make_lm("cpu"))
    lit.lm.head.weight.data[0, 0] = math.nan
    with pytest.raises(ConfigError, match=r"model: training cannot begin: head\.weight: has values that are not finite") as error:
        fit(lit, make_batch(0), max_steps=1)
    assert "\n" not in str(error.value)
    assert "audit: error: head.weight" in capsys.readouterr().err


def test_the_guard_costs_no_copy() -> None:
    guard, batch = StepGuard(0), make_batch(0)
    guard.add(batch, torch.tensor(1.0, requires_grad=True))
    assert guard.batches[0] is batch
    assert not guard.losses[0].requires_grad
    guard.begin()
    assert not guard.batches
