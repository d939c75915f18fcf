"""Checkpoints that are whole or not there: written beside their place, forced to the disk, renamed. A full disk costs the new one, not the last."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast, final, runtime_checkable
from weakref import proxy

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lit_modules.autopsy import FILE as AUTOPSY
from lit_modules.data.shards import replace_file
from lit_modules.intact import finish_folder, link, part_of, system_error, write_file
from lit_modules.stopping import Stopped
from mixers.errors import ConfigError

LAST = "last.ckpt"
DIVERGED = "diverged.ckpt"  # weights that led to a step that is not finite; not what a training goes on from, unless it is named


class NotWrittenError(Exception):
    """A checkpoint could not be written, for the reason given; raised on all ranks."""


@runtime_checkable
class SeesCheckpoints(Protocol):
    """A callback that is told, on the first rank, when a checkpoint has been written."""

    def on_checkpoint_saved(self, trainer: Trainer) -> None:
        """Of the step that the trainer is at."""


@final
class FileIO(TorchCheckpointIO):
    """Writes a checkpoint's file beside its place, without a copy in memory. Lightning's would write it in /tmp, and copy it from there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return write_file(checkpoint, Path(path))


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
            finish_folder(part, Path(path))
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = system_error(error)
        if cause is None:
            raise
        problem = cause.strerror or str(cause)
    if sharded and problem and strategy.is_global_zero:
        shutil.rmtree(part, ignore_errors=True)
    _agree(strategy, problem)


def write_again(strategy: Strategy, source: str, path: str) -> None:
    """Gives a checkpoint that `write` has just written a second name, on all ranks. Raises: as `write`."""
    problem = ""
    try:
        if strategy.is_global_zero:
            link(Path(source), Path(path))
    except OSError as error:
        problem = error.strerror or str(error)
    _agree(strategy, problem)


def _agree(strategy: Strategy, problem: str) -> None:
    """NotWrittenError on all ranks if the first one has had a problem."""
    problem = strategy.broadcast(problem)
    if problem:
        raise NotWrittenError(problem)


