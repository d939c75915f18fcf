"""Checkpoints that are whole or not there: written beside their place, forced to the disk, renamed. A full disk costs the new one, not the last."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, final
from weakref import proxy

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.distributed.checkpoint.api import CheckpointException

from lit_modules.data.shards import sync
from lit_modules.stopping import Stopped
from mixers.errors import ConfigError


class NotWrittenError(Exception):
    """A checkpoint could not be written, for the reason given; raised on all ranks."""


@final
class FileIO(TorchCheckpointIO):
    """Writes a checkpoint's file beside its place, without a copy in memory. Lightning's would write it in /tmp, and copy it from there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        part = part_of(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                sync(file)
            replace(part, target)
        except BaseException as error:
            part.unlink(missing_ok=True)
            raise _system_error(error) or error from None
        return None


def part_of(target: Path) -> Path:
    """Where a checkpoint is written before it is whole. `glob` and `ls` pass over it."""
    return target.with_name(f".{target.name}.part")


def replace(part: Path, target: Path) -> None:
    """Puts a file or folder in the place of another. Of a folder there is a moment without `target`; the old one then is `NAME.old.ckpt`."""
    old = target.with_name(f"{target.stem}.old{target.suffix}") if target.is_dir() else None
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    part.rename(target) if part.is_dir() else part.replace(target)
    _sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: BaseException) -> OSError | None:
    """The system's error behind another: torch's writer hides it behind a RuntimeError, the distributed one behind a list."""
    seen: list[BaseException | None] = [error]
    while seen:
        found = seen.pop()
        if isinstance(found, OSError):
            return found
        if isinstance(found, CheckpointException):
            seen += [wrapped for wrapped, _ in found.failures.values()]
        if found is not None:
            seen += [found.__cause__, found.__context__]
    return None


def write(strategy: Strategy, checkpoint: dict[str, Any], path: str) -> None:
    """Writes a checkpoint, a file or the folder of a sharded one, on all ranks.

    Raises:
        NotWrittenError: the system refused (on all ranks alike); what was at `path` is still there.
    """
    sharded, problem = getattr(strategy, "_save_distributed_checkpoint", False), ""
    part = part_of(Path(path))
    try:
        if sharded:  # not by FSDP2's own, which ends with barriers: the others would wait at them for a rank that failed
            ModelParallelStrategy.save_checkpoint(cast(ModelParallelStrategy, strategy), checkpoint, part)
        else:
            strategy.save_checkpoint(checkpoint, path)
        if sharded and strategy.is_global_zero:
            for file in part.iterdir():
                with file.open("rb+") as content:
                    sync(content)
            replace(part, Path(path))
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        problem = cause.strerror or str(cause)
    problem = strategy.broadcast(problem)
    if problem:
        if sharded and strategy.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
        raise NotWrittenError(problem)


class Checkpoint(ModelCheckpoint):
    """A ModelCheckpoint that saves between optimizer steps only, and whose last.ckpt is the end of the training, however it ended.

    What Lightning would save in the middle of a step's hooks is saved when the step's row is in the log: before the validation or the step after it.
    """

    _due = False  # whether a step has been taken since Lightning was last asked whether to save
    _stepping = False  # whether the weights may be those of half a step
    _began: int | None = None  # optimizer steps when this training began
    _good = "there is none yet"  # the last checkpoint that was written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = FileIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = self._last_global_step_saved = trainer.global_step
        if trainer.ckpt_path:
            self._good = f"the last good one is {trainer.ckpt_path}"

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._stepping = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self._due |= self._stepping
        self._stepping = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self._save_if_due(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.should_stop:  # a training that is killed in its last validation is to be gone on with, and that validation to be run
            self._save_if_due(trainer, pl_module)

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due:
            self._due = False
            batch_end = super().on_train_batch_end
            self._attempt(trainer, lambda: batch_end(trainer, pl_module, None, None, -1))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validation_end = super().on_validation_end
        self._attempt(trainer, lambda: validation_end(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_if_due(trainer, pl_module)
        epoch_end = super().on_train_epoch_end
        self._attempt(trainer, lambda: epoch_end(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        try:
            self._save_end(trainer)
        except NotWrittenError as error:
            raise ConfigError(f"checkpoint: {self._lost(error)}") from error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what was learned, unless nothing was, the weights are not those of a whole step, or they are not finite and nobody asked to stop."""
        if isinstance(exception.__cause__, NotWrittenError):
            return
        if self._began is None or trainer.global_step <= self._began or (self._stepping and not isinstance(exception, FloatingPointError)):
            return
        if trainer.world_size > 1 and not isinstance(
            exception, (Stopped, FloatingPointError)
        ):  # those are raised on all ranks; saving takes all of them
            return
        asked = isinstance(exception, (Stopped, KeyboardInterrupt))
        # Together: of a sharded parameter each rank sees its part only.
        if not asked and not trainer.strategy.reduce_boolean_decision(all(p.isfinite().all() for p in pl_module.parameters())):
            return
        try:
            super().on_exception(trainer, pl_module, exception)  # if save_on_exception
            path = self._save_end(trainer)
        except NotWrittenError as error:
            _say(trainer, f"checkpoint: {self._lost(error)}")
            return
        if path is not None and trainer.is_global_zero:
            print(f"checkpoint: {path} (step {trainer.global_step:,})", flush=True)

    def _save_end(self, trainer: Trainer) -> Path | None:
        if not self.save_last or not self.dirpath or getattr(trainer, "fast_dev_run", False):
            return None
        path = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        self._save_checkpoint(trainer, str(path))
        return path

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        try:
            for logger in trainer.loggers:
                logger.save()  # no row of a step before this checkpoint is lost with the process
        except OSError as error:
            _say(trainer, f"log: not written: {error.strerror or error}")
        write(trainer.strategy, trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only), filepath)
        self._good = f"the last good one is {filepath} (step {trainer.global_step:,})"
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))

    def _attempt(self, trainer: Trainer, save: Callable[[], None]) -> None:
        """Saves, or says that it could not and goes on; Lightning then knows of no new checkpoint, removes no old one and tries again."""
        before = {**vars(self), "best_k_models": dict(self.best_k_models)}
        try:
            save()
        except NotWrittenError as error:
            good = self._good
            vars(self).update(before)
            self._good = good
            _say(trainer, f"checkpoint: {self._lost(error)}; training goes on")

    def _lost(self, error: NotWrittenError) -> str:
        return f"not written: {error}; {self._good}"


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, file=sys.stderr, flush=True)
