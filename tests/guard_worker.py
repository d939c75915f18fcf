"""Run as a script on two processes: a step that is not finite, skipped and then fatal, under ddp or fsdp2. Each rank saves what it saw."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule
from lit_cases import Batches, Log, make_batch, make_lit, make_lm, make_trainer
from torch.distributed.tensor import DTensor

from mixers.errors import ConfigError


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class PerRank(LightningDataModule):
    def train_dataloader(self) -> Batches:
        return Batches(*[make_batch(10 * seed + self.trainer.global_rank) for seed in range(8)])


class Broken(torch.autograd.Function):
    """Its input, and a gradient of it that is NaN."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # noqa: ARG004
        return grad * torch.nan


class Spoil(Callback):
    """Makes the output of one layer infinite on rank 1 at given steps; keeps the weights before and behind each step."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.on = steps, False
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        def spoil(_, __, y):
            return y * torch.inf if self.on and trainer.global_rank == 1 else y

        pl_module.lm.layers[1].mlp.up.register_forward_hook(spoil)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # noqa: ARG002
        self.on = trainer.global_step in self.steps and batch_idx % 2 == 1
        if batch_idx % 2 == 0:
            self.weights[trainer.global_step] = {name: whole(p) for name, p in pl_module.lm.named_parameters()}


def run(strategy: str, folder: Path) -> dict:
    spoil, log = Spoil(1, 2), Log()
    lit = make_lit(make_lm("cpu", n_layers=2, layout=["gdn2", "swa"]), max_skipped_steps=1)
    with torch.no_grad():
        lit.lm.layers[1].mlp.down.weight.mul_(100)  # the largest of its layer
    trainer = make_trainer(
        devices=2,
        strategy=strategy,
        accumulate_grad_batches=2,
        callbacks=[spoil, log],
        use_distributed_sampler=False,
        max_steps=4,
        default_root_dir=folder,
    )
    try:
        trainer.fit(lit, datamodule=PerRank())
        error = "none"
    except FloatingPointError as stop:
        error = str(stop)
    states = trainer.optimizers[0].state
    return {
        "error": error,
        "rows": log.rows,
        "unchanged": all(torch.equal(spoil.weights[1][name], spoil.weights[2][name]) for name in spoil.weights[1]),
        "moved": any(not torch.equal(spoil.weights[0][name], spoil.weights[1][name]) for name in spoil.weights[0]),
        "down": [float(extreme) for extreme in torch.aminmax(spoil.weights[2]["layers.1.mlp.down.weight"])],
        "optimizer_steps": sorted({int(state["step"]) for state in states.values()}),
    }


def broken(strategy: str, folder: Path) -> None:
    """A backward pass that returns NaN on rank 1, from where it comes into the gradients of all."""

    class Break(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            if trainer.global_rank == 1:
                pl_module.lm.layers[0].mlp.up.register_forward_hook(lambda _, __, y: Broken.apply(y))

    settings = {"use_distributed_sampler": False, "max_steps": 1, "default_root_dir": folder, "callbacks": [Break()]}
    trainer = make_trainer(devices=2, strategy=strategy, **settings)
    with suppress(FloatingPointError):
        trainer.fit(make_lit(make_lm(n_layers=2, layout=["gdn2", "swa"])), datamodule=PerRank())


def refused(strategy: str) -> str:
    """What the audit says of a constant matrix, a copy, and a NaN in the last row of the head, which rank 1 alone may hold."""
    lit = make_lit(make_lm("cpu", n_layers=2))
    first, second = (block.mixer for block in lit.lm.layers)
    first.k_proj.weight.data.fill_(0.5)
    second.q_proj.weight.data.copy_(first.q_proj.weight.data)
    lit.lm.head.weight.data[-1, -1] = torch.nan
    trainer = make_trainer(devices=2, strategy=strategy, use_distributed_sampler=False, max_steps=1)
    try:
        trainer.fit(lit, datamodule=PerRank())
    except ConfigError as error:
        return str(error)
    return "none"


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[2])
    result = run(sys.argv[1], root / "run")
    broken(sys.argv[1], root / "backward")
    result["refused"] = refused(sys.argv[1])
    torch.save(result, root / f"{torch.distributed.get_rank()}.pt")
