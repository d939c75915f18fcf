"""Compares prepared shards with their checksums before a model reads them."""

from __future__ import annotations

import sys
from typing import final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mixers.errors import ConfigError
from recipes.commands.cli import MixersCLI


def verify_shards(cli: MixersCLI, stage: str) -> None:
    """Reads what a stage needs of the shards, in the main process. What `predict` says does not stand between its lines.

    What is found wrong ends all processes: those that are not started yet never are, others hear of it when they can.
    """
    trainer, refusal, out = cli.trainer, None, sys.stderr if stage == "predict" else sys.stdout
    environment = getattr(trainer.strategy, "cluster_environment", None)
    alone = trainer.world_size == 1 or (trainer.num_nodes == 1 and not environment.creates_processes_externally)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            if verified := cli.datamodule.verify(stage, lambda line: print(line, file=out, flush=True)):
                rest = "" if verified.known == verified.files else "; the others were not read: `prepare --check` reads all, once"
                print(f"data: verified: {verified} of the shards have the checksum in their index{rest}", file=out, flush=True)
        except ConfigError as error:
            if alone:
                raise
            refusal = str(error)
    if trainer.world_size > 1:  # in every process: one that the main process has started takes itself for one of many that somebody else did
        trainer.callbacks.append(Refusal(refusal))  # type: ignore[attr-defined]


@final
class Refusal(Callback):
    """Ends all processes with what the main one has found wrong, before any takes a step. What the others give it is not looked at."""

    def __init__(self, line: str | None) -> None:
        self.line, self.asked = line, False

    def ask(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        if self.asked:  # a training validates too
            return
        self.asked = True
        if line := trainer.strategy.broadcast(self.line):
            raise ConfigError(line)

    on_fit_start = on_validation_start = on_test_start = ask
