"""What the tests of the Lightning shell share: a tiny model, batches, loaders, and trainers that write nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_modules.data.windows import IGNORED, Batch
from lit_modules.decoder_lm import DecoderLM
from lit_modules.lit_lm import LitLM
from lit_modules.metrics import token_nll

VOCAB = 31


def make_lm(device: str = "meta", **settings: Any) -> DecoderLM:
    """One attention layer by default: cheap."""
    tiny = {
        "vocab_size": VOCAB,
        "d_model": 8,
        "n_layers": 1,
        "mlp_width": 12,
        "layout": ["attention"],
        "mixers": {"attention": {"num_heads": 2}, "swa": {"num_heads": 2, "window": 4}, "gdn2": {"num_heads": 2, "head_dim": 4}},
    }
    with torch.device(device):
        return DecoderLM(**(tiny | settings))


def make_lit(lm: DecoderLM | None = None, **settings: Any) -> LitLM:
    return LitLM(lm or make_lm(), **({"lr": 1e-2, "max_tokens": 10**9, "warmup_tokens": 0} | settings))


def make_batch(seed: int, tokens: int = 12, ignored: int = 0, boundary: int | None = 5) -> Batch:
    """A packed row with one boundary (or none), its first `ignored` targets without loss; 3 bytes a target."""
    stream = torch.randint(0, VOCAB, (1, tokens + 1), generator=torch.Generator().manual_seed(seed))
    targets = stream[:, 1:].clone()
    targets[:, :ignored] = IGNORED
    cu_seqlens = None if boundary is None else torch.tensor([0, boundary, tokens], dtype=torch.int32)
    return Batch(stream[:, :-1].clone(), targets, cu_seqlens, torch.tensor(3 * (tokens - ignored)))


class Batches:
    """A loader of given batches (Lightning takes a list for several loaders)."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def make_trainer(**settings: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(quiet | settings))


def exact_gradients(lm: DecoderLM, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Of the mean over all valid targets of all batches, computed in one graph."""
    lm.zero_grad()
    nll = sum(token_nll(lm(b.inputs, cu_seqlens=b.cu_seqlens)[0], b.targets, reduction="sum") for b in batches)
    (nll / sum((b.targets != IGNORED).sum() for b in batches)).backward()
    gradients = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    return gradients


def gradients_of(lm: DecoderLM) -> dict[str, torch.Tensor]:
    """Those of the last optimizer step, which stay until the next one begins."""
    return {name: p.grad.clone() for name, p in lm.named_parameters()}


def largest_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of all entries, relative to the largest entry of `b`."""
    assert a.keys() == b.keys()
    scale = max(float(t.abs().max()) for t in b.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More only wait for each other in a model this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Log(Callback):
    """What the module logged at every optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ARG002
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if "val" not in name}
        if row and (not self.rows or row["tokens"] != self.rows[-1]["tokens"]):
            self.rows.append(row)


def fit(lit: LitLM, *batches: Batch, val: tuple[Batch, ...] | list[Batch] = (), ckpt_path: Path | None = None, **settings: Any) -> Log:
    """Trains on the batches again and again; `trainer` of the result is the one that did."""
    log = Log()
    trainer = make_trainer(**(settings | {"callbacks": [log, *settings.get("callbacks", [])]}))
    trainer.fit(lit, Batches(*batches), Batches(*val) if val else None, ckpt_path=ckpt_path)
    log.trainer = trainer
    return log


def saved(path: Path, lit: LitLM, *batches: Batch, **settings: Any) -> Path:
    """A checkpoint from behind a fit."""
    fit(lit, *batches, **settings).trainer.save_checkpoint(path)
    return path
