"""What `fit` does before it trains on a GPU, which is pretended here: what each mixer runs on, and no training on wrong kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import here_fixture, one_thread  # noqa: F401
from doctor_cases import GPU, attempts_fixture, own_cache_fixture  # noqa: F401

from kernels import backend as backends
from mixers import mamba_ssm, registry
from mixers.base import SequenceMixer
from mixers.errors import ConfigError
from recipes.__main__ import main
from recipes.commands import checks, gpu_ready, problems
from recipes.commands.checks import Result
from recipes.commands.plan import build_model


@pytest.fixture(name="gpu")
def gpu_fixture(attempts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`fit` believes that it trains on a GPU."""
    monkeypatch.setattr(gpu_ready, "device_of", lambda _: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Toy GPU")
    return attempts


@pytest.mark.usefixtures("here")
def test_fit_says_what_every_mixer_runs_on(gpu: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "--config", "small.yaml", "--trainer.fast_dev_run", "true"]
    assert main(arguments) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("backend", "checking"))]
    (gdn2,) = (line for line in said if line.startswith("backend: layers 0 (gdn2): "))
    for op in ("delta_rule", "causal_conv1d", "delta_gates", "gated_rms_norm"):
        assert op in gdn2
    assert "triton" in gdn2
    assert "backend: layers 1 (swa): torch's scaled_dot_product_attention, one document at a time (no kernel for float32)" in said
    assert gpu
    assert len([line for line in said if line.startswith("checking kernels")]) == len(gpu)
    first = len(gpu)
    assert main(arguments) == 0
    assert len(gpu) == first  # the verdict is known
    assert "checking" not in capsys.readouterr().out


@pytest.mark.usefixtures("gpu")
def test_fit_refuses_wrong_kernels(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks, "attempt", lambda trial, _: Result(trial.label, trial.check.op != "delta_rule", 0.5, "o"))
    assert main(["fit", "--config", "small.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: kernels: ")
    assert "checks failed on Toy GPU, the first is delta_rule: gdn2" in line
    assert "python -m recipes doctor" in line
    assert not (here / "runs").exists()


def test_only_a_training_on_a_gpu_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from jsonargparse import Namespace

    assert gpu_ready.device_of(Namespace(accelerator="auto", devices="auto")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert gpu_ready.device_of(Namespace(accelerator="cpu", devices=1)) is None
    assert gpu_ready.device_of(Namespace(accelerator="auto", devices="auto")) == torch.device("cuda", 1)


class Fragile(SequenceMixer[Any]):
    """Fails on anything but a GPU."""

    def forward(self, x_BTD: torch.Tensor, state: Any = None, *, cu_seqlens: Any = None) -> Any:  # noqa: ARG002
        raise RuntimeError("needs a GPU")

    init_state = step = state_numel = flops = forward  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
def test_a_mixer_on_mamba_ssm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_ssm, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    mixer = registry.build(name, 32, {name: {"backend": "mamba_ssm"}})
    assert "delta_rule: mamba_ssm" in gpu_ready.describe(gpu_ready.trace(mixer, torch.bfloat16, GPU))
    with pytest.raises(ConfigError, match=r"^backend: mamba_ssm cannot run: its kernels compute in "):
        gpu_ready.trace(mixer, torch.float64, GPU)


def test_a_mixer_that_cannot_be_traced_is_not_refused() -> None:
    assert gpu_ready.trace(Fragile(4), torch.float32, GPU) is None
    assert gpu_ready.describe(None) == "its backends show when it runs"


def test_the_checks_of_fit_follow_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"gdn2": {"num_heads": 2, "head_dim": 64}, "two": {"mixer": "kda", "num_heads": 1, "head_dim": 64}}
    lm = build_model(vocab_size=16, d_model=16, n_layers=3, mlp_width=16, layout=["gdn2", "two", "swa"], mixers={**settings, "swa": {"num_heads": 2}})
    calls = {name: gpu_ready.trace(mixer, torch.bfloat16, GPU) for name, (mixer, _) in gpu_ready.distinct(lm).items()}
    chosen = gpu_ready.trials(lm, calls, torch.bfloat16)
    assert {trial.dtype for trial in chosen} == {torch.bfloat16}
    assert {trial.check.mixer for trial in chosen} == {"gdn2", "kda", None}
    assert {trial.size for trial in chosen} == {64, 128}  # 128 where a check has no other size
    assert {(trial.size, trial.v_size) for trial in chosen if trial.check.op == "delta_rule"} == {(64, 64)}  # the model's own
    everything = gpu_ready.trials(lm, {**calls, "swa": None}, torch.bfloat16)
    assert {trial.check.mixer for trial in everything} >= set(problems.WIDTHS)
    monkeypatch.setattr(registry, "available", list)  # none is ours: any width may be asked for
    assert {trial.check.mixer for trial in gpu_ready.trials(lm, calls, torch.bfloat16)} >= set(problems.WIDTHS)


def test_mamba3_is_checked_as_it_calls_the_ops() -> None:
    settings = {"mamba3": {"head_dim": 64, "d_state": 32, "mimo_rank": 4}}
    lm = build_model(vocab_size=16, d_model=64, n_layers=1, mlp_width=16, layout=["mamba3"], mixers=settings)
    calls = {name: gpu_ready.trace(mixer, torch.bfloat16, GPU) for name, (mixer, _) in gpu_ready.distinct(lm).items()}
    chosen = gpu_ready.trials(lm, calls, torch.bfloat16)
    assert {trial.check.op for trial in chosen} == {"delta_rule", "rotary_keys", "gated_skip", "rank_values"}
    assert {trial.check.mixer for trial in chosen if trial.check.op == "delta_rule"} == {"mamba3"}
    assert {trial.size for trial in chosen} == {32, 64, 128}  # of keys and values


def test_the_reason_is_said_where_it_is_not_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_OPS", frozenset({"causal_conv1d"}))
    with gpu_ready.resolutions(GPU) as calls:
        resolve: Callable[..., str] = backends.resolve
        resolve("causal_conv1d", "auto", torch.device("cpu"))
        resolve("delta_rule", "auto", torch.device("cpu"))
        resolve("causal_conv1d", "auto", torch.device("cpu"))
        resolve("causal_conv1d", "auto", torch.device("cpu"), "W = 9 is above 8")
    assert gpu_ready.describe(calls) == (
        "causal_conv1d: triton; delta_rule: reference (this version has no Triton kernel for it); causal_conv1d: reference (W = 9 is above 8)"
    )
    assert gpu_ready.describe([]) == "torch"
    assert backends.resolve.__module__ == "kernels.backend"
