"""How fast a training is and what it costs: tokens, model FLOPs, MFU, memory, and time spent waiting for data."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler

from lit_modules.decoder_lm import DecoderLM
from lit_modules.loss_curve import short_number
from lit_modules.peaks import peak_flops
from mixers.errors import ConfigError

TRAINING_FLOPS = 3  # forward passes that a step costs: the backward pass is two
FETCH = ".train_dataloader_next"  # how Lightning's profilers call the wait for a batch


class Mark(NamedTuple):
    """The end of an optimizer step."""

    tokens: float  # seen so far, over all ranks
    seconds: float  # of training so far, without validations
    waited: float  # of these, for data


def flops_per_token(lm: DecoderLM, seq_len: int) -> float:
    """Model FLOPs of a forward and a backward pass, a token, in sequences of `seq_len`.

    They are the mixers' own counts (`SequenceMixer.flops`), MLPs and head, 2 a multiply-add: what the model asks for,
    whatever kernels or recomputation cost. Attention counts the pairs that its mask lets through, as if no document
    ended within a sequence. Embedding, norms and activations count nothing.
    """
    return TRAINING_FLOPS * lm.flops(seq_len) / seq_len


@final
class Throughput(Callback):
    """Measures a training, over a window of optimizer steps and all ranks, without the time of validations.

    Logs, in every row that the loggers write and as soon as there are two steps:
        tokens_per_second: over all ranks.
        flops_per_token: see `flops_per_token`; needs a `DecoderLM` as the module's `lm`, and a data module with `seq_len`.
        tflops_per_second: model TFLOP/s of each device.
        mfu: their share of the device's peak, where that is known.
        peak_memory_gib: since training began, of the rank with most: what torch has allocated on the GPU, or, on a CPU,
            the resident memory of the process since it started.
        data_wait: share of the time in which the training process waits for a batch: of each step the wait of the rank
            that waits longest, for all wait for it. A GPU that still has work queued waits less.

    Steps are counted where `tokens` grows, which the module must log. No device is waited for: `LitLM` has read the
    loss of a step before it ends.

    Args:
        window: Optimizer steps to average over.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ConfigError(f"Throughput.window: must be at least 1, got {window}")
        self.values: dict[str, float] = {}  # what it would log now
        self._marks: deque[Mark] = deque(maxlen=window + 1)
        self._paused = self._pause_began = 0.0
        self._waited = self._wait_began = 0.0
        self._profiler: Profiler | None = None  # whose calls are listened to
        self._flops: float | None = None
        self._peak: float | None = None

    # The time spent waiting for data

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Listens to the profiler, which Lightning tells when a fetch begins and ends. Between its hooks more happens: checkpoints are saved, .."""
        self._let_go()
        if stage != "fit":
            return
        profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
        self._profiler = profiler
        start, stop = profiler.start, profiler.stop

        def heard_start(action_name: str) -> None:
            start(action_name)
            if action_name.endswith(FETCH):
                self._wait_began = time.perf_counter()

        def heard_stop(action_name: str) -> None:
            if action_name.endswith(FETCH):
                self._waited += time.perf_counter() - self._wait_began
            stop(action_name)

        profiler.start, profiler.stop = heard_start, heard_stop  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        self._let_go()

    def _let_go(self) -> None:
        if self._profiler is not None:
            for name in ("start", "stop"):
                vars(self._profiler).pop(name, None)  # that of its class comes back
            self._profiler = None

    # Steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._marks.clear()
        self.values = {}
        lm, seq_len = getattr(pl_module, "lm", None), getattr(getattr(trainer, "datamodule", None), "seq_len", None)
        known = isinstance(lm, DecoderLM) and isinstance(seq_len, int)
        self._flops = flops_per_token(lm, seq_len) if known else None  # type: ignore[arg-type]
        device, precision = trainer.strategy.root_device, str(trainer.precision)
        name = "the CPU"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            name = torch.cuda.get_device_name(device)
        self._peak = peak_flops(name, precision)
        if trainer.is_global_zero and self._flops is not None:
            cost = f"{short_number(self._flops)} FLOPs a token, forward and backward, in sequences of {seq_len:,}"
            unknown = f"no MFU: the peak of {name} in {precision} is not known"
            print(f"throughput: {cost}; " + (f"peak of {name}: {self._peak / 1e12:,.1f} TFLOP/s" if self._peak else unknown), flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._paused += time.perf_counter() - self._pause_began

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        tokens = trainer.callback_metrics.get("tokens")
        if tokens is None or (self._marks and float(tokens) == self._marks[-1].tokens):
            return  # no optimizer step
        self._marks.append(Mark(float(tokens), time.perf_counter() - self._paused, self._waited))
        if len(self._marks) == 1:
            if self._flops is not None:
                pl_module.log("flops_per_token", torch.tensor(self._flops, dtype=torch.float64), on_step=True, on_epoch=False)
            return
        first, last = self._marks[0], self._marks[-1]
        seconds = max(last.seconds - first.seconds, 1e-9)
        rate = (last.tokens - first.tokens) / seconds
        began = not self.values
        self.values["tokens_per_second"] = rate
        if self._flops is not None:
            self.values["flops_per_token"] = self._flops
            self.values["tflops_per_second"] = per_device = rate * self._flops / trainer.world_size / 1e12
            if self._peak is not None:
                self.values["mfu"] = 1e12 * per_device / self._peak
        # self.log costs as much as all the rest, so only for rows that are written. The condition is that of
        # Lightning's loggers; the first part is the same on all ranks, as it must be: they talk to each other.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = trainer.global_step % max(1, every) == 0 or trainer.global_step == trainer.max_steps
        if began or due:
            self._ask_all_ranks(trainer, seconds)
        if began or due or trainer.should_stop:
            values = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.values.items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def _ask_all_ranks(self, trainer: Trainer, seconds: float) -> None:
        """Peak memory and data_wait."""
        device = trainer.strategy.root_device
        waits = [b.waited - a.waited for a, b in zip(list(self._marks), list(self._marks)[1:], strict=False)]
        memory = peak_memory(device)
        if trainer.world_size > 1:
            values = torch.tensor([memory, *waits], dtype=torch.float64, device=device)
            memory, *waits = trainer.strategy.reduce(values, reduce_op="max").tolist()
        if memory:
            self.values["peak_memory_gib"] = memory / 2**30
        self.values["data_wait"] = min(1.0, sum(waits) / seconds)


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that torch has allocated on a GPU, or the most resident memory of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # Linux, where getrusage also knows the memory of the process that started this one
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.is_file() else None
    if found:
        return 1024.0 * int(found[1])
    if sys.platform == "win32":
        return 0.0
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
