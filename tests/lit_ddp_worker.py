"""Run as a script: one optimizer step, a validation and a prediction on two processes; rank 0 saves what came out."""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import Callback, LightningDataModule
from lit_cases import Batches, gradients_of, make_batch, make_lit, make_trainer

# Micro-batches in the order of their sample numbers; rank r of 2 takes r, r + 2, ..
TRAIN = [make_batch(seed, ignored=ignored) for seed, ignored in enumerate((0, 9, 3, 11))]
VALIDATION = [make_batch(10 + seed, ignored=ignored) for seed, ignored in enumerate((0, 10))]


class PerRank(LightningDataModule):
    def train_dataloader(self) -> Batches:
        return Batches(*TRAIN[self.trainer.global_rank :: self.trainer.world_size])

    def val_dataloader(self) -> Batches:
        return Batches(*VALIDATION[self.trainer.global_rank :: self.trainer.world_size])


class KeepGradients(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ARG002
        self.gradients = gradients_of(pl_module.lm)


def run(devices: int) -> dict:
    keep = KeepGradients()
    strategy = "ddp" if devices > 1 else "auto"
    trainer = make_trainer(
        devices=devices,
        strategy=strategy,
        precision="64-true",
        accumulate_grad_batches=len(TRAIN) // devices,
        gradient_clip_val=1e9,
        callbacks=[keep],
        use_distributed_sampler=False,
        max_steps=1,
    )
    lit = make_lit()
    trainer.fit(lit, datamodule=PerRank())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = {name: p.detach().clone() for name, p in lit.lm.named_parameters()}
    return {"gradients": keep.gradients, "metrics": metrics, "weights": weights, "tokens": lit.tokens}


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run(devices=2)
    if torch.distributed.get_rank() == 0:
        torch.save(result, sys.argv[1])
