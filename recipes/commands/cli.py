"""LightningCLI for one model and one data module: its arguments, its defaults, its errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from lit_modules.callbacks import ProgressBar, RunSummary
from lit_modules.data import PackedText
from lit_modules.data.loaders import SHARED
from lit_modules.decoder_lm import DecoderLM
from lit_modules.events import Events, Metrics
from lit_modules.lit_lm import LitLM
from lit_modules.saving import Checkpoint
from lit_modules.stopping import StopOnSignal
from lit_modules.throughput import Throughput
from mixers.errors import ConfigError
from recipes.commands.config_files import LINKED, SECTIONS, Request, merge, not_settings
from recipes.commands.parser_errors import explain
from recipes.commands.plan import build_model
from recipes.commands.quiet import hush
from recipes.commands.run_folder import default_root

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # model.max_tokens ends the training
    "use_distributed_sampler": False,  # the data module deals samples to ranks itself
    "enable_model_summary": False,  # preflight says more
}


def _on_meta(_: type[DecoderLM], **settings: Any) -> DecoderLM:
    return build_model(**settings)


class MixersCLI(LightningCLI):
    """Parses the settings of `model`, `data`, `trainer`, `checkpoint` and `summary`. Nothing is built before `build`.

    Args:
        command: the subcommand; `fit` writes into a run folder, no other writes anything.
        request: the merged config and the rest of the command line.

    Raises:
        ConfigError: a key or value that the parser refuses.
    """

    def __init__(self, command: str, request: Request) -> None:
        hush()
        self.command = command
        self.run_folder: Path | None = None
        config = merge({"trainer": {"default_root_dir": default_root(request.files)}}, request.config)
        super().__init__(
            LitLM,
            PackedText,
            run=False,
            args=[f"--config={json.dumps(config, ensure_ascii=False)}", *request.arguments],
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            parser_kwargs={"prog": f"python -m recipes {command}", "exit_on_error": False, "allow_abbrev": False},
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=0, help="Initial values, order of the data, and torch's generators.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="A checkpoint, `last` (the newest of default_root_dir) or `auto` (that, if there is one).",
        )
        names = ", ".join(["batch (tokens an optimizer step)", *SHARED])
        help = f"What may differ from the checkpoint's training, such as batch,data: {names}."
        parser.add_argument("--may_change", type=str, default="", help=help)
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.link_arguments("seed_everything", "model.lm.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise explain(str(error), {action.dest for action in parser._actions} - {*LINKED}) from error
        for section in SECTIONS:
            if not isinstance(self.config[section], Namespace):
                raise not_settings(section, self.config[section])
        seed = self.config.seed_everything  # LightningCLI uses it next
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed_everything: must be in 0 .. 2**32 - 1, got {seed}")

    def instantiate_classes(self) -> None:
        """Nothing: LightningCLI would build everything as soon as it has parsed, but the config is checked first."""

    def build(self, run_folder: Path | None = None) -> None:
        """Builds model, data and trainer; what is written goes to `run_folder`.

        Raises:
            ConfigError: Lightning refuses a setting.
        """
        self.run_folder = run_folder
        try:
            self.config_init = self.parser.instantiate(self.config, instantiators=[(_on_meta, DecoderLM, False)])
            self.model, self.datamodule = self.config_init.model, self.config_init.data
            self.trainer = self.instantiate_trainer()
        except ConfigError:
            raise
        except (MisconfigurationException, ValueError, ImportError) as error:  # from Trainer and callbacks: settings that do not go together
            raise ConfigError(f"trainer: {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = {**self.config_init.trainer, **kwargs}
        given = settings["callbacks"] or []
        callbacks = [*given] if isinstance(given, list) else [given]
        settings["callbacks"] = callbacks + self._own_callbacks(settings)
        settings["logger"] = self._loggers(settings["logger"])
        if self.run_folder is not None:
            settings["default_root_dir"] = self.run_folder
        return Trainer(**settings)

    def _own_callbacks(self, settings: dict[str, Any]) -> list[Callback]:
        callbacks: list[Callback] = [ProgressBar()] if settings["enable_progress_bar"] is not False else []
        if self.command != "fit":
            return callbacks
        callbacks = [Throughput(), *callbacks, self.config_init.summary, StopOnSignal()]
        return callbacks + ([self.config_init.checkpoint] if settings["enable_checkpointing"] is not False else [])

    def _loggers(self, given: Any) -> Any:
        """Loggers that all write into the run folder; those of the config come in place of TensorBoard's."""
        if self.run_folder is None or given is False:
            return False
        own: list[Logger] = [Metrics(self.run_folder, name="", version="")]
        if given in (None, True):
            return [*own, Events(self.run_folder, name="", version="")]
        return own + (given if isinstance(given, list) else [given])
