"""Throughput: what is counted, what is timed, what is said; on real (tiny) runs with a clock of the test's own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from lit_cases import Batches, make_batch, make_lit, make_lm, make_trainer, one_thread  # noqa: F401
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lit_modules.throughput as throughput
from lit_modules.data import PackedText
from lit_modules.peaks import PEAKS, peak_flops
from lit_modules.throughput import Throughput, flops_per_token
from mixers.errors import ConfigError
from recipes.commands import preflight
from recipes.commands.plan import METRICS
from recipes.commands.sizes import gpu_hours

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..

COLUMNS = {"tokens_per_second", "flops_per_token", "tflops_per_second", "mfu", "peak_memory_gib", "data_wait"}
T = 32


@pytest.fixture
def text(tmp_path: Path) -> PackedText:
    path = tmp_path / "corpus.txt"
    path.write_text("to be or not to be\n" * 400)
    return PackedText(path=str(path), val_path=str(path), seq_len=16, batch_size=2, val_tokens=64)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time passes only where a test says so."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    return clock


def test_settings_outside_their_range() -> None:
    with pytest.raises(ConfigError, match=r"Throughput\.window: must be at least 1, got 0"):
        Throughput(window=0)


# --- model FLOPs ---


def counted(lm: nn.Module, rows: int, *, backward: bool) -> FlopCounterMode:
    """Of a forward pass over `rows` sequences, and of the backward pass through it, as torch counts."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted on a CPU
        logits, _ = lm(torch.zeros(rows, T, dtype=torch.int64))
        if backward:
            logits.sum().backward()
    return counter


def test_flops_of_a_transformer_are_what_torch_counts() -> None:
    """Exactly, but for the pairs above the diagonal: torch counts all T * T."""
    lm = make_lm("cpu", n_layers=2)
    pairs = T * T - T * (T + 1) // 2
    above = 3 * 2 * 2 * 2 * pairs * lm.settings["d_model"]  # passes, layers, products (q k^T and p v), multiply-add, pairs, all heads
    assert counted(lm, 3, backward=True).get_total_flops() == 3 * (T * flops_per_token(lm, T) + above)


def test_flops_of_a_hybrid_are_projections_and_mixing() -> None:
    """What every linear layer of the model does in a forward pass, as torch counts it, and the rest by hand."""
    lm = make_lm("cpu", n_layers=2, layout=["gdn2", "swa"])
    counts = counted(lm, 1, backward=False).get_flop_counts()
    linear = {name: f"DecoderLM.{name}" for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    fused = {name for name, label in linear.items() if label not in counts}  # `fan_out` reads their weights and does not call them
    assert not {name.rpartition(".")[2] for name in fused} & {"o_proj", "down", "head", "1"}
    projections = sum(sum(counts[label].values()) for name, label in linear.items() if name not in fused)
    projections += sum(2 * T * lm.get_submodule(name).weight.numel() for name in fused)
    heads, size, window = 2, 4, 4
    conv = 3 * heads * size * 4  # q, k, v; 4 taps
    rule = 3 * heads * size * size  # S^T e, k r^T, S^T q
    pairs = sum(min(t, window) for t in range(1, T + 1))
    mixing = 2 * T * (conv + rule) + 2 * 2 * pairs * 8
    assert T * flops_per_token(lm, T) == 3 * (projections + mixing)


# --- the peaks of GPUs ---


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("AMD Instinct MI300X", None),
        ("the CPU", None),
    ],
)
def test_peak_of_a_name(name: str, tflops: float | None) -> None:
    for precision in ("bf16-mixed", "bf16-true", "bf16", "16-mixed", "16-true"):
        assert peak_flops(name, precision) == (None if tflops is None else pytest.approx(1e12 * tflops))
    assert peak_flops(name, "64-true") is None
    assert peak_flops(name, "transformer-engine") is None


def test_peak_in_float32_follows_the_setting_of_torch() -> None:
    before = torch.get_float32_matmul_precision()
    found = []
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        found.append(peak_flops("NVIDIA A100-SXM4-80GB", "32-true"))
    torch.set_float32_matmul_precision(before)
    assert found == [19.5e12, 156e12]


def test_peaks_are_dense() -> None:
    """A figure with structured sparsity would be about twice as much; tf32 runs at half the speed of 16 bits, or as fast as float32."""
    for name, peak in PEAKS.items():
        assert peak.half / 2.1 < peak.tf32 < peak.half / 1.9, name
        assert peak.fp32 <= peak.tf32 * 1.02, name


