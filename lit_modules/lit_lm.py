"""`LitLM`: trains, validates, tests and saves a `DecoderLM` under Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, final

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from lit_modules.audit import Audit
from lit_modules.autopsy import Step, StepGuard
from lit_modules.checkpoint import HEADER, check_same_model, read_header, write_header
from lit_modules.data.windows import IGNORED, Batch
from lit_modules.decoder_lm import DecoderLM
from lit_modules.metrics import SequenceNLL, StepTotals, TokenNLL, scores, sequence_nll, token_nll
from lit_modules.optim import build_adamw, cosine_lr, describe_groups, group_table, optimizer_groups, scale_and_clip
from lit_modules.parallel import FSDP2, STRATEGIES
from lit_modules.resume import Resume
from lit_modules.units import reshard
from mixers.errors import ConfigError

UNKNOWN_STEPS = 2**62  # the limit on steps until the size of a step is known
LIGHTNING_MAX_EPOCHS = 1000  # what Lightning takes for "no limit was given"


@final
class LitLM(LightningModule):
    """A language model with its loss, optimizer, schedule and metrics.

    An optimizer step descends the mean over all valid targets of its micro-batches and ranks, however they are spread.
    Training stops when max_tokens positions have been seen, unless Trainer(max_steps) or another limit stops it before.

    Logs train/loss (nats per token), train/bpb (bits per byte), train/grad_norm (before clipping), lr, tokens and, if steps may be
    skipped, train/skipped (both so far, resumed runs included) for every optimizer step; val/ and test/ loss, perplexity and bpb.

    Args:
        lm: The model. On the meta device it is materialised and initialised where it trains.
        lr: Peak learning rate.
        betas: Of AdamW.
        weight_decay: Of AdamW, on matrices; vectors and what mixers exempt take none.
        max_tokens: Tokens to train on, over all ranks.
        warmup_tokens: Tokens over which the learning rate rises from 0 to lr, linearly.
        final_lr_ratio: The learning rate at max_tokens, as a share of lr; a cosine leads there.
        max_skipped_steps: Steps whose loss or gradient norm is not finite that a run may leave out; the next one stops it. 0: the first one does.

    Raises:
        ConfigError: a setting outside its range.
    """

    def __init__(
        self,
        lm: DecoderLM,
        lr: float = 4e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        max_tokens: int = 100_000_000_000,
        warmup_tokens: int = 1_000_000_000,
        final_lr_ratio: float = 0.1,
        max_skipped_steps: int = 0,
    ) -> None:
        super().__init__()
        _require(0 < lr < math.inf, "lr", "must be positive", lr)
        _require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", "must be two numbers in [0, 1)", betas)
        _require(0 <= weight_decay < math.inf, "weight_decay", "must not be negative", weight_decay)
        _require(max_tokens >= 1, "max_tokens", "must be at least 1", max_tokens)
        _require(0 <= warmup_tokens <= max_tokens, "warmup_tokens", f"must lie in 0 .. max_tokens = {max_tokens}", warmup_tokens)
        _require(0 <= final_lr_ratio <= 1, "final_lr_ratio", "must lie in [0, 1]", final_lr_ratio)
        _require(max_skipped_steps >= 0, "max_skipped_steps", "must be at least 0", max_skipped_steps)
        self.lm = lm
        self.lr = lr
        self.betas = betas
        self.weight_decay = weight_decay
        self.max_tokens = max_tokens
        self.warmup_tokens = warmup_tokens
        self.final_lr_ratio = final_lr_ratio
        self.guard = StepGuard(max_skipped_steps)
        self.tokens = 0  # positions seen in training, over all ranks and resumed runs
        self.val_nll = TokenNLL()
        self.test_nll = TokenNLL()
        self._given_steps: int | None = None  # within a fit: the trainer's own limit on steps, -1 for none
        self._micro_batch: int | None = None  # positions of a micro-batch; the same number on every rank
        self._own_settings: list[dict[str, Any]] = []  # of each group of the optimizer
        self._sums: Tensor | None = None  # [3] of this rank since the last optimizer step: nll, targets, n_bytes
        self._positions = 0  # likewise
        self.ballot: Callable[[], list[int]] = list  # counts of this rank that go along with the sums of a step, which all ranks wait for anyway
        self.votes: list[float] = []  # their sums over all ranks, of the last step

    # The model

    def configure_model(self) -> None:
        """Shards the model under fsdp2, materialises one that is on the meta device and draws its initial values, and casts it to its dtype."""
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, FSDP2):
            strategy.shard(self.lm)
        if any(parameter.is_meta for parameter in self.lm.parameters()):
            device = self.device if strategy is None else strategy.root_device
            self.lm.to_empty(device=device)
            self.lm.reset_parameters()
        if strategy is not None:  # Lightning would do so after it has loaded a checkpoint, and round one of 64-true to float32
            strategy.precision_plugin.convert_module(self.lm)

    def cpu(self) -> Self:
        """Leaves a model on the meta device there: Lightning, which tidies up behind an error, would hide it behind one of torch's."""
        return self if any(parameter.is_meta for parameter in self.parameters()) else super().cpu()

    def configure_optimizers(self) -> Optimizer:
        # A fused AdamW unscales fp16 gradients within its step, too late for clipping.
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        optimizer = build_adamw(optimizer_groups(self.lm, self.weight_decay), lr=self.lr, betas=self.betas, fused=fused)
        self._own_settings = [{name: group[name] for name in ("weight_decay", "betas")} for group in optimizer.param_groups]
        return optimizer

    def configure_callbacks(self) -> list[Callback]:
        return [Audit(), Resume()]

    # Length of the training

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)) and not isinstance(strategy, FSDP2):
            name = type(strategy).__name__.removesuffix("Strategy")
            raise ConfigError(f"trainer.strategy: {name} is not supported (legal: {', '.join(STRATEGIES)})")
        self._micro_batch = None
        data = getattr(self.trainer, "datamodule", None)
        sizes = getattr(data, "batch_size", None), getattr(data, "seq_len", None)
        if all(isinstance(size, int) for size in sizes):
            self._micro_batch = math.prod(sizes)  # type: ignore[arg-type]
        self._given_steps = self.trainer.max_steps
        # Here and not later: what Lightning restores from a checkpoint depends on whether steps are limited.
        self._limit_steps(self.trainer.global_step)
        if self._given_steps == -1 and self.trainer.max_epochs == LIGHTNING_MAX_EPOCHS:
            self.trainer.fit_loop.max_epochs = -1

    def _limit_steps(self, step: int) -> None:
        """Sets the number of the last optimizer step from the tokens that are left after step number `step`."""
        if self._given_steps is not None:
            left = max(0, self.max_tokens - self.tokens)
            steps = left if self._micro_batch is None else -(-left // (self._micro_batch * self._replicas * self._accumulate))
            known = self._micro_batch is not None or not left
            limit = step + steps if known else UNKNOWN_STEPS
            self.trainer.fit_loop.epoch_loop.max_steps = limit if self._given_steps == -1 else min(limit, self._given_steps)

    @property
    def _replicas(self) -> int:
        """Ranks that see different data; gradients are averaged over them."""
        replicas = self.trainer.distributed_sampler_kwargs
        return int(replicas["num_replicas"]) if replicas else 1

    @property
    def targets(self) -> int:
        """Valid targets of this rank since the last optimizer step."""
        return 0 if self._sums is None else int(self._sums[1])

    @property
    def _accumulate(self) -> int:
        return int(self.trainer.accumulate_grad_batches)

    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero:
            Console().print(group_table(describe_groups(optimizer_groups(self.lm, self.weight_decay))))

    def on_train_start(self) -> None:
        for group, own in zip(self.trainer.optimizers[0].param_groups if self._own_settings else (), self._own_settings, strict=True):
            group.update(own)  # a checkpoint brings those of its training along
        self._micro_batch, self._sums, self._positions, self.votes = None, None, 0, []
        self.guard.begin()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        step = self.trainer.global_step
        self._limit_steps(step)
        if step >= self.trainer.max_steps > -1:
            self.trainer.should_stop = True  # Lightning then validates the final weights

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self._given_steps is not None:
            self.trainer.fit_loop.epoch_loop.max_steps = self._given_steps
            self._given_steps = None

    # Steps

    def training_step(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch: its nats over the positions of a micro-batch, put right in `configure_gradient_clipping`."""
        if self._micro_batch is None:  # the first one of this fit
            self._micro_batch = int(self.trainer.strategy.broadcast(batch.targets.numel()))
        nll, targets = self._nll(batch)
        sums = torch.stack([nll.detach().double(), targets.double(), batch.n_bytes.double()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._positions += batch.targets.numel()
        self.guard.add(batch, nll)
        return nll / self._micro_batch

    def _nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed nats, and the number of valid targets."""
        logits, _ = self.lm(batch.inputs, cu_seqlens=batch.cu_seqlens)
        return token_nll(logits, batch.targets, reduction="sum"), (batch.targets != IGNORED).sum()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Normalises and clips the gradients, checks them, and sets the learning rate; Lightning calls it before every step.

        By now gradients are unscaled (fp16) and summed over the micro-batches, which Lightning has divided by their
        nominal number, and averaged over ranks. The factor undoes that and divides by the valid targets of the step.

        Raises:
            FloatingPointError: loss or gradients are not finite, and no more steps may be skipped. With a loss scale (fp16), gradients
                may overflow while it is above 1: Lightning then skips the step.
        """
        totals = self._step_totals()
        assert self._micro_batch is not None
        factor = self._micro_batch * self._replicas * self._accumulate / max(totals.targets, 1)
        by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        norm = scale_and_clip(
            (parameter for group in optimizer.param_groups for parameter in group["params"]),
            factor,
            max_norm=None if by_value else gradient_clip_val,
            max_value=gradient_clip_val if by_value else None,
        )
        mean = scores(*totals[:3])
        self.guard.check(self.trainer, self.lm, optimizer, lambda batch: self._nll(batch)[0], totals.nll, norm, self.tokens)
        self.tokens += round(totals.positions)
        lr = self.lr_at(self.tokens)
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.guard.end(Step(self.trainer.global_step, self.tokens, mean.loss, norm, lr))
        values = {"train/loss": mean.loss, "train/bpb": mean.bpb, "train/grad_norm": norm, "lr": lr, "tokens": self.tokens}
        if self.guard.max_skipped:
            values["train/skipped"] = self.guard.skipped
        # As float64, which holds any number of tokens exactly.
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}, on_step=True, on_epoch=False)

    def lr_at(self, tokens: int) -> float:
        """The learning rate of the optimizer step that brings the tokens seen to `tokens`."""
        return cosine_lr(tokens, peak=self.lr, warmup_tokens=self.warmup_tokens, max_tokens=self.max_tokens, final_ratio=self.final_lr_ratio)

    def _step_totals(self) -> StepTotals:
        """Sums over ranks, and begins the next step's."""
        assert self._sums is not None
        sums = torch.cat([self._sums, self._sums.new_tensor([self._positions, *self.ballot()])])
        self._sums, self._positions = None, 0
        found = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        share = self._replicas / self.trainer.world_size  # tensor-parallel ranks have counted the same data
        self.votes = found[4:]
        return StepTotals(*(share * total for total in found[:4]))

    def validation_step(self, batch: Batch) -> None:
        self.val_nll.update(*self._nll(batch), batch.n_bytes)

    def test_step(self, batch: Batch) -> None:
        self.test_nll.update(*self._nll(batch), batch.n_bytes)

    def predict_step(self, batch: Batch) -> SequenceNLL:
        """Nats and tokens of each packed document, or of each row where there are no boundaries."""
        logits, _ = self.lm(batch.inputs, cu_seqlens=batch.cu_seqlens)
        return sequence_nll(logits, batch.targets, batch.cu_seqlens)

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val", self.val_nll)

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test", self.test_nll)

    def _end_evaluation(self, stage: str, metric: TokenNLL) -> None:
        values = metric.compute()._asdict()  # summed over ranks
        metric.reset()
        tensors = {f"{stage}/{name}": torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in values.items()}
        self.log_dict(tensors, on_step=False, on_epoch=True, sync_dist=True)
        reshard(self.lm)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        write_header(checkpoint, self.lm, self.tokens)
        if self.guard.skipped:
            checkpoint[HEADER]["skipped"] = self.guard.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ConfigError for a checkpoint of another model, naming the first setting that differs."""
        trainer = self._trainer
        source = f"checkpoint {trainer.ckpt_path}" if trainer is not None and trainer.ckpt_path else "the checkpoint"
        settings, tokens = read_header(checkpoint, source)
        check_same_model(settings, self.lm.settings, source)
        self.tokens = tokens
        self.guard.skipped = int(checkpoint[HEADER].get("skipped", 0))
        if self._given_steps is not None:
            self._limit_steps(checkpoint["global_step"])


def _require(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"model.{key}: {rule}, got {value!r}")
