"""What a parsed config would train, checked on the meta device: before a folder is made, data are read or a GPU is needed."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace

from lit_modules.data import PackedText
from lit_modules.data.shards import what_is_missing
from lit_modules.data.tokenizer import load_tokenizer
from lit_modules.decoder_lm import DecoderLM
from lit_modules.lit_lm import LitLM
from lit_modules.parallel import check_precision, check_strategy_name
from mixers.base import at_least
from mixers.errors import ConfigError, unknown
from recipes.commands.parser_errors import readable

METRICS = (
    *("train/loss", "train/bpb", "train/grad_norm", "train/skipped", "lr", "tokens", "val/loss", "val/perplexity", "val/bpb"),
    *("tokens_per_second", "flops_per_token", "tflops_per_second", "mfu", "peak_memory_gib", "data_wait"),
    *("epoch", "step"),  # Lightning's
)
MOST_PARAMETERS = 10**14  # beyond any machine, and below where torch's own arithmetic about sizes overflows


class Plan(NamedTuple):
    """A config that can be trained, as far as that can be known without data."""

    model: LitLM  # on the meta device
    data: PackedText  # with the tokenizer of bytes; nothing is read
    accumulate: int
    replicas: int  # devices that see different data
    precision: str
    max_steps: int  # of the trainer; -1: no limit
    notes: list[str]  # what could not be checked here

    @property
    def micro_batch(self) -> int:
        """Tokens of a micro-batch, on each device."""
        return self.data.batch_size * self.data.seq_len

    @property
    def tokens_a_step(self) -> int:
        return self.micro_batch * self.accumulate * self.replicas

    @property
    def steps(self) -> int:
        """Optimizer steps until the first limit."""
        steps = -(-self.model.max_tokens // self.tokens_a_step)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    @property
    def tokens(self) -> int:
        """Tokens until the first limit."""
        return min(self.model.max_tokens, self.steps * self.tokens_a_step)


def build_model(**settings: Any) -> DecoderLM:
    """The model on the meta device; ConfigError with the full key of a setting that cannot be used."""
    try:
        with torch.device("meta"):
            lm = DecoderLM(**settings)
    except ConfigError as error:
        raise ConfigError(f"model.lm.{readable(str(error))}") from error
    except (OverflowError, RuntimeError, TypeError) as error:  # torch's, of a tensor whose size is no 64-bit number
        if "overflow" not in str(error).lower():
            raise
        raise ConfigError(f"model.lm: a size is too large for any tensor: {str(error).splitlines()[0]}") from error
    if (parameters := sum(p.numel() for p in lm.parameters())) > MOST_PARAMETERS:
        raise ConfigError(f"model.lm: must have at most {MOST_PARAMETERS:.0e} parameters, got {parameters:,}: a size in it is not what you meant")
    return lm


def make_plan(config: Namespace, *, needs_tokenizer: bool) -> Plan:
    """Builds the model of a parsed config on the meta device and checks what can be checked without data.

    Args:
        config: as the parser gives it.
        needs_tokenizer: whether a tokenizer that cannot be read is an error or a note.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    _check_numbers(config)
    _check_monitor(config)
    trainer, model, data = config.trainer, config.model.as_dict(), config.data.as_dict()
    lm = build_model(**model.pop("lm"))
    tokenizer = data.pop("tokenizer")
    notes = _check_vocabulary(lm, tokenizer, needs_tokenizer)
    notes += filter(None, [what_is_missing(data["path"], tokenizer)])
    notes += _check_strategy(trainer, here=needs_tokenizer)
    at_least(1, **{"trainer.accumulate_grad_batches": trainer.accumulate_grad_batches})
    return Plan(
        model=LitLM(lm, **model),
        data=PackedText(**data, tokenizer="bytes"),
        accumulate=trainer.accumulate_grad_batches,
        replicas=_replicas(trainer),
        precision=str(trainer.precision or "32-true"),
        max_steps=trainer.max_steps,
        notes=notes,
    )