# --- steps and waits ---


class Take(Callback):
    """Lets time pass where a training does, and keeps what Throughput says after every optimizer step."""

    def __init__(self, clock: SimpleNamespace, measure: Throughput) -> None:
        self.clock, self.measure = clock, measure
        self.seen: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # noqa: ARG002
        self.clock.now += 2.0 if trainer.global_step == 2 else 1.0

    def on_validation_epoch_end(self, trainer, pl_module) -> None:  # noqa: ARG002
        self.clock.now += 1000.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ARG002
        if not trainer.fit_loop._should_accumulate():
            self.seen.append(dict(self.measure.values))


class SlowBatches(Batches):
    """Every batch takes its time to come."""

    def __init__(self, clock: SimpleNamespace, seconds: float, *batches) -> None:
        super().__init__(*batches)
        self.clock, self.seconds = clock, seconds

    def __iter__(self):
        for batch in self.batches:
            self.clock.now += self.seconds
            yield batch


def measured(clock: SimpleNamespace, *, fetch: float, window: int = 2, profiler=None, **settings):
    measure = Throughput(window=window)
    take = Take(clock, measure)
    schedule = {"accumulate_grad_batches": 2, "max_steps": 5, "check_val_every_n_epoch": None, "val_check_interval": 2, "num_sanity_val_steps": 1}
    trainer = make_trainer(**(schedule | settings), log_every_n_steps=1, profiler=profiler, callbacks=[measure, take])
    trainer.fit(make_lit(), SlowBatches(clock, fetch, *map(make_batch, range(10))), SlowBatches(clock, 100.0, make_batch(20)))
    return take.seen, trainer


def test_a_moving_average_without_validations(clock: SimpleNamespace) -> None:
    seen, trainer = measured(clock, fetch=0.0)
    # 24 tokens a step; seconds a step: 2, 2, 4, 2, 2
    assert [row.get("tokens_per_second") for row in seen] == [None, *map(pytest.approx, (12.0, 8.0, 8.0, 12.0))]
    assert [row.get("data_wait") for row in seen] == [None, 0, 0, 0, 0]
    assert float(trainer.callback_metrics["tokens_per_second"]) == pytest.approx(12.0)
    assert "flops_per_token" not in seen[-1]  # no data module says how long a sequence is


def test_data_wait_is_the_time_of_the_fetches(clock: SimpleNamespace) -> None:
    """Half a second for each micro-batch, two of them a step; validations, which fetch too, do not count."""
    seen, _ = measured(clock, fetch=0.5)
    # seconds a step: 3, 3, 5, 3, 3
    assert [row.get("data_wait") for row in seen] == [None, *map(pytest.approx, (1 / 3, 2 / 8, 2 / 8, 1 / 3))]
    assert seen[-1]["tokens_per_second"] == pytest.approx(48 / 6)


def test_what_callbacks_do_between_two_batches_is_no_wait_for_data(clock: SimpleNamespace) -> None:
    """Such as saving a checkpoint."""

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ARG002
            clock.now += 7.0

    measure = Throughput()
    trainer = make_trainer(max_steps=3, callbacks=[measure, Save()])
    trainer.fit(make_lit(), SlowBatches(clock, 1.0, *map(make_batch, range(3))))
    assert measure.values["data_wait"] == pytest.approx(1 / 8)


def test_the_profiler_of_the_user_goes_on(clock: SimpleNamespace) -> None:
    profiler = SimpleProfiler()
    seen, _ = measured(clock, fetch=0.5, profiler=profiler)
    assert seen[-1]["data_wait"] == pytest.approx(1 / 3)
    (name,) = [name for name in profiler.recorded_durations if name.endswith(throughput.FETCH)]
    assert len(profiler.recorded_durations[name]) == 10
    assert not {"start", "stop"} & vars(profiler).keys()


