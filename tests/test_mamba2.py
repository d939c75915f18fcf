"""Mamba-2 against its recurrence, token by token in float64; the parameters of `mamba_ssm.modules.mamba2.Mamba2`; bad input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import registry, testing
from mixers.contract import TOLERANCE, Case, error, inputs
from mixers.errors import ConfigError
from mixers.init import initialize
from mixers.mamba2 import MAMBA_SSM, GroupRMSNorm, Mamba2

D = 24
SIZES: dict[str, dict[str, Any]] = {
    "plain": {"head_dim": 8, "d_state": 5},
    "groups": {"head_dim": 6, "d_state": 7, "num_groups": 4, "conv_size": 3},
    "wide": {"expand": 3, "head_dim": 12, "d_state": 16, "num_groups": 2, "norm_eps": 1e-3},
    "one head": {"expand": 1, "head_dim": 24, "d_state": 4},
}


def published_shapes(d_model: int, *, expand: int = 2, head_dim: int, d_state: int, num_groups: int = 1, conv_size: int = 4) -> dict[str, list[int]]:
    """Names and shapes of `mamba_ssm.modules.mamba2.Mamba2(d_model, d_state, conv_size, expand=.., headdim=.., ngroups=..).state_dict()`."""
    inner, shared = expand * d_model, 2 * num_groups * d_state
    heads = inner // head_dim
    return {
        "dt_bias": [heads],
        "A_log": [heads],
        "D": [heads],
        "in_proj.weight": [2 * inner + shared + heads, d_model],
        "conv1d.weight": [inner + shared, 1, conv_size],
        "conv1d.bias": [inner + shared],
        "norm.weight": [inner],
        "out_proj.weight": [d_model, inner],
    }


def weights(settings: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A state dict of mamba_ssm with random values in float64."""
    shapes = published_shapes(D, **{key: value for key, value in settings.items() if key != "norm_eps"})
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(*shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


def naive_mamba2(p: dict[str, Tensor], x: Tensor, m: Mamba2, eps: float = 1e-5) -> Tensor:
    """One sequence x [T, D], token by token and head by head: h_t = exp(dt A) h_{t-1} + dt B x^T, y = C h + D x."""
    P, N, G = m.head_dim, m.d_state, m.num_groups
    inner = p["out_proj.weight"].shape[1]
    heads, taps = inner // P, p["conv1d.weight"].shape[-1]
    z, xBC, dt = (x @ p["in_proj.weight"].T).split([inner, inner + 2 * G * N, heads], -1)
    rows = [sum(p["conv1d.weight"][:, 0, taps - 1 - j] * xBC[t - j] for j in range(taps) if t >= j) for t in range(len(x))]
    u, B, C = F.silu(torch.stack(rows) + p["conv1d.bias"]).split([inner, G * N, G * N], -1)
    dt = torch.log1p((dt + p["dt_bias"]).exp())
    outputs = []
    h = [torch.zeros(N, P, dtype=x.dtype)] * heads
    for t in range(len(x)):
        y = []
        for j in range(heads):
            group = slice(j // (heads // G) * N, j // (heads // G) * N + N)
            value = u[t, j * P : (j + 1) * P]
            h[j] = torch.exp(-dt[t, j] * p["A_log"][j].exp()) * h[j] + dt[t, j] * torch.outer(B[t, group], value)
            y.append(C[t, group] @ h[j] + p["D"][j] * value)
        gated = (torch.cat(y) * F.silu(z[t])).view(G, -1)
        normed = gated / (gated.square().mean(-1, keepdim=True) + eps).sqrt()
        outputs.append(p["out_proj.weight"] @ (normed.view(-1) * p["norm.weight"]))
    return torch.stack(outputs)


def loaded(settings: dict[str, Any], p: dict[str, Tensor]) -> Mamba2:
    mixer = Mamba2(D, **settings).double()
    mixer.load_mamba_ssm(p)
    return mixer


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("tokens", [1, 21, 70])
def test_layer_against_the_recurrence(name: str, tokens: int) -> None:
    """The output, and the gradients of the input and of every parameter."""
    p = {key: value.requires_grad_() for key, value in weights(SIZES[name]).items()}
    mixer, x, cotangent = (
        loaded(SIZES[name], p),
        inputs(tokens, D, dtype=torch.float64).requires_grad_(),
        inputs(tokens, D, dtype=torch.float64, seed=2),
    )
    y = naive_mamba2(p, x, mixer, SIZES[name].get("norm_eps", 1e-5))
    expected = dict(zip(["x", *p], torch.autograd.grad((y * cotangent).sum(), [x, *p.values()]), strict=True))
    out = mixer(x.unsqueeze(0))[0][0]
    own = dict(mixer.named_parameters())
    found = torch.autograd.grad((out * cotangent).sum(), [x, *(own[MAMBA_SSM[key]] for key in p)])
    assert error(out, y) < 1e-10
    for key, gradient in zip(expected, found, strict=True):
        # a first token has no decay: A_log's gradient is then zero in exact arithmetic
        assert error(gradient, expected[key], floor=1e-12) < 1e-10, key


def test_steps_and_documents_against_the_recurrence() -> None:
    """Token by token with a state, and packed documents, each from nothing."""
    p = weights(SIZES["groups"])
    mixer, x = loaded(SIZES["groups"], p), inputs(12, D, dtype=torch.float64)
    state = mixer.init_state(1)
    rows = []
    for t in range(12):
        y, state = mixer.step(x[t : t + 1], state)
        rows.append(y[0])
    assert error(torch.stack(rows), naive_mamba2(p, x, mixer)) < 1e-10
    packed, _ = mixer(x.unsqueeze(0), cu_seqlens=torch.tensor([0, 1, 3, 12]))
    assert error(packed[0], torch.cat([naive_mamba2(p, part, mixer) for part in x.split([1, 2, 9])])) < 1e-10


@pytest.mark.parametrize("settings", [SIZES["groups"], {"head_dim": 64, "d_state": 3, "expand": 8, "num_groups": 3, "conv_size": 2}], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_contract_with_groups(settings: dict[str, Any], dtype: torch.dtype) -> None:
    case = Case("mamba2-groups", ("mamba2",), {"mamba2": settings}, D)
    testing.test_causality(case, dtype, 16)
    testing.test_eval_gradients_equal_train_gradients_and_runs_repeat(case, dtype)
    testing.test_any_split_equals_one_forward(case, dtype, [2, 2, -3, 1, 62, -2])
    testing.test_packed_equals_separate(case, dtype)
    testing.test_ragged_prompts(case, dtype)
    testing.test_one_token(case, dtype)
    testing.test_gradients_are_finite_at_extremes(case, dtype, 1e4)
    testing.test_state_numel(case, 3)


# --- parameters ---


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_mamba_ssm(name: str) -> None:
    settings = {key: value for key, value in SIZES[name].items() if key != "norm_eps"}
    own = {key: list(value.shape) for key, value in Mamba2(D, **settings).state_dict().items()}
    assert {theirs: own.pop(ours) for theirs, ours in MAMBA_SSM.items()} == published_shapes(D, **settings)
    assert not own


def test_sizes_of_the_paper() -> None:
    """d_model 2304: in-projection 9416 x 2304, 4736 channels under 4 taps and a bias, 3 numbers a head, norm, out-projection."""
    with torch.device("meta"):
        mixer = Mamba2(2304)
    assert (mixer.num_heads, mixer.width) == (72, 4608)
    assert sum(p.numel() for p in mixer.parameters()) == 9416 * 2304 + 4736 * 5 + 3 * 72 + 4608 + 4608 * 2304
    assert mixer.init_state(1, device="meta").S.numel() == 2 * 2304 * 64 == 294_912
    assert mixer.flops(10) == 2 * 10 * (9416 * 2304 + 4736 * 4 + 2 * 294_912 + 4608 * 2304)


def test_initial_values_and_roles() -> None:
    """exp(A_log) in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1], floor 1e-4, D and the norm's weight 1; the first three in float32.
    The convolution begins as torch's Conv1d does: weight and bias uniform in +- 1 / sqrt(taps)."""
    mixer = Mamba2(256, head_dim=2)
    initialize(mixer, 0)
    rate, dt = mixer.step_size.a.exp(), F.softplus(mixer.step_size.delta)
    assert 1 <= rate.min() < 1.5
    assert 15 < rate.max() <= 16
    assert 0.99e-3 <= dt.min() < 1.2e-3
    assert 0.08 < dt.max() <= 0.1001
    assert 0.3 < (dt < 0.01).float().mean() < 0.7
    ranges = {name: [math.exp(bound) for bound in bounds] for name, bounds in mixer.step_size.initial_ranges().items()}
    assert ranges == {"a": pytest.approx([1, 16]), "delta": pytest.approx([math.expm1(1e-4), math.expm1(0.1)])}
    for x in (mixer.conv1d.weight, mixer.conv1d.bias):
        assert 0.48 < x.max() <= 0.5
        assert -0.5 <= x.min() < -0.48
        assert 0.45 < (x.abs() < 0.25).float().mean() < 0.55
    assert (mixer.skip.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    groups = mixer.parameter_groups()
    assert groups.fp32 == {"step_size.a", "step_size.delta", "skip.D"}
    assert groups.no_decay == groups.fp32 | {"conv1d.bias", "norm.weight"}


def test_steps_and_decay_are_float32_in_a_bfloat16_layer() -> None:
    """Each number to float32 rounding of what float64 makes of the same inputs."""
    mixer = Mamba2(256, head_dim=2)
    initialize(mixer, 0)
    steps, f = mixer.bfloat16().step_size, 4 * torch.randn(64, 256).bfloat16()
    delta = F.softplus(f.double() + steps.delta.double())
    rate = -steps.a.double().exp()
    for found, exact in zip(steps(f), ((rate * delta).unsqueeze(-1), delta.unsqueeze(-1), rate), strict=True):
        assert found.dtype == torch.float32
        assert (found.double() / exact - 1).abs().max() < 5e-6  # the rounding of -20 is 1e-6 of softplus(-20)


def test_caches_are_in_the_dtype_that_was_asked_for() -> None:
    """The convolution's; the recurrence's state is float32 at least. A step keeps both."""
    mixer = Mamba2(D, **SIZES["plain"])
    for dtype in (torch.bfloat16, torch.float16, None):
        state = mixer.init_state(2, dtype=dtype)
        assert (state.S.dtype, state.conv.dtype) == (torch.float32, dtype or torch.float32)
        _, after = mixer.step(torch.randn(2, D), state)
        assert (after.S.dtype, after.conv.dtype) == (torch.float32, dtype or torch.float32)


def test_norm_of_large_values() -> None:
    """Squares that float32 cannot hold; small values are normalised as the formula says, epsilon included."""
    norm = GroupRMSNorm(8, 2, eps=1e-5)
    x = torch.randn(5, 8)

    def direct(x: Tensor) -> Tensor:
        y = x.double().view(5, 2, 4)
        return (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(5, 8)

    for size in (1e-6, 1e-3, 1.0, 1e3, 1e30):
        assert error(norm(size * x), direct(size * x)) < 1e-6, size


# --- loading and bad input ---


def test_load_refuses_in_one_line_and_changes_nothing() -> None:
    good, settings = weights(SIZES["plain"]), SIZES["plain"]
    mixer = loaded(settings, weights(settings, seed=1))
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    for bad, expected in (
        ({k: v for k, v in good.items() if k != "dt_bias"}, "has no tensor dt_bias (it has: A_log, D, conv1d.bias"),
        ({f"backbone.layers.0.mixer.{k}": v for k, v in good.items()}, "has no tensor in_proj.weight (it has: backbone.layers.0.mixer.A_log"),
        ({}, "has no tensor in_proj.weight (it has: none)"),
        ({f"layers.{i}.{k}": v for k, v in good.items() for i in range(48)}, "layers.1.out_proj.weight, ...)"),
        ({**good, "a\nb": torch.ones(1)}, "has tensors that this layer does not have: a b (legal: in_proj.weight, "),
        ({**good, "A_log": torch.zeros(3)}, "A_log has the shape [3], this layer's is [6]"),
        ({**good, "conv1d.weight": good["conv1d.weight"].squeeze(1)}, "conv1d.weight has the shape [58, 4], this layer's is [58, 1, 4]"),
        ({**good, "norm.weight": [1.0] * 48}, "norm.weight must be a tensor of floating-point numbers, got list"),
        (
            {**good, "norm.weight": torch.ones(48).to_sparse()},
            "norm.weight must be a tensor of floating-point numbers, got torch.float32, torch.sparse_coo",
        ),
        ({**good, "norm.weight": torch.full((48,), math.nan)}, "norm.weight has numbers that are not finite in torch.float64"),
        ({**good, 7: torch.ones(1), "extra": torch.ones(1)}, "has tensors that this layer does not have: 7, extra (legal: "),
        (None, "must be a mapping of names to tensors, got NoneType"),
        (
            {**good, "norm.weight": torch.ones(48, dtype=torch.complex64)},
            "norm.weight must be a tensor of floating-point numbers, got torch.complex64",
        ),
        (
            {**good, "norm.weight": torch.ones(48, device="meta")},
            "norm.weight must be a tensor of floating-point numbers, got a tensor without values",
        ),
        ({**good, "in_proj.bias": torch.zeros(112)}, "has tensors that this layer does not have: in_proj.bias (legal: in_proj.weight, "),
    ):
        with pytest.raises(ConfigError) as raised:
            mixer.load_mamba_ssm(bad)
        assert str(raised.value).startswith("state dict of mamba_ssm: ")
        assert expected in str(raised.value)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 700
    assert all(torch.equal(p, before[name]) for name, p in mixer.named_parameters())
    with pytest.raises(ConfigError, match=r"norm\.weight has numbers that are not finite in torch\.float32"):
        copy.deepcopy(mixer).float().load_mamba_ssm({**good, "norm.weight": torch.full((48,), 1e300, dtype=torch.float64)})
    with pytest.raises(ConfigError, match=r"in_proj\.weight cannot be taken: this layer is on the meta device"):
        copy.deepcopy(mixer).to("meta").load_mamba_ssm(good)
    mixer.load_mamba_ssm(good)
    assert torch.equal(mixer.step_size.a, good["A_log"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"head_dim": 7}, "head_dim: 7 does not divide expand * d_model = 48 channels (legal: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48)"),
        ({}, "head_dim: 64 does not divide expand * d_model = 48 channels"),
        ({"head_dim": 8, "num_groups": 4}, "num_groups: 4 does not divide the 6 heads (expand * d_model / head_dim) (legal: 1, 2, 3, 6)"),
        ({"head_dim": 8, "num_groups": 0}, "num_groups: must be an integer >= 1, got 0"),
        ({"head_dim": 0}, "head_dim: must be an integer >= 1, got 0"),
        ({"head_dim": 8, "d_state": 0}, "d_state: must be an integer >= 1, got 0"),
        ({"head_dim": 8, "d_state": -4}, "d_state: must be an integer >= 1, got -4"),
        ({"head_dim": 8, "expand": 0}, "expand: must be an integer >= 1, got 0"),
        ({"head_dim": 8, "norm_eps": -1.0}, "norm_eps: must be a finite number above 0, got -1.0"),
        ({"head_dim": 8, "conv_size": 1}, "conv_size: must be an integer >= 2, got 1"),
        ({"head_dim": 8, "d_state": "wide"}, "d_state"),
        ({"headdim": 8}, "unknown setting 'headdim'; did you mean 'head_dim'?"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        registry.build("mamba2", D, {"mamba2": settings})
    message = str(raised.value)
    assert message.startswith("mixers.mamba2")
    assert expected in message
    assert "\n" not in message
