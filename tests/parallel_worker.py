"""Trainings that all strategies must agree on. Run as a script with a folder: those of two processes; rank 0 leaves what came out in results.pt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from lit_cases import Batches, Log, make_batch, make_lit, make_lm, make_trainer
from torch import nn
from torch.distributed.tensor import DTensor

from lit_modules.data.windows import Batch

STEPS, HALF, MICRO_BATCHES = 20, 10, 4  # micro-batches of an optimizer step, however many processes share them
TRAIN = [make_batch(seed, ignored=seed % 5) for seed in range(STEPS * MICRO_BATCHES)]
VALIDATION = [make_batch(1000 + seed, ignored=7 * seed) for seed in range(2)]
MODELS: dict[str, dict[str, Any]] = {  # a vocabulary of 31, one head of kda, ..: shards of unequal size, and empty ones
    "gdn2-swa": {"n_layers": 2, "layout": ["gdn2", "swa"]},
    "mamba3-kda-mamba2": {
        "n_layers": 3,
        "layout": ["mamba3", "kda", "mamba2"],
        "mixers": {
            "mamba3": {"head_dim": 8, "d_state": 4, "mimo_rank": 2},
            "kda": {"num_heads": 1, "head_dim": 4},
            "mamba2": {"head_dim": 4, "d_state": 3},
        },
    },
}
CASES = [(model, precision) for model in MODELS for precision in ("64-true", "32-true")]
RESUMED = [("mamba3-kda-mamba2", "64-true"), ("gdn2-swa", "32-true")]  # go on from checkpoints of all strategies
# Who wrote a checkpoint, and which two processes go on from it
CROSSED = [("auto", "fsdp2"), ("fsdp2", "ddp"), ("auto", "ddp"), ("ddp", "fsdp2"), ("folder", "fsdp2")]
STRATEGIES = ("ddp", "fsdp2", "fsdp2_zero2")
HALVES = ("bf16-mixed", "bf16-true")


class Rest(Batches):
    """Batches of which the first ones have been seen."""

    def __init__(self, batches: list[Batch], seen: int) -> None:
        super().__init__(*batches)
        self.seen = seen

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches[self.seen :])


class Shared(LightningDataModule):
    """Micro-batches in the order of their numbers, dealt to the ranks, from those of an optimizer step on."""

    def __init__(self, step: int = 0) -> None:
        super().__init__()
        self.step = step

    def _mine(self, batches: list[Batch]) -> list[Batch]:
        return batches[self.trainer.global_rank :: self.trainer.world_size]

    def train_dataloader(self) -> Rest:
        return Rest(self._mine(TRAIN), self.step * MICRO_BATCHES // self.trainer.world_size)

    def val_dataloader(self) -> Batches:
        return Batches(*self._mine(VALIDATION))


class Save(Callback):
    """A checkpoint behind an optimizer step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # noqa: ARG002
        if trainer.global_step == self.step and batch_idx == self.step * trainer.accumulate_grad_batches:
            trainer.save_checkpoint(self.path)


class Look(Callback):
    """Initial values, and what the layers see in a forward: dtypes of their parameters, and whether any is still a shard."""

    def __init__(self) -> None:
        self.initial: dict[str, torch.Tensor] = {}
        self.seen: dict[str, str] = {}

    def on_train_start(self, trainer, pl_module) -> None:  # noqa: ARG002
        self.initial = whole(pl_module.lm)
        for name, module in pl_module.lm.named_modules():
            if module._parameters and not list(module.children()):
                module.register_forward_pre_hook(lambda module, _, name=name: self._note(name, module))

    def _note(self, name: str, module: nn.Module) -> None:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                self.seen[f"{name}.{own}"] = "a shard" if isinstance(parameter, DTensor) else str(parameter.dtype)


class Poison(Callback):
    """NaN in the logits of one rank, at an optimizer step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.global_rank == self.rank:
            pl_module.lm.head.register_forward_hook(lambda *a: a[2] * float("nan") if trainer.global_step == self.step else a[2])


def whole(lm: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered."""
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in lm.named_parameters()}


def train(model: str, precision: str, strategy: str, *, save: Path | None = None, resume: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Trains with accumulation and clipping; from the middle on if there is a checkpoint to go on from."""
    devices = 1 if strategy == "auto" else 2
    log, look = Log(), Look()
    lit = make_lit(make_lm(**MODELS[model]), lr=1e-3)
    callbacks = [log, look, *([Save(save, min(HALF, settings.get("max_steps", STEPS) - 1))] if save else []), *settings.pop("callbacks", [])]
    given = {
        "devices": devices,
        "strategy": strategy,
        "precision": precision,
        "accumulate_grad_batches": MICRO_BATCHES // devices,
        "gradient_clip_val": 0.5,
        "use_distributed_sampler": False,
        "max_steps": STEPS,
        "val_check_interval": HALF * MICRO_BATCHES // devices,
    }
    trainer = make_trainer(**(given | settings | {"callbacks": callbacks}))
    error = ""
    try:
        trainer.fit(lit, datamodule=Shared(HALF if resume else 0), ckpt_path=resume, weights_only=True)
    except FloatingPointError as problem:
        error = str(problem)
    return {
        "rows": log.rows,
        "val": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
        "initial": look.initial,
        "weights": whole(lit.lm),
        "stored": {name: str(p.dtype) for name, p in lit.lm.named_parameters()},
        "sharded": [isinstance(p, DTensor) for p in lit.lm.parameters()],
        "seen": look.seen,
        "error": error,
        "tokens": lit.tokens,
    }


def on_two(folder: Path) -> dict[Any, Any]:
    """Every training of two processes, those that go on from the checkpoints of one process included."""
    results: dict[Any, Any] = {}
    for model, precision in CASES:
        for strategy in STRATEGIES:
            save = folder / f"{strategy}-{precision}.ckpt" if (model, precision) in RESUMED else None
            results[model, precision, strategy] = train(model, precision, strategy, save=save)
    for model, precision in RESUMED:
        train(model, precision, "fsdp2_sharded_checkpoint", save=folder / f"folder-{precision}.ckpt", max_steps=HALF + 1)
        for writer, reader in CROSSED if precision == "64-true" else CROSSED[:2]:
            results[precision, writer, reader] = train(model, precision, reader, resume=folder / f"{writer}-{precision}.ckpt")
    for precision in HALVES:
        results[precision, "fsdp2"] = train("mamba3-kda-mamba2", precision, "fsdp2", max_steps=3, save=folder / f"{precision}.ckpt")
    for strategy in ("ddp", "fsdp2"):
        bad = train("gdn2-swa", "32-true", strategy, callbacks=[Poison(rank=1, step=3)], max_steps=5)
        errors = [""] * 2
        torch.distributed.all_gather_object(errors, bad["error"])
        results["nan", strategy] = bad | {"error": errors}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = on_two(Path(sys.argv[1]))
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(sys.argv[1]) / "results.pt")
