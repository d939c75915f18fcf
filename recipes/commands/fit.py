"""`fit`: trains the model of a config, in a new run folder."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_modules.loss_curve import short_number
from lit_modules.parallel import FSDP2, leave
from lit_modules.stopping import Stopped, exit_code
from mixers.errors import ConfigError
from recipes.commands import gpu_ready, out_of_memory, receipt, sizes
from recipes.commands.checkpoints import changeable, check_changes, check_model, check_resumable, check_strategy, is_finished, with_checkpoint
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import collect
from recipes.commands.plan import Plan, make_plan
from recipes.commands.run_folder import CONFIG, make_run_folder
from recipes.commands.verified import verify_shards


def run(argv: list[str]) -> int:
    """Checks the config, makes the run folder, trains. Nothing is written before all checks that need no data have passed."""
    request, checkpoint = with_checkpoint(collect(argv))
    cli = MixersCLI("fit", request)
    may_change, changed = changeable(cli.config.may_change), dict[str, tuple[Any, Any]]()
    plan = make_plan(cli.config, needs_tokenizer=True)
    if checkpoint is not None:
        check_model(checkpoint, plan.model.lm)
        if is_finished(request, checkpoint, plan.model.max_tokens):
            return 0
        check_resumable(checkpoint, plan.model.max_tokens)
        check_changes(checkpoint, plan, may_change)
    cli.config["ckpt_path"] = None if checkpoint is None else str(checkpoint)
    gpu = gpu_ready.device_of(cli.config.trainer) if _is_main_process() else None
    backends = [] if gpu is None else gpu_ready.get_ready(plan.model.lm, plan.precision, gpu)
    folder = None if cli.config.trainer.fast_dev_run else _run_folder(cli)
    try:
        cli.build(folder)
        if checkpoint is not None:
            check_strategy(checkpoint, cli.trainer.strategy)
        cli.datamodule.setup("fit")  # here, because Trainer hides its errors behind one of its own while the model is on the meta device
        if checkpoint is not None:
            changed = check_changes(checkpoint, plan, may_change, cli.datamodule)
            cli.datamodule.may_change = may_change
        verify_shards(cli, "fit")
    except BaseException:
        if folder is not None and _is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    _announce(plan, folder, backends)
    record = folder if _is_main_process() else None
    try:
        if record is not None and gpu is None:
            backends = receipt.backends_of(plan.model.lm, plan.precision)
        with receipt.kept(record, cli, argv, backends, checkpoint, changed):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {error}") from error
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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConfigError(f"trainer.default_root_dir: {folder} cannot be written to: {error.strerror}") from error
    leave()
    return 0


def _is_main_process() -> bool:
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def _run_folder(cli: MixersCLI) -> Path:
    """The run's folder with its config. Only the main process makes one; what the others write goes through it."""
    root = cli.config.trainer.default_root_dir
    if not _is_main_process():
        return Path(root)
    folder = make_run_folder(root)
    (folder / CONFIG).write_text(cli.parser.dump(cli.config, skip_unset=False), encoding="utf-8")
    return folder


@rank_zero_only
def _announce(plan: Plan, folder: Path | None, backends: list[str]) -> None:
    lm = plan.model.lm
    size = f"{short_number(sizes.count(lm))} parameters ({short_number(sizes.parameters_in_blocks(lm))} in the blocks)"
    print(f"model: [{', '.join(lm.settings['layout'])}] over {lm.settings['n_layers']} layers, {size}")
    print(f"training: {short_number(plan.model.max_tokens)} tokens, {plan.tokens_a_step:,} a step, {plan.steps:,} steps")
    for line in backends:
        print(f"backend: {line}")
    print(f"run folder: {folder}" if folder else "run folder: none (fast_dev_run)", flush=True)
