"""Throughput, progress bar and run summary, on real (tiny) runs."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch.callbacks.progress.rich_progress as rich_progress
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lit_cases import Batches, make_batch, make_lit, make_lm, make_trainer, one_thread  # noqa: F401
from rich.console import Console

import lit_modules.callbacks as callbacks
from lit_modules.callbacks import ProgressBar, RunSummary
from lit_modules.data import PackedText
from lit_modules.loss_curve import LossCurve, short_number
from lit_modules.throughput import Throughput
from mixers.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def text(tmp_path) -> PackedText:
    path = tmp_path / "corpus.txt"
    path.write_text("to be or not to be\n" * 40)
    return PackedText(path=str(path), val_path=str(path), seq_len=16, batch_size=2, val_tokens=64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProgressBar(plain_every_n_steps=0), r"ProgressBar\.plain_every_n_steps: must be at least 1, got 0"),
        (lambda: RunSummary(temperature=-1.0), "RunSummary: needs .* got 200, -1.0, 0.95"),
        (lambda: RunSummary(top_p=0.0), "RunSummary: needs "),
        (lambda: RunSummary(max_new_tokens=-1), "RunSummary: needs "),
    ],
)
def test_settings_outside_their_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# Progress bar


def test_plain_lines_where_there_is_no_terminal(capsys):
    trainer = make_trainer(
        enable_progress_bar=True,
        max_steps=7,
        check_val_every_n_epoch=None,
        val_check_interval=4,
        num_sanity_val_steps=1,
        callbacks=[Throughput(), ProgressBar(plain_every_n_steps=3)],
    )
    trainer.fit(make_lit(), Batches(make_batch(0), make_batch(1)), Batches(make_batch(2)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    number = r"\d+\.\d{3}"
    measured = r"mem \d+(\.\d+)?GiB  wait \d+\.\d%"
    training = rf"step (\d)/7  loss {number}  bpb {number}  (tok/s \S+  )?lr \d\.\de-\d\d(  val {number})?(  {measured})?  eta 0:00:\d\d"
    assert [re.fullmatch(training, line)[1] for line in lines if "validation" not in line] == ["1", "3", "6", "7"]
    validation = [line for line in lines if "validation" in line]
    assert len(validation) == 2
    assert re.fullmatch(rf"step 4  validation: loss {number}  bpb {number}", validation[0])
    assert "tok/s" in lines[1]


def test_a_bar_over_the_whole_run_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(callbacks, "Console", lambda: console)
    monkeypatch.setattr(rich_progress, "get_console", lambda: console)
    monkeypatch.setattr(rich_progress, "reconfigure", lambda: None)
    tasks = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ARG002
            task = trainer.progress_bar_callback.train_progress_bar
            tasks.append((task.completed, task.total))

    trainer = make_trainer(
        enable_progress_bar=True, check_val_every_n_epoch=None, val_check_interval=3, callbacks=[ProgressBar(), Throughput(), Watch()]
    )
    trainer.fit(make_lit(max_tokens=60), Batches(make_batch(0), make_batch(1)), Batches(make_batch(2)))
    assert [int(done) for done, _ in tasks] == [1, 2, 3, 4, 5]  # over epochs
    assert [total for _, total in tasks] == [math.inf, 5, 5, 5, 5]  # known once a step has been seen
    shown = screen.getvalue()
    assert "5/5" in shown
    assert re.search(r"loss: \d\.\d{3} bpb: \d\.\d{3} tok/s: \S+ lr: 1\.0e-03 val: \d\.\d{3}", shown)
    assert "v_num" not in shown
    assert "step 1" not in shown


def test_other_ranks_show_nothing(capsys):
    bar = ProgressBar()
    bar.setup(SimpleNamespace(is_global_zero=False), None, "fit")
    assert not bar.is_enabled
    assert not bar.prints_lines
    bar.on_validation_end(SimpleNamespace(callback_metrics={}, state=SimpleNamespace(fn="fit"), sanity_checking=False), None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("limits", "total"),
    [({"max_steps": 7}, 7), ({"max_epochs": 2}, 4), ({"max_epochs": 2, "max_steps": 3}, 3), ({"max_epochs": -1}, math.inf)],
)
def test_total_steps_follow_the_first_limit(limits, total):
    trainer = make_trainer(accumulate_grad_batches=2, **limits)
    trainer.fit_loop.max_batches = 3
    assert callbacks._total_steps(trainer) == total


# Summary


def summarised(tmp_path: Path, text: PackedText | None, summary: RunSummary, **settings):
    settings = {"logger": CSVLogger(tmp_path, name="run"), "max_steps": 3, "log_every_n_steps": 1} | settings
    trainer = make_trainer(callbacks=[summary, *settings.pop("more", [])], **settings)
    lit = make_lit(make_lm(vocab_size=257))
    if text is None:
        trainer.fit(lit, Batches(make_batch(0)))
    else:
        trainer.fit(lit, datamodule=text)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_run_leaves_a_curve_and_a_sample(tmp_path, text, capsys, precision):
    summary = RunSummary(prompt="to be", max_new_tokens=12)
    trainer = summarised(tmp_path, text, summary, precision=precision)
    folder = tmp_path / "run" / "version_0"
    assert (folder / "loss_curve.png").read_bytes().startswith(PNG)
    sample = (folder / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("to be")
    assert len(sample) > len("to be")
    out = capsys.readouterr().out
    bpb = float(trainer.callback_metrics["val/bpb"])
    assert f"final validation: {bpb:.4f} bits per byte after 96 tokens" in out
    assert f"run folder: {folder}" in out
    assert "\nsample:\nto be" in out
    assert [tokens for tokens, _ in summary.curve.train] == [32, 64, 96]
    assert summary.curve.validation == [(96, bpb)]


def test_the_sample_follows_its_seed(tmp_path, text):
    samples = []
    for version, seed in enumerate((0, 0, 1)):
        summarised(tmp_path, text, RunSummary(max_new_tokens=20, seed=seed))
        samples.append((tmp_path / "run" / f"version_{version}" / "sample.txt").read_text())
    assert samples[0] == samples[1] != samples[2]


def test_an_early_stop_is_summarised(tmp_path, text, capsys):
    stop = EarlyStopping("val/bpb", stopping_threshold=100.0, mode="min")
    trainer = summarised(tmp_path, text, RunSummary(max_new_tokens=1), max_steps=1000, more=[stop])
    assert trainer.global_step < 1000
    assert (tmp_path / "run" / "version_0" / "loss_curve.png").is_file()
    assert "final validation: " in capsys.readouterr().out


def test_a_development_run_writes_no_files(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for settings, why in (({"fast_dev_run": True}, "this run has no folder"), ({"logger": False}, "trainer.logger is false")):
        before = sorted(tmp_path.rglob("*"))
        summarised(tmp_path, text, RunSummary(prompt="to be", max_new_tokens=2), **settings)
        assert f"no loss curve and no sample written: {why}" in capsys.readouterr().out
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_tokenizer_or_validation(tmp_path, capsys):
    summarised(tmp_path, None, RunSummary())
    out = capsys.readouterr().out
    assert "final validation: none was run" in out
    assert "sample" not in out
    assert not (tmp_path / "run" / "version_0" / "sample.txt").exists()


def test_a_sample_that_fails_does_not_fail_the_run(tmp_path, text, capsys, monkeypatch):
    def fail(*_: object, stop: int) -> None:
        raise NotImplementedError(f"this mixer\ncannot step to {stop}")

    monkeypatch.setattr(RunSummary, "_generate", fail)
    summarised(tmp_path, text, RunSummary())
    assert "no sample: NotImplementedError: this mixer cannot step to 256\n" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run" / "version_0").glob("*.???")) == ["loss_curve.png", "metrics.csv"]


def test_the_curve_goes_on_from_a_checkpoint(tmp_path, text):
    first = summarised(tmp_path, text, RunSummary(max_new_tokens=0))
    first.save_checkpoint(tmp_path / "a.ckpt")
    summary = RunSummary(max_new_tokens=0)
    trainer = make_trainer(max_steps=5, callbacks=[summary])
    trainer.fit(make_lit(make_lm(vocab_size=257)), datamodule=text, ckpt_path=tmp_path / "a.ckpt")
    assert [tokens for tokens, _ in summary.curve.train] == [32, 64, 96, 128, 160]
    assert [tokens for tokens, _ in summary.curve.validation] == [96, 160]


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
    monkeypatch.setattr("sys.stdout", SimpleNamespace(encoding="ascii"))
    assert callbacks._printable("a\x1b[2Jé\tb\n\x00") == "a?[2J?\tb\n?"


# The curve


def test_a_curve_keeps_averages_in_bounded_memory():
    curve = LossCurve(max_points=8)
    for step in range(1, 101):
        curve.add_train(10 * step, step)
    assert len(curve.train) < 8
    tokens = [t for t, _ in curve.train]
    assert tokens == [160, 320, 480, 640, 800, 960]
    assert [b for _, b in curve.train] == [8.5, 24.5, 40.5, 56.5, 72.5, 88.5]  # the means of 16 steps
    again = LossCurve(max_points=8)
    again.load_state_dict(curve.state_dict())
    for step in range(101, 150):
        curve.add_train(10 * step, step)
        again.add_train(10 * step, step)
    assert again.state_dict() == curve.state_dict()


def test_values_that_are_not_finite_are_left_out(tmp_path):
    curve = LossCurve()
    curve.add_train(1, math.nan)
    curve.add_validation(1, math.inf)
    assert (curve.train, curve.validation) == ([], [])
    curve.draw(tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").read_bytes().startswith(PNG)


def test_the_axis_is_cut_above_the_first_loss():
    curve = LossCurve()
    for step in range(1000):
        curve.add_train(step, 8.0 if step < 10 else 2.0 - step / 1000)
    low, high = curve._limits()
    assert low == pytest.approx(2.0 - 0.999, abs=0.1)
    assert high == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(("value", "shown"), [(0, "0"), (950, "950"), (999.6, "1k"), (12345, "12.3k"), (1.5e6, "1.5M"), (2e10, "20B"), (3e12, "3T")])
def test_short_numbers(value, shown):
    assert short_number(value) == shown