class Checkpoint(ModelCheckpoint):
    """A ModelCheckpoint that saves between optimizer steps only, and whose last.ckpt is the end of the training, however it ended.

    What Lightning would save in the middle of a step's hooks is saved when the step's row is in the log: before the validation or the step after it.
    What it would write twice, under the name of its step and as last.ckpt, is written once and has two names.
    """

    _due = False  # whether a step has been taken since Lightning was last asked whether to save
    _stepping = False  # whether the weights may be those of half a step
    _began: int | None = None  # optimizer steps when this training began
    _good = "none was saved before"  # the last checkpoint that was written
    _fresh: str | None = None  # the file or folder that this moment's state was written to

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = FileIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = self._last_global_step_saved = trainer.global_step
        if trainer.ckpt_path:
            self._good = f"the last good one is {trainer.ckpt_path} (step {trainer.global_step:,})"
        self.last_model_path = self._path(LAST) or ""  # is in every checkpoint: the same in both names

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
            self._attempt(trainer, lambda: self._save_now(trainer, lambda: batch_end(trainer, pl_module, None, None, -1)))

    def _save_now(self, trainer: Trainer, save: Callable[[], None]) -> None:
        """Saves as last.ckpt what Lightning puts off until a validation has logged `monitor`: a kill before it is not to cost all steps."""
        before, self._defer_save_until_validation = self._defer_save_until_validation, False
        save()
        if self._defer_save_until_validation:
            step = self._last_global_step_saved
            self._save_last_checkpoint(trainer, {})
            self._last_global_step_saved = step  # the validation, which may be of this step, has its own to save
        self._defer_save_until_validation |= before

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
        if isinstance(exception.__cause__, NotWrittenError) or self._began is None:
            return
        if isinstance(exception, FloatingPointError):
            self._end_diverged(trainer, pl_module)
            return
        if self._stepping or trainer.global_step <= self._began:
            return
        if trainer.world_size > 1 and not isinstance(exception, Stopped):  # that one is raised on all ranks; saving takes all of them
            return
        if not isinstance(exception, (Stopped, KeyboardInterrupt)) and not _finite(trainer, pl_module):
            return
        self._fresh = None
        try:
            super().on_exception(trainer, pl_module, exception)  # if save_on_exception
            path = self._save_end(trainer)
        except NotWrittenError as error:
            _say(trainer, f"checkpoint: {self._lost(error)}")
            return
        if path is not None and trainer.is_global_zero:
            print(f"checkpoint: {path} (step {trainer.global_step:,})", flush=True)

    def _end_diverged(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the weights that diverged under a name of their own: a training that goes on from them diverges at once."""
        path, saved = self._path(DIVERGED), False
        if path is None:
            return
        if trainer.global_step == self._began:
            what = "nothing to save, no step was taken"
        elif not _finite(trainer, pl_module):
            what = "not saved, the weights are not finite"
        else:
            try:
                self._write(trainer, path)
                what, saved = f"{path} (step {trainer.global_step:,}) has the weights that diverged, not to be gone on from", True
            except NotWrittenError as error:
                what = f"not written: {error}"
        if not trainer.is_global_zero:
            return
        same = self._last_checkpoint_saved and self._last_global_step_saved == trainer.global_step
        good = f"{self._last_checkpoint_saved} is of the same step" if same else self._good
        print(f"checkpoint: {what}; {good}", flush=True)
        file = Path(path).parents[1] / AUTOPSY
        if file.is_file():
            last = None if same else self._last_checkpoint_saved or trainer.ckpt_path
            about = {**json.loads(file.read_bytes()), "checkpoints": {"diverged": path if saved else None, "last_good": last and str(last)}}
            try:
                replace_file(file, json.dumps(about, indent=1).encode())
            except OSError as error:  # it stays as it was
                _say(trainer, f"autopsy: {file} could not be written: {error.strerror or error}")

    def _path(self, name: str) -> str | None:
        """Of a checkpoint that is not named after its step; None where none is to be written."""
        return os.path.join(self.dirpath, name) if self.save_last and self.dirpath else None

    def _save_end(self, trainer: Trainer) -> str | None:
        path = None if getattr(trainer, "fast_dev_run", False) else self._path(LAST)
        if path is not None:
            self._save_checkpoint(trainer, path)
        return path

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:  # noqa: ARG002
        path, fresh = self._path(LAST), self._fresh
        if path is None:
            return
        if fresh is None:
            self._save_checkpoint(trainer, path)
        else:
            write_again(trainer.strategy, fresh, path)
            self._saved(trainer, path)
        self._fresh = None

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._write(trainer, filepath)
        self._saved(trainer, filepath)
        on_disk = isinstance(trainer.strategy.checkpoint_io, FileIO) and "://" not in filepath  # not so where it is still being written, say
        self._fresh = filepath if on_disk else None

    def _write(self, trainer: Trainer, filepath: str) -> None:
        try:
            for logger in trainer.loggers:
                logger.save()  # no row of a step before this checkpoint is lost with the process
        except OSError as error:
            _say(trainer, f"log: not written: {error.strerror or error}")
        write(trainer.strategy, trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only), filepath)

    def _saved(self, trainer: Trainer, filepath: str) -> None:
        self._good = f"the last good one is {filepath} (step {trainer.global_step:,})"
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))
        for callback in trainer.callbacks if trainer.is_global_zero else ():  # type: ignore[attr-defined]
            if isinstance(callback, SeesCheckpoints):
                callback.on_checkpoint_saved(trainer)

    def _attempt(self, trainer: Trainer, save: Callable[[], None]) -> None:
        """Saves, or says that it could not and goes on; Lightning then knows of no new checkpoint, removes no old one and tries again."""
        self._fresh = None
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


def _finite(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether all weights are; asked on all ranks, for each sees its part of a sharded parameter only."""
    return trainer.strategy.reduce_boolean_decision(all(bool(p.isfinite().all()) for p in pl_module.parameters()))


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, file=sys.stderr, flush=True)
