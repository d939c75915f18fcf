"""The optimizer's groups, the learning rate by tokens, and scaled and clipped gradients."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from lit_cases import make_lm
from rich.console import Console
from torch import nn

from lit_modules.optim import build_adamw, cosine_lr, describe_groups, group_table, optimizer_groups, scale_and_clip
from mixers.base import ParameterGroups

SCHEDULE = {"peak": 4e-4, "warmup_tokens": 1000, "max_tokens": 9000, "final_ratio": 0.1}


# The learning rate


@pytest.mark.parametrize(
    ("tokens", "share"),
    [(0, 0.0), (250, 0.25), (1000, 1.0), (5000, 0.55), (9000, 0.1), (10**12, 0.1), (3000, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)],
)
def test_learning_rate_at_corner_points(tokens, share):
    assert cosine_lr(tokens, **SCHEDULE) == pytest.approx(4e-4 * share, rel=1e-12)


def test_learning_rate_is_continuous_and_falls_after_warmup():
    rates = [cosine_lr(tokens, **SCHEDULE) for tokens in range(1000, 9001)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert max(a - b for a, b in itertools.pairwise(rates)) < 1e-7


def test_learning_rate_without_warmup_and_with_nothing_else():
    assert cosine_lr(0, **(SCHEDULE | {"warmup_tokens": 0})) == 4e-4
    only = SCHEDULE | {"warmup_tokens": 9000}
    assert [cosine_lr(tokens, **only) for tokens in (4500, 9000)] == [2e-4, 4e-4]


# Groups


def test_every_trainable_parameter_is_in_one_group():
    lm = make_lm("cpu", n_layers=2, layout=["gdn2", "swa"])
    lm.embedding.weight.requires_grad_(False)
    groups = {group.name: group for group in optimizer_groups(lm, weight_decay=0.3)}
    names = [name for group in groups.values() for name, _ in group.parameters]
    assert sorted(names) == sorted(name for name, p in lm.named_parameters() if p.requires_grad)
    assert "embedding.weight" not in names
    no_decay = {name for name, _ in groups["no decay"].parameters}
    assert {"layers.0.mixer.decay.a", "layers.0.mixer.decay.delta", "norm.weight", "layers.1.mlp_norm.weight"} <= no_decay
    assert all(p.ndim >= 2 for _, p in groups["decay"].parameters)
    assert [(group.name, group.weight_decay) for group in groups.values()] == [("decay", 0.3), ("no decay", 0.0)]


def test_groups_need_no_values():
    on_meta, real = (describe_groups(optimizer_groups(make_lm(device, layout=["gdn2"]), 0.1)) for device in ("meta", "cpu"))
    assert on_meta == real


@pytest.mark.parametrize("role", ["no_decay", "fp32"])
def test_a_role_of_no_parameter_is_an_error(role, monkeypatch):
    lm = make_lm()
    wrong = ParameterGroups(frozenset(), frozenset())._replace(**{role: frozenset({"layers.0.mixer.nothing"})})
    monkeypatch.setattr(type(lm), "parameter_groups", lambda _: wrong)
    with pytest.raises(TypeError, match=r"layers\.0\.mixer\.nothing"):
        optimizer_groups(lm, 0.1)


def test_a_float32_parameter_in_bfloat16_is_an_error():
    lm = make_lm("cpu", layout=["gdn2"])
    decay = lm.layers[0].mixer.decay
    decay.a = nn.Parameter(decay.a.detach().bfloat16())
    with pytest.raises(TypeError, match=r"layers\.0\.mixer\.decay\.a: is declared float32 but stored in bfloat16"):
        optimizer_groups(lm, 0.1)


def test_table_of_groups():
    lm = make_lm("cpu", n_layers=3, layout=["gdn2"]).bfloat16()
    rows = describe_groups(optimizer_groups(lm, 0.1))
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in lm.parameters())
    assert sum(row.tensors for row in rows) == len(list(lm.parameters()))
    assert [row.dtypes for row in rows] == ["bfloat16", "bfloat16, float32"]
    assert "layers.*.mixer.decay.a" in rows[1].names
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(group_table(rows))
    text = capture.get()
    assert f"{rows[0].parameters:,}" in text
    assert "and 8 more" in text
    assert max(map(len, text.splitlines())) <= 80


def test_adamw_steps_like_torchs():
    lm = make_lm("cpu", layout=["gdn2"]).double()
    other = copy.deepcopy(lm)
    groups = optimizer_groups(lm, weight_decay=0.5)
    ours = build_adamw(groups, lr=0.1, betas=(0.8, 0.9), fused=True)  # not taken up on the CPU
    twins = dict(other.named_parameters())
    theirs = [
        torch.optim.AdamW([twins[name] for name, _ in group.parameters], lr=0.1, betas=(0.8, 0.9), weight_decay=decay)
        for group, decay in zip(groups, (0.5, 0.0), strict=True)
    ]
    for model in (lm, other):
        model(torch.arange(10).unsqueeze(0))[0].square().sum().backward()
    ours.step()
    for optimizer in theirs:
        optimizer.step()
    for name, parameter in lm.named_parameters():
        assert torch.equal(parameter, twins[name]), name


# Gradients


def with_gradients(*dtypes: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(7, 3, dtype=dtype)) for dtype in dtypes]
    for parameter in parameters:
        parameter.grad = torch.randn(7, 3, generator=generator).to(parameter.dtype)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last one has no gradient


def scaled(parameters: list[nn.Parameter], factor: float) -> list[nn.Parameter]:
    copies = [nn.Parameter(p.detach().double()) for p in parameters if p.grad is not None]
    for parameter, source in zip(copies, parameters, strict=False):
        parameter.grad = factor * source.grad.double()
    return copies


@pytest.mark.parametrize("max_norm", [None, 0, 0.5, 100.0])
def test_gradients_are_scaled_and_clipped_by_norm(max_norm):
    parameters = with_gradients(torch.float64, torch.float64)
    expected = scaled(parameters, 3.0)
    norm = torch.nn.utils.clip_grad_norm_(expected, max_norm or math.inf)
    assert scale_and_clip(parameters, 3.0, max_norm=max_norm) == pytest.approx(float(norm), rel=1e-12)
    for parameter, other in zip(parameters, expected, strict=False):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=0)


def test_gradients_are_clipped_by_value_behind_scaling():
    parameters = with_gradients(torch.float64)
    expected = scaled(parameters, 3.0)
    torch.nn.utils.clip_grad_value_(expected, 0.7)
    scale_and_clip(parameters, 3.0, max_value=0.7)
    torch.testing.assert_close(parameters[0].grad, expected[0].grad, rtol=1e-12, atol=0)


def test_gradients_of_several_dtypes_have_one_norm():
    parameters = with_gradients(torch.float32, torch.bfloat16)
    expected = scaled(parameters, 0.25)
    norm = torch.nn.utils.clip_grad_norm_(expected, 0.1)
    # the norm of the bfloat16 part is rounded to 8 bits
    assert scale_and_clip(parameters, 0.25, max_norm=0.1) == pytest.approx(float(norm), rel=4e-3)
    torch.testing.assert_close(parameters[0].grad.double(), expected[0].grad, rtol=4e-3, atol=0)
    assert parameters[1].grad.dtype == torch.bfloat16


def test_gradients_that_are_not_finite_stay():
    parameters = with_gradients(torch.float32)
    parameters[0].grad[2, 1] = math.inf
    before = parameters[0].grad.clone()
    assert scale_and_clip(parameters, 0.5, max_norm=1.0) == math.inf
    assert torch.equal(parameters[0].grad, before)


def test_no_gradient_at_all():
    assert scale_and_clip([nn.Parameter(torch.zeros(2))], 2.0, max_norm=1.0) == 0.0
