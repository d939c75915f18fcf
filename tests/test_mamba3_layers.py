"""The parts of Mamba-3: what they compute is float32 whatever the layer's dtype, and the angles of long sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.rotary.reference import running_sum, wrapped
from mixers.contract import assert_close, error, inputs
from mixers.init import initialize
from mixers.mamba3 import Mamba3
from mixers.mamba3_layers import HeadRMSNorm, unseen


def test_running_sums_of_long_and_packed_sequences() -> None:
    """In float32 to float32 rounding of the angle after 100,000 tokens; gradients stay inside a document."""
    turn = 0.3 * inputs(1, 100_000, 2, dtype=torch.float32).abs()
    exact = turn.double().cumsum(1)
    found = running_sum(turn, None, None)
    assert found.dtype == torch.float32
    assert (wrapped(found.double() - exact)).abs().max() < 1e-6
    assert found.abs().max() <= 3.15
    ends = torch.tensor([0, 3, 99_990, 100_000])
    found = running_sum(turn, torch.ones(3, 2), ends)
    for start, end in ((0, 3), (3, 99_990), (99_990, 100_000)):
        assert wrapped(found[:, start:end].double() - 1 - turn[:, start:end].double().cumsum(1)).abs().max() < 1e-6
    x, weights = inputs(2, 1, 7, 3, dtype=torch.float64)[0].requires_grad_(), inputs(1, 7, 3, dtype=torch.float64, seed=2)
    first = inputs(2, 3, dtype=torch.float64, seed=3).requires_grad_()
    (running_sum(x, first, torch.tensor([0, 3, 7])) * weights).sum().backward()
    assert_close(x.grad, torch.cat([part.flip(1).cumsum(1).flip(1) for part in weights.split([3, 4], 1)], 1), "gradient")
    assert_close(first.grad, torch.cat([part.sum(1) for part in weights.split([3, 4], 1)]), "gradient of the first angle")


def test_steps_are_float32_in_a_bfloat16_layer() -> None:
    """Each number to float32 rounding of what float64 makes of the same inputs."""
    mixer = Mamba3(256, head_dim=2, d_state=8)
    initialize(mixer, 0)
    f, a, trap, theta = 4 * torch.randn(4, 64, 256).bfloat16()
    found = mixer.bfloat16().step_size(f, a, trap, theta)
    delta = F.softplus(f.double() + mixer.step_size.dt_bias.double())
    lam = trap.double().sigmoid()
    exact = {"g": -F.softplus(a.double()).clamp_min(1e-4) * delta, "zeta": lam * delta, "behind": (1 - lam) * delta, "delta": delta}
    for name, value in exact.items():
        assert getattr(found, name).dtype == torch.float32
        assert (getattr(found, name).double() / value - 1).abs().max() < 5e-6, name


@pytest.mark.parametrize("rank", [1, 4])
def test_what_rows_lack_is_float32_under_autocast(rank: int) -> None:
    q, k, v, k_prev, v_prev = (inputs(2, rank, 3, 8, dtype=torch.bfloat16, seed=seed) for seed in range(5))
    zeta, w = (inputs(2, 3, dtype=torch.float32, seed=seed) for seed in (5, 6))
    exact = unseen(*(t.double() for t in (q, k, v, zeta, k_prev, v_prev, w)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = unseen(q, k, v, zeta, k_prev, v_prev, w)
    assert found.dtype == torch.float32
    assert error(found, exact) < 1e-6


def test_norm_of_heads_is_float32() -> None:
    norm, x = HeadRMSNorm(24, 1e-5).bfloat16(), inputs(7, 3, 8, dtype=torch.bfloat16)
    found, wide = norm(x), x.double()
    assert found.dtype == torch.float32
    assert error(found, wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()) < 1e-6