def test_a_run_that_fails_leaves_the_profiler_as_it_was() -> None:
    class Fail(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # noqa: ARG002
            raise RuntimeError("on purpose")

    trainer = make_trainer(callbacks=[Throughput(), Throughput(), Fail()])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(make_lit(), Batches(make_batch(0)))
    assert not {"start", "stop"} & vars(trainer.profiler).keys()


# --- what is logged and said ---


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of training."""
    with (folder / "metrics.csv").open() as table:
        return [row for row in csv.DictReader(table) if row["train/loss"]]


def test_columns_of_a_run_and_of_one_that_goes_on(tmp_path: Path, text: PackedText, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row that is written has them, the last one too, which is between two of every 3 steps."""
    settings = {"log_every_n_steps": 3, "val_check_interval": 4, "check_val_every_n_epoch": None}

    def fit(name: str, steps: int, ckpt: Path | None = None):
        trainer = make_trainer(callbacks=[Throughput()], logger=CSVLogger(tmp_path, name=name, version=""), max_steps=steps, **settings)
        lit = make_lit(make_lm(vocab_size=257))
        trainer.fit(lit, datamodule=text, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return lit, rows_of(tmp_path / name)

    lit, first = fit("first", 7)
    _, second = fit("second", 13, tmp_path / "first.ckpt")
    assert [[int(row["step"]) for row in rows] for rows in (first, second)] == [[2, 5, 6], [8, 11, 12]]
    for row in first + second:
        assert row.keys() >= COLUMNS - {"mfu"}
        tokens_per_second, flops, tflops = (float(row[name]) for name in ("tokens_per_second", "flops_per_token", "tflops_per_second"))
        assert tokens_per_second > 0
        assert flops == flops_per_token(lit.lm, 16)
        assert tflops == pytest.approx(tokens_per_second * flops / 1e12)
        assert 0.01 < float(row["peak_memory_gib"]) < 100  # of this process
        assert 0 < float(row["data_wait"]) < 1
        assert "mfu" not in row
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("throughput: ")]
    flops_text = throughput.short_number(flops_per_token(lit.lm, 16))
    line = f"throughput: {flops_text} FLOPs a token, forward and backward, in sequences of 16; no MFU: the peak of the CPU in 32-true is not known"
    assert said == [line, line]


def test_mfu(text: PackedText, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda name, precision: 1e9 if (name, precision) == ("the CPU", "bf16-mixed") else None)
    measure = Throughput()
    trainer = make_trainer(callbacks=[measure], max_steps=3, precision="bf16-mixed")
    trainer.fit(make_lit(make_lm(vocab_size=257)), datamodule=text)
    assert measure.values.keys() == COLUMNS
    assert measure.values["mfu"] == pytest.approx(measure.values["tflops_per_second"] * 1e12 / 1e9)
    assert "; peak of the CPU: 0.0 TFLOP/s" in capsys.readouterr().out
    assert trainer.callback_metrics.keys() >= COLUMNS


def test_every_column_can_be_monitored() -> None:
    assert set(METRICS) >= COLUMNS


def test_peak_memory_of_a_process() -> None:
    """In a process of its own: what it held once, and not what the process held that started it."""
    code = """
import torch
from lit_modules.throughput import peak_memory
before = peak_memory(torch.device("cpu"))
held = b"1" * int(before / 2)
del held
print(before, peak_memory(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert 10 * 2**20 < before < 4 * 2**30
    assert before + 0.4 * before < after < before + 0.6 * before


def test_the_slowest_rank_counts(tmp_path: Path) -> None:
    """Each of two processes waits for data in every second step of 4 s: both lose 1 s of each. Tokens are those of both."""
    script = Path(__file__).with_name("throughput_ddp_worker.py")
    environment = os.environ | {"PYTHONPATH": f"{script.parents[1]}:{script.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        values = torch.load(tmp_path / f"{rank}.pt")
        assert values["own_wait"] == pytest.approx(1 / 8)
        assert values["data_wait"] == pytest.approx(1 / 4)
        assert values["tokens_per_second"] == pytest.approx(2 * 12 / 4)
        assert values["peak_memory_gib"] > 0.01


# --- preflight ---


def test_cost_in_gpu_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(model=SimpleNamespace(lm=make_lm()), tokens=10**12, data=SimpleNamespace(seq_len=T), precision="bf16-mixed")
    flops = flops_per_token(plan.model.lm, T) * 10**12
    assert preflight.cost(plan) == f"{flops:.2g} FLOPs to 1,000,000,000,000 tokens (no GPU here: GPU-hours are not known)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    hours = flops / (0.4 * 989.4e12) / 3600
    assert gpu_hours(flops, 989.4e12) == pytest.approx(hours)
    assert f"; {hours:,.1f} GPU-hours on NVIDIA H100 80GB HBM3 if the MFU is 40% (assumed) of 989.4 TFLOP/s" in preflight.cost(plan)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Unheard-of")
    assert "(the peak of NVIDIA Unheard-of in bf16-mixed is not known: GPU-hours are not known)" in preflight.cost(plan)
