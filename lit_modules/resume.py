"""Resuming, exactly: what Lightning leaves open when a training goes on from a checkpoint.

Lightning saves the counters of its loops at the moment of saving, and reads from them where to go on. They do not say whether a validation
that was due has been run, count micro-batches of an optimizer step that was never taken, and hold for one number of processes. All of them follow
from the number of optimizer steps, which is what is used here: a checkpoint is the state after a whole step, whenever it was written and by whom.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop
from lightning.pytorch.loops.progress import _Progress
from lightning.pytorch.trainer.states import TrainerFn

from lit_modules.data.stream import keyed_hash

VALIDATED = "validated_step"  # the key of the optimizer step after which the last validation was run


@final
class Resume(Callback):
    """Goes on from a checkpoint at the next optimizer step, or at the validation that was due before it. `LitLM` brings it along.

    Generators of random numbers have no state to be saved: torch's are seeded for every micro-batch, by the model's seed, the tokens seen,
    the number of the micro-batch and the rank.
    """

    def __init__(self) -> None:
        self._validated = -1
        self._loaded = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        if self._loaded:
            restore_loops(trainer, validated=self._validated == trainer.global_step)
            self._loaded = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        replica = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
        torch.manual_seed(keyed_hash("noise", pl_module.lm.settings["seed"], b"%d %d %d" % (pl_module.tokens, batch_idx, replica)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        checkpoint[VALIDATED] = self._validated

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        if trainer.state.fn == TrainerFn.FITTING:
            self._validated = checkpoint.get(VALIDATED, checkpoint["global_step"])
            self._loaded = True


def restore_loops(trainer: Trainer, *, validated: bool) -> None:
    """Sets the counters of Lightning's loops to those after `trainer.global_step` whole optimizer steps, before the first batch is fetched.

    Args:
        trainer: in `on_train_start`, its loops as they were loaded.
        validated: whether the validation that may be due after this step has been run.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if math.isinf(trainer.num_training_batches):  # nobody knows where its epochs end
        return
    step, batches, accumulate = trainer.global_step, int(trainer.num_training_batches), trainer.accumulate_grad_batches
    epoch, done = divmod(step, -(-batches // accumulate))
    epochs = vars(fit.epoch_progress.total)
    at_end_of_epoch = epochs["started"] > epochs["processed"] and vars(loop.batch_progress.current)["processed"] > 0
    if done == 0 and step:
        _place(trainer, epoch - 1, batches, batches)
        if _validation_is_due(trainer) and (at_end_of_epoch or not validated):
            return _go_on_within_epoch(trainer, validated=validated)
    _place(trainer, epoch, min(done * accumulate, batches), batches)
    if done:
        return _go_on_within_epoch(trainer, validated=validated)
    fit._restarting = loop._restarting = loop.val_loop._restarting = False
    fit._restart_stage, loop._restart_stage = fit_loop.RestartStage.NONE, training_epoch_loop.RestartStage.NONE
    loop._batches_that_stepped = step
    return None


def _place(trainer: Trainer, epoch: int, batch: int, batches: int) -> None:
    """Sets the counters to so many finished epochs, of `batches` micro-batches each, and so many micro-batches after them."""
    fit, progress = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress
    _set(fit.epoch_progress, total=epoch, current=epoch)
    _set(progress, total=epoch * batches + batch, current=batch)
    progress.is_last_batch = batch == batches
    if batch:  # an epoch has begun
        fit.epoch_progress.increment_ready()
        fit.epoch_progress.increment_started()


def _set(progress: _Progress, *, total: int, current: int) -> None:
    for tracker, value in ((progress.total, total), (progress.current, current)):
        vars(tracker).update(dict.fromkeys(("ready", "started", "processed", "completed"), value))


def _validation_is_due(trainer: Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None  # it is made before `on_train_start`
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _go_on_within_epoch(trainer: Trainer, *, validated: bool) -> None:
    """Lets Lightning finish the micro-batch at which its counters stand, a validation included, and go on with the next one."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    due = _validation_is_due(trainer)
    fit._restarting = loop._restarting = loop.val_loop._restarting = True
    fit._restart_stage = fit_loop.RestartStage.RESTARTED_MID_EPOCH
    loop._restart_stage = training_epoch_loop.RestartStage.RESTARTED_ON_LAST  # a validation that is due is not run ..
    stages = evaluation_loop.RestartStage
    loop.val_loop._restart_stage = stages.RESTARTED_MID_EVALUATION if due and not validated else stages.NONE  # .. unless it is said here
    loop.val_loop.batch_progress.reset()
    loop._batches_that_stepped = trainer.global_step - due  # counted when the micro-batch is finished
