"""`bench` and its peers: stand-ins of fla's public functions, which compute the same, show that both sides get the same problem."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_cases import FakeClock, groups_of
from mamba_ssm_cases import pretend
from torch import Tensor

from kernels import causal_conv1d, delta_rule, delta_rule_step, l2_norm
from recipes.commands import bench_decode, bench_groups, bench_ops, bench_peers, problems
from recipes.commands.problems import Draw, Shape


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(attributes)
    return made


def norm(x: Tensor) -> Tensor:
    return l2_norm(x, x, backend="reference")[0]


def stand_ins() -> list[ModuleType]:
    """fla's public functions, as far as `bench` calls them."""

    def chunk_gdn2(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, use_qk_l2norm_in_kernel: bool = False) -> Any:
        q, k = (norm(q), norm(k)) if use_qk_l2norm_in_kernel else (q, k)
        return delta_rule(q, k, v, g, b, w)[0], None

    def chunk_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        return chunk_gdn2(q, k, v, g, beta.unsqueeze(-1), beta.unsqueeze(-1), **options)

    def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        return chunk_kda(q, k, v, g.unsqueeze(-1), beta, **options)

    def fused_recurrent_gdn2(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, *, initial_state: Tensor, **_: Any) -> Any:
        o, state = delta_rule_step(*(x.squeeze(1) for x in (q, k, v, g, b, w)), state=initial_state)
        return o.unsqueeze(1), state

    def fused_recurrent_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
        return fused_recurrent_gdn2(q, k, v, g, beta.unsqueeze(-1), beta.unsqueeze(-1), **options)

    def fused_kda_gate(g: Tensor, a: Tensor, delta: Tensor) -> Tensor:
        return -a.exp().unsqueeze(-1) * F.softplus(g + delta.view(g.shape[-2:]))

    def rms_norm_gated(x: Tensor, g: Tensor, weight: Tensor, _: None, *, activation: str, eps: float) -> Tensor:
        assert activation == "swish"
        return F.rms_norm(x, (x.shape[-1],), weight, eps) * F.silu(g)

    return [
        module("fla", __version__="0"),
        module("fla.ops.gdn2", chunk_gdn2=chunk_gdn2, fused_recurrent_gdn2=fused_recurrent_gdn2),
        module("fla.ops.kda", chunk_kda=chunk_kda, fused_recurrent_kda=fused_recurrent_kda),
        module("fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule),
        module("fla.ops.common.chunk_o", IS_NVIDIA_HOPPER=True),
        module("fla.ops.kda.gate", fused_kda_gate=fused_kda_gate),
        module("fla.modules.causal_conv1d", causal_conv1d=lambda x, weight, activation: causal_conv1d(x, weight, activation=activation)),
        module("fla.modules.norm.l2norm", l2norm=norm),
        module("fla.modules.norm.fused_norm_gate", rms_norm_gated=rms_norm_gated),
    ]


@pytest.fixture(name="fla")
def fla_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in stand_ins():
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("op", [op for op in bench_groups.OPS if op not in ("ssd", "siso", *bench_groups.RANKED)])
def test_peers_get_the_same_problem(op: str) -> None:
    found = groups_of(["fla", "sdpa"], op)
    for group in found:
        usable, errors = bench_ops.prove(group, torch.float32)
        if group.entries[0].what == "attention":
            assert [entry.impl for entry in usable] == ["torch sdpa"]
            assert usable[0].outputs()[0].shape == (2, 2, 70, 16)
            continue
        assert [entry.impl.partition(" (")[0] for entry in usable] == ["ours", "fla 0"]
        assert all(max(its.values()) < 1e-5 for its in errors)
        for name, x in usable[0].leaves.items():
            assert usable[1].leaves[name].data_ptr() == x.data_ptr()
    whats = [group.entries[0].what for group in found]
    assert whats == (["gdn2", "attention", "gdn2+norm", "kda", "kda+norm", "gdn", "gdn+norm"] if op == "delta" else whats[:1])


@pytest.mark.parametrize("op", ["ssd", "siso"])
def test_mamba_ssm_gets_the_same_problem(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = pretend(monkeypatch)
    (group,) = groups_of(["mamba_ssm"], op)
    usable, errors = bench_ops.prove(group, torch.float32)
    assert len(called) == 1
    assert [entry.what for entry in usable] == [op, op]
    assert [entry.impl.split()[0] for entry in usable] == ["ours", "mamba_ssm"]
    assert all(max(its.values()) < 1e-5 for its in errors)
    assert {"out0", "dx" if op == "ssd" else "dtheta"} <= errors[1].keys()
    (alone,) = groups_of([], op)
    assert [entry.impl for entry in alone.entries] == ["ours"]


@pytest.mark.usefixtures("fla")
def test_flas_hopper_check_is_switched_off_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_o = sys.modules["fla.ops.common.chunk_o"]
    for triton, hopper, note in (("3.7.1", True, ""), ("3.6.0", False, "speed only")):
        monkeypatch.setattr(bench_peers, "triton_version", lambda version=triton: version)
        found = bench_peers.fla_delta("gdn", norm_in_kernel=False)
        assert found is not None
        assert note in found[0]
        assert vars(chunk_o)["IS_NVIDIA_HOPPER"] is hopper
    assert bench_peers.fla_delta("gla", norm_in_kernel=False) is None
    assert bench_peers.fla_step("gla") is None


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("mixer", ["gdn2", "kda"])
def test_decode_steps_agree(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.delta_rule_step(mixer, Shape(3, 1, 2, 16, 16), Draw()).to(torch.float32)
    if mixer == "kda":
        problem.leaves["w"] = problem.leaves["b"]
    steps = bench_decode.implementations(mixer, fla=True, device="cpu")
    assert list(steps) == ["ours", "fla 0", "copy of the state"]
    leaves = dict(problem.leaves)
    expected, _ = steps["ours"](leaves)
    got, _ = steps["fla 0"]({name: x for name, x in leaves.items() if not (mixer == "kda" and name == "w")})
    torch.testing.assert_close(got.squeeze(1), expected)
    assert torch.equal(steps["copy of the state"](leaves), leaves["state"])
    monkeypatch.setattr(bench_decode, "captured", lambda function: function)
    del steps["fla 0"]
    clock: Any = FakeClock()
    times = bench_decode.measure({name: lambda inputs, f=f: (f(inputs), clock.spend(3)) for name, f in steps.items()}, problem, clock, 1.0)
    names = [f"{name}, {how}" for name in steps for how in ("CUDA graph", "eager")]
    assert times == dict.fromkeys(names, 3.0)
