"""`validate`, `test` and `predict`: a checkpoint on data. Without a config, that of the checkpoint's run is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from lit_modules.stopping import PREEMPTED, Stopped, at_once
from mixers.errors import ConfigError
from recipes.commands.checkpoints import check_model, check_strategy, run_config, with_checkpoint
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import collect, merge, read_config
from recipes.commands.plan import make_plan
from recipes.commands.verified import verify_shards


def validate(argv: list[str]) -> int:
    """Prints loss, perplexity and bits per byte on the validation set."""
    return _unless_stopped(lambda: _evaluate("validate", argv))


def test(argv: list[str]) -> int:
    """Prints loss, perplexity and bits per byte on the test set."""
    return _unless_stopped(lambda: _evaluate("test", argv))


def predict(argv: list[str]) -> int:
    """Prints a JSON line for each packed document of the test set: its tokens and the sum of their negative log likelihoods, in nats."""
    return _unless_stopped(lambda: _predict(argv))


def _unless_stopped(command: Callable[[], int]) -> int:
    """Runs it, unless a signal comes: then there is no result, or not all of it, and the exit code says so."""
    try:
        with at_once():
            return command()
    except Stopped as stop:
        print(f"stopped by {stop} before the end: the same command line begins again", file=sys.stderr, flush=True)
        return PREEMPTED


def _evaluate(command: str, argv: list[str]) -> int:
    cli, path = _prepare(command, argv)
    getattr(cli.trainer, command)(cli.model, datamodule=cli.datamodule, ckpt_path=path, weights_only=True)
    return 0


def _predict(argv: list[str]) -> int:
    cli, path = _prepare("predict", argv)
    if cli.trainer.world_size > 1:
        raise ConfigError(f"trainer.devices: predict prints in the order of the data and takes one device, got {cli.trainer.world_size}")
    batches: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=path, weights_only=True)
    for batch in batches:
        for nll, tokens in zip(batch.nll.tolist(), batch.tokens.tolist(), strict=True):
            print(json.dumps({"tokens": tokens, "nll": nll}))
    return 0


def _prepare(command: str, argv: list[str]) -> tuple[MixersCLI, str]:
    request, path = with_checkpoint(collect(argv), any_run=True)
    if path is None:
        if {"-h", "--help", "--print_config"} & {token.partition("=")[0] for token in argv}:
            MixersCLI(command, request)  # exits
        raise ConfigError(f"ckpt_path: must be set, {command} needs a trained model")
    config = run_config(path)
    if not request.files and config is not None:
        request = request._replace(config=merge(read_config(config), request.config), files=[config])
    cli = MixersCLI(command, request)
    check_model(path, make_plan(cli.config, needs_tokenizer=True).model.lm)
    cli.build()
    check_strategy(path, cli.trainer.strategy)
    cli.datamodule.setup(command)  # what is refused here has cost no other process its start
    verify_shards(cli, command)
    return cli, str(path)
