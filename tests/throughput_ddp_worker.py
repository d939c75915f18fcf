"""Run as a script: two processes wait for data in turn, by clocks of the test's own; each saves what it measured."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback, LightningDataModule
from lit_cases import make_batch, make_lit, make_trainer

import lit_modules.throughput as throughput

clock = SimpleNamespace(now=0.0)


class InTurn:
    """Batches of which a rank waits 1 s for every second one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return 12

    def __iter__(self):
        for i in range(len(self)):
            clock.now += i % 2 == self.rank
            yield make_batch(i)


class PerRank(LightningDataModule):
    def train_dataloader(self) -> InTurn:
        return InTurn(self.trainer.global_rank)


class Work(Callback):
    """A step takes 3 s, or 4 s with the wait for the other rank."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # noqa: ARG002
        clock.now += 3 + (batch_idx % 2 != trainer.global_rank)


def main(folder: Path) -> None:
    throughput.time = SimpleNamespace(perf_counter=lambda: clock.now)  # type: ignore[attr-defined]
    measure = throughput.Throughput()
    trainer = make_trainer(devices=2, strategy="ddp", use_distributed_sampler=False, max_steps=11, log_every_n_steps=4, callbacks=[measure, Work()])
    trainer.fit(make_lit(), datamodule=PerRank())
    own = (measure._marks[-1].waited - measure._marks[0].waited) / (measure._marks[-1].seconds - measure._marks[0].seconds)
    torch.save(measure.values | {"own_wait": own}, folder / f"{trainer.global_rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