def _check_numbers(config: Namespace) -> None:
    """ConfigError for what Lightning and torch would refuse late, in many lines or not at all."""
    trainer = config.trainer
    clip, interval = trainer.gradient_clip_val, trainer.val_check_interval
    numbers = int, float
    root, place = trainer.default_root_dir, config.checkpoint.dirpath
    epochs, every, sanity = trainer.check_val_every_n_epoch, trainer.log_every_n_steps, trainer.num_sanity_val_steps
    for key, value, holds, legal in (
        ("trainer.gradient_clip_val", clip, clip is None or 0 <= clip < math.inf, "null or a number >= 0"),
        ("trainer.val_check_interval", interval, not isinstance(interval, numbers) or 0 < interval < math.inf, "null or > 0"),
        ("trainer.check_val_every_n_epoch", epochs, epochs is None or epochs >= 1, "null or a number of epochs"),
        ("trainer.log_every_n_steps", every, every is None or every >= 0, "null, 0 (never) or a number of steps"),
        ("trainer.num_sanity_val_steps", sanity, sanity is None or sanity >= -1, "null, -1 (all) or a number of batches"),
        ("trainer.limit_train_batches", trainer.limit_train_batches, trainer.limit_train_batches != 0, "null or > 0"),
        ("trainer.min_steps", trainer.min_steps, (trainer.min_steps or 0) >= 0, "null or a number of steps"),
        ("trainer.min_epochs", trainer.min_epochs, (trainer.min_epochs or 0) >= 0, "null or a number of epochs"),
        ("trainer.min_steps", trainer.min_steps, _within(trainer.min_steps, trainer.max_steps), "at most trainer.max_steps"),
        ("trainer.min_epochs", trainer.min_epochs, _within(trainer.min_epochs, trainer.max_epochs), "at most trainer.max_epochs"),
        ("trainer.max_steps", trainer.max_steps, trainer.max_steps >= -1, "-1 (no limit) or a number of steps"),
        ("trainer.default_root_dir", root, bool(root) and "://" not in str(root), "a folder of this machine"),
        ("checkpoint.dirpath", place, place != "", "null or a folder"),
        ("trainer.devices", trainer.devices, _is_devices(trainer.devices), "auto, -1, a number of devices or their indices"),
    ):
        if not holds:
            raise ConfigError(f"{key}: must be {legal}, got {value}")


def _within(least: int | None, most: int | None) -> bool:
    """Whether a training that ends at `most` (None, -1: no limit) can have taken `least`."""
    return most is None or most < 0 or (least or 0) <= most


def _check_strategy(trainer: Namespace, *, here: bool) -> list[str]:
    """Of one that is given as a class, with its settings, only the precision is looked at: Lightning and `LitLM.setup` see to the rest."""
    strategy = trainer.strategy
    if isinstance(strategy, str):
        check_strategy_name(strategy)
    name = strategy if isinstance(strategy, str) else str(strategy.get("class_path")).rpartition(".")[2].lower()
    return check_precision(name, trainer.precision, str(trainer.accelerator), here=here)


def _is_devices(devices: int | str | list[int]) -> bool:
    if isinstance(devices, list):
        return bool(devices) and all(index >= 0 for index in devices)
    return bool(re.fullmatch(r"auto|-1|[1-9]\d*|\d+( *, *\d+)* *,|\d+( *, *\d+)+", str(devices).strip()))


def _check_monitor(config: Namespace) -> None:
    monitor = config.checkpoint.monitor
    if monitor is not None and monitor not in METRICS and not config.trainer.callbacks:  # callbacks may log others
        raise unknown("checkpoint.monitor", "metric", monitor, METRICS)


def _check_vocabulary(lm: DecoderLM, tokenizer: str, needed: bool) -> list[str]:
    try:
        tokens = load_tokenizer(tokenizer).vocab_size
    except ConfigError as error:
        if needed:
            raise
        return [f"model.lm.vocab_size was not checked: {error}"]
    if lm.settings["vocab_size"] < tokens:
        raise ConfigError(f"model.lm.vocab_size: is {lm.settings['vocab_size']}, but the tokenizer {tokenizer} has {tokens} tokens")
    return []


def _replicas(trainer: Namespace) -> int:
    """Devices of a trainer that see different data, as far as its settings tell."""
    devices = trainer.devices
    if str(devices) in ("auto", "-1"):
        count = 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    elif isinstance(devices, list):
        count = len(devices)
    else:
        count = len(devices.split(",")) if "," in str(devices) else int(devices)
    arguments = trainer.strategy.get("init_args") if isinstance(trainer.strategy, Namespace) else None
    sharing = arguments.get("tensor_parallel_size", 1) if arguments is not None else 1
    return max(1, int(count * trainer.num_nodes // (sharing if isinstance(sharing, int) else 1)))
