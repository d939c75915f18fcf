"""`fit`: trains the model of a config, in a new run folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lit_modules.data.workers import start_server
from lit_modules.events import FULL
from lit_modules.loss_curve import short_number
from lit_modules.parallel import FSDP2, leave
from lit_modules.stopping import Stopped, at_once, end_with_parent, exit_code, from_a_thread, parent_of_others
from mixers.errors import ConfigError
from recipes.commands import gpu_ready, out_of_memory, sizes
from recipes.commands.checkpoints import (
    changeable,
    check_changes,
    check_model,
    check_resumable,
    check_strategy,
    is_finished,
    step_of,
    with_checkpoint,
)
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import collect
from recipes.commands.plan import Plan, make_plan
from recipes.commands.receipt import Receipt, backends_of, kept
from recipes.commands.run_folder import CONFIG, RunFolder, check_writable, make_run_folder
from recipes.commands.verified import verify_shards


class Training(NamedTuple):
    """One that can begin."""

    cli: MixersCLI
    plan: Plan
    checkpoint: Path | None
    about: Receipt | None  # of the main process, if it has a folder


def run(argv: list[str]) -> int:
    """Checks the config, makes the run folder, trains. A start that is refused leaves nothing behind."""
    end_with_parent()
    try:
        with at_once():
            training = _prepare(argv)
    except Stopped as stop:
        return exit_code(None, stop)
    code = 0 if training is None else _train(training)
    if code == 0:
        leave()
    return code


def _prepare(argv: list[str]) -> Training | None:
    """Everything that one process does alone; None if there is nothing left to train."""
    request, checkpoint = with_checkpoint(collect(argv))
    cli = MixersCLI("fit", request)
    if cli.config.data.num_workers:
        start_server()  # it imports meanwhile
    may_change = changeable(cli.config.may_change)
    if may_change and cli.config.ckpt_path is None:
        raise ConfigError("may_change: is of a training that goes on; give --ckpt_path too, or leave it out")
    plan = make_plan(cli.config, needs_tokenizer=True)
    if checkpoint is not None:
        check_model(checkpoint, plan.model.lm)
        if is_finished(request, checkpoint, plan):
            return None
        check_resumable(checkpoint, plan)
        check_changes(checkpoint, plan, may_change)
    cli.config["ckpt_path"] = None if checkpoint is None else str(checkpoint)
    gpu = gpu_ready.device_of(cli.config.trainer) if _is_main_process() else None
    backends = [] if gpu is None else gpu_ready.get_ready(plan.model.lm, plan.precision, gpu)
    folder = _run_folder(cli.config)
    try:
        with _in_one_line(cli.config):
            if folder is not None:
                (folder.path / CONFIG).write_text(cli.parser.dump(cli.config, skip_unset=False), encoding="utf-8")
            cli.build(_where_to_write(cli.config, folder))
            changed = _read_data(cli, plan, checkpoint, may_change)
            about = None
            if folder is not None:
                about = Receipt(folder, cli, argv, backends or backends_of(plan.model.lm, plan.precision), checkpoint, changed)
    except BaseException:
        if folder is not None:
            folder.remove()
        raise
    _announce(plan, folder, backends, saves=cli.config.trainer.enable_checkpointing is not False)
    return Training(cli, plan, checkpoint, about)


def _read_data(cli: MixersCLI, plan: Plan, checkpoint: Path | None, may_change: set[str]) -> dict[str, tuple[Any, Any]]:
    """Reads them before the training does, for what is refused here has cost no other process its start. Returns what `check_changes` does."""
    changed: dict[str, tuple[Any, Any]] = {}
    if checkpoint is not None:
        check_strategy(checkpoint, cli.trainer.strategy)
    cli.datamodule.setup("fit")
    if checkpoint is not None:
        changed = check_changes(checkpoint, plan, may_change, cli.datamodule)
        cli.datamodule.may_change = may_change
    verify_shards(cli, "fit")
    return changed


def _train(training: Training) -> int:
    cli, plan, checkpoint, about = training
    begun = step_of(checkpoint)  # now: the training may save in the place of what it goes on from

    def end(stop: Stopped) -> int:
        if about is not None:
            about.end("stopped", stop)
        return exit_code(cli.trainer, stop)

    signals = at_once() if cli.trainer.world_size == 1 else from_a_thread(end)
    try:
        with kept(about), _in_one_line(cli.config), signals, parent_of_others():
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
            if cli.trainer.global_step == begun and plan.max_steps != 0:
                raise ConfigError(_no_step(cli.trainer, checkpoint))
    except FloatingPointError:
        if _is_main_process():
            raise
        return 1  # the first process has said it
    except (RuntimeError, MemoryError) as error:
        line = out_of_memory.explain(plan, error, sharded=isinstance(cli.trainer.strategy, FSDP2))
        if line is None:
            raise
        print("error:", line, file=sys.stderr, flush=True)
        return 1
    except Stopped as stop:
        return exit_code(cli.trainer, stop)
    return 0


def _no_step(trainer: Trainer, checkpoint: Path | None) -> str:
    """The line for a training that Lightning has ended before its first step."""
    where = "this training" if checkpoint is None else f"the checkpoint {checkpoint}"
    if any(isinstance(callback, Timer) and (callback.time_remaining() or 0) <= 0 for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return f"trainer.max_time: no step was taken, {where} is at the end of it already; raise it"
    if trainer.max_epochs is not None and -1 < trainer.max_epochs <= trainer.current_epoch:
        return f"trainer.max_epochs: no step was taken, {where} is at the end of it already; raise it"
    return f"trainer: no step was taken, {where} is at its end already, or a callback has stopped it"


@contextmanager
def _in_one_line(config: Namespace) -> Iterator[None]:
    """Settings that Lightning refuses, and a full disk, become ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {error}") from error
    except ValueError as error:
        if "`val_check_interval`" not in str(error):  # which is held against the number of batches when they are known
            raise
        raise ConfigError(f"trainer.val_check_interval: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith("Early stopping conditioned on metric"):  # which another callback might log: it is known at the first validation
            raise
        raise ConfigError(f"trainer.callbacks: {error}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(f"trainer.default_root_dir: {config.trainer.default_root_dir} cannot be written to: {error.strerror}") from error


def _is_main_process() -> bool:
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def _run_folder(config: Namespace) -> RunFolder | None:
    """The run's folder. Only the main process makes one; what the others write goes through it."""
    if config.trainer.fast_dev_run or not _is_main_process():
        return None
    place = config.checkpoint.dirpath
    if place is not None and "://" not in place and config.trainer.enable_checkpointing is not False:
        check_writable(place, "checkpoint.dirpath")
    return make_run_folder(config.trainer.default_root_dir)


def _where_to_write(config: Namespace, folder: RunFolder | None) -> Path | None:
    if config.trainer.fast_dev_run:
        return None
    return Path(config.trainer.default_root_dir) if folder is None else folder.path


@rank_zero_only
def _announce(plan: Plan, folder: RunFolder | None, backends: list[str], *, saves: bool) -> None:
    lm = plan.model.lm
    size = f"{short_number(sizes.count(lm))} parameters ({short_number(sizes.parameters_in_blocks(lm))} in the blocks)"
    print(f"model: [{', '.join(lm.settings['layout'])}] over {lm.settings['n_layers']} layers, {size}")
    print(f"training: {short_number(plan.tokens)} tokens, {plan.tokens_a_step:,} a step, {plan.steps:,} steps")
    for line in backends:
        print(f"backend: {line}")
    if folder and not saves:
        print("checkpoints: none, trainer.enable_checkpointing is false")
    print(f"run folder: {folder.path}" if folder else "run folder: none (fast_dev_run)", flush=True)
