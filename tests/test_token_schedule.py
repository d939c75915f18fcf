"""How long `LitLM` trains and at what rate: by tokens, through every limit, and over resumed runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_cases import Batches, Log, fit, make_batch, make_lit, make_lm, make_trainer, one_thread, saved  # noqa: F401

from lit_modules.data import PackedText
from lit_modules.lit_lm import LitLM
from lit_modules.metrics import token_nll
from lit_modules.optim import cosine_lr

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..


def test_training_stops_at_max_tokens_with_the_schedule_in_tokens():
    lit = make_lit(lr=0.01, max_tokens=100, warmup_tokens=30, final_lr_ratio=0.2)
    log = fit(lit, make_batch(0), make_batch(1), max_epochs=None)
    assert [row["tokens"] for row in log.rows] == [12 * step for step in range(1, 10)]  # the first multiple of 12 from 100 on
    schedule = {"peak": 0.01, "warmup_tokens": 30, "max_tokens": 100, "final_ratio": 0.2}
    assert [row["lr"] for row in log.rows] == [cosine_lr(12 * step, **schedule) for step in range(1, 10)]
    assert lit.tokens == 108
    assert (log.trainer.max_epochs, log.trainer.max_steps) == (-1, -1)  # not 1000 epochs


class Sized(LightningDataModule):
    """Says how large a micro-batch is."""

    batch_size, seq_len = 2, 6

    def train_dataloader(self) -> Batches:
        return Batches(make_batch(0), make_batch(1))


def test_the_number_of_steps_is_known_at_the_start():
    class Watch(Callback):
        def on_train_start(self, trainer, pl_module) -> None:  # noqa: ARG002
            self.steps = trainer.max_steps

    for data, steps in ((Sized(), 9), (None, 2**62)):
        watch = Watch()
        trainer = make_trainer(callbacks=[watch])
        if data is None:
            trainer.fit(make_lit(max_tokens=100), Batches(make_batch(0)))
        else:
            trainer.fit(make_lit(max_tokens=100), datamodule=data)
        assert watch.steps == steps
        assert trainer.global_step == 9


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"max_steps": 3}, 3), ({"max_steps": 12}, 9), ({"fast_dev_run": 1}, 1), ({"max_epochs": 2}, 4), ({"max_epochs": 7}, 9)],
)
def test_the_first_limit_wins(settings, steps):
    log = fit(make_lit(max_tokens=100), make_batch(0), make_batch(1), **settings)
    assert log.trainer.global_step == steps


def test_the_limit_is_in_tokens_when_windows_are_short():
    # two epochs of windows with 2 and 1 micro-batches: 24, 36, 60, 72 tokens
    batches = [make_batch(seed) for seed in range(3)]
    log = fit(make_lit(max_tokens=70), *batches, accumulate_grad_batches=2)
    assert [row["tokens"] for row in log.rows] == [24, 36, 60, 72]


def test_a_second_fit_goes_on():
    lit = make_lit(max_tokens=100)
    trainer = make_trainer(max_steps=3)
    trainer.fit(lit, Batches(make_batch(0)))
    trainer = make_trainer()
    trainer.fit(lit, Batches(make_batch(0)))
    assert (lit.tokens, trainer.global_step) == (108, 6)
    trainer.fit(lit, Batches(make_batch(0)))
    assert lit.tokens == 108


def fit_text(corpus: Path, max_steps: int, ckpt_path=None, **settings) -> tuple[LitLM, Log]:
    """On the real data module: 5 micro-batches an epoch, the first 4 in windows of 2, the fifth in the next epoch."""
    lit, log = make_lit(make_lm(vocab_size=257)), Log()
    data = PackedText(path=str(corpus), val_path=str(corpus), seq_len=16, batch_size=3)
    trainer = make_trainer(max_steps=max_steps, accumulate_grad_batches=2, **(settings | {"callbacks": [log, *settings.get("callbacks", [])]}))
    trainer.fit(lit, datamodule=data, ckpt_path=ckpt_path)
    assert trainer.num_training_batches == 4
    log.trainer = trainer
    return lit, log


@pytest.mark.parametrize("limit_val_batches", [0, 1])
def test_resumed_equals_uninterrupted(tmp_path, limit_val_batches):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {i % 7} of {i}\n" for i in range(30))[:250])
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"limit_val_batches": limit_val_batches}
    whole, log = fit_text(corpus, 6, enable_checkpointing=True, callbacks=[keep], **settings)
    assert [row["tokens"] for row in log.rows] == [96, 192, 288, 384, 480, 576]
    _, stopped = fit_text(corpus, 2, **settings)  # at the end of an epoch
    stopped.trainer.save_checkpoint(tmp_path / "end.ckpt")
    for name, step in (("step=1", 1), ("step=2", 2), ("step=3", 3), ("end", 2)):
        resumed, rest = fit_text(corpus, 6, ckpt_path=tmp_path / f"{name}.ckpt", **settings)
        assert rest.rows == log.rows[step:], name
        for key, parameter in resumed.lm.named_parameters():
            assert torch.equal(parameter, whole.lm.get_parameter(key)), (name, key)


@pytest.mark.parametrize("data", [None, Sized()])
def test_resumed_with_another_batch_size_goes_on_to_the_same_tokens(tmp_path, data):
    small = [make_batch(seed, tokens=4, boundary=2) for seed in range(4)]
    path = saved(tmp_path / "a.ckpt", make_lit(max_tokens=200), *small, max_steps=20)
    lit = make_lit(max_tokens=200)
    trainer = make_trainer(accumulate_grad_batches=2)
    trainer.fit(lit, None if data else Batches(*[make_batch(0)] * 4), datamodule=data, ckpt_path=path)
    assert (lit.tokens, trainer.global_step) == (80 + 5 * 24, 25)


def test_a_finished_run_resumes_to_nothing(tmp_path):
    lit = make_lit(max_tokens=24)
    path = saved(tmp_path / "a.ckpt", lit, make_batch(0))
    again = make_lit(max_tokens=24)
    log = fit(again, make_batch(0), ckpt_path=path)
    assert (log.rows, again.tokens) == ([], 24)


def test_the_last_validation_is_of_the_final_weights():
    val = [make_batch(7, ignored=2), make_batch(8, ignored=10)]
    for settings in ({}, {"max_steps": 5}):
        lit = make_lit(max_tokens=60)
        log = fit(lit, make_batch(0), make_batch(1), val=val, check_val_every_n_epoch=None, val_check_interval=3, **settings)
        nll = sum(float(token_nll(lit.lm(b.inputs, cu_seqlens=b.cu_seqlens)[0], b.targets, reduction="sum")) for b in val)
        assert float(log.trainer.callback_metrics["val/loss"]) == pytest.approx(nll / 12, rel=1e-6)
