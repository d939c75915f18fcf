"""What a run shows and leaves behind: a progress bar, and a summary with a loss curve and a sample.

They read what the module logs (`tokens`, `train/bpb`, `val/bpb`, ..; see `LitLM`) and work with any module that logs these.
"""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn, CustomTimeColumn
from rich.console import Console
from rich.progress import ProgressColumn, TextColumn
from torch.distributed.tensor import DTensor

from lit_modules.decoder_lm import DecoderLM, Sampling
from lit_modules.lit_lm import UNKNOWN_STEPS, LitLM
from lit_modules.loss_curve import LossCurve, short_number
from lit_modules.throughput import Throughput
from mixers.errors import ConfigError

CURVE = "loss_curve.png"


def _logged(trainer: Trainer, name: str) -> float | None:
    """The last value logged under a name."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


@final
class ProgressBar(RichProgressBar):
    """One bar over all optimizer steps of a run, with loss, bits per byte and learning rate, and what a `Throughput` measures.

    Where the output is not a terminal (a file, a batch job), prints a line now and then instead.

    Args:
        refresh_rate: Updates a second; 0 shows nothing.
        plain_every_n_steps: Optimizer steps from one plain line to the next.
    """

    def __init__(self, refresh_rate: int = 10, plain_every_n_steps: int = 50) -> None:
        if plain_every_n_steps < 1:
            raise ConfigError(f"ProgressBar.plain_every_n_steps: must be at least 1, got {plain_every_n_steps}")
        super().__init__(refresh_rate=refresh_rate)
        self.plain_every_n_steps = plain_every_n_steps
        self._plain = False
        self._total: float = float("inf")
        self._validated: dict[str, float] = {}  # kept, because reading it from the metrics waits for the GPU
        self._first_step = self._last_step = 0
        self._began = 0.0

    @property
    def is_enabled(self) -> bool:
        """Whether a bar is drawn."""
        return super().is_enabled and not self._plain

    @property
    def prints_lines(self) -> bool:
        """Whether plain lines are printed instead."""
        return super().is_enabled and self._plain

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = Console()
        self._plain = not (console.is_terminal or console.is_jupyter)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._validated = {}
        self._first_step = self._last_step = trainer.global_step
        self._began = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._show_train_task(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self._show_train_task(trainer)
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)
        step = trainer.global_step
        if self.prints_lines and step != self._last_step:
            self._last_step = step
            if step == self._first_step + 1 or step % self.plain_every_n_steps == 0 or step == self._total:
                self._print_line(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        loss, bpb = _logged(trainer, "val/loss"), _logged(trainer, "val/bpb")
        if trainer.state.fn != "fit" or trainer.sanity_checking or loss is None or bpb is None:
            return
        self._validated = {"val/bpb": bpb}
        if self.prints_lines:
            print(f"step {trainer.global_step}  validation: loss {loss:.3f}  bpb {bpb:.3f}", flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:  # noqa: ARG002
        """What stands behind the bar, formatted."""
        shown = (
            ("loss", "train/loss", "{:.3f}".format),
            ("bpb", "train/bpb", "{:.3f}".format),
            ("tok/s", "tokens_per_second", short_number),
            ("lr", "lr", "{:.1e}".format),
            ("val", "val/bpb", "{:.3f}".format),
            ("TFLOP/s", "tflops_per_second", "{:.3g}".format),
            ("MFU", "mfu", "{:.1%}".format),
            ("mem", "peak_memory_gib", "{:.3g}GiB".format),
            ("wait", "data_wait", "{:.1%}".format),
        )
        metrics = trainer.callback_metrics
        known = {name: float(metrics[name]) for _, name, _ in shown if name in metrics and not name.startswith("val/")}
        known |= self._validated
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                known |= callback.values  # of this step; it logs only now and then
        return {label: write(known[name]) for label, name, write in shown if name in known}

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:  # noqa: ARG002
        bar = CustomBarColumn(
            bar_width=16,
            complete_style=self.theme.progress_bar,
            finished_style=self.theme.progress_bar_finished,
            pulse_style=self.theme.progress_bar_pulse,
        )
        return [TextColumn("{task.description}"), bar, BatchesProcessedColumn(style=""), CustomTimeColumn(style=self.theme.time)]

    def _show_train_task(self, trainer: Trainer) -> None:
        """Adds the bar, or adds it anew when the number of steps has become known."""
        total, known = _total_steps(trainer), self._total
        self._total = total
        if self.progress is None or not self.is_enabled:
            return
        if self.train_progress_bar_id is not None and total != known:
            self.progress.update(self.train_progress_bar_id, visible=False)  # not removed: Lightning finds tasks by position
            self.train_progress_bar_id = None
        if self.train_progress_bar_id is None:
            self.train_progress_bar_id = self.progress.add_task("Training  ", total=total, completed=trainer.global_step)
            self.refresh()

    def _print_line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step, total = trainer.global_step, self._total
        metrics = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
        left = "unknown"
        if total != float("inf"):
            pace = (time.perf_counter() - self._began) / (step - self._first_step)
            left = str(timedelta(seconds=round(pace * (total - step))))
        print(f"step {step}{'' if total == float('inf') else f'/{int(total)}'}  {metrics}  eta {left}", flush=True)


def _total_steps(trainer: Trainer) -> float:
    """The optimizer steps at which training ends by the first of its limits; infinite if that is not known."""
    limits = [float("inf")]
    if 0 <= trainer.max_steps < UNKNOWN_STEPS:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(trainer.num_training_batches):
        limits.append(trainer.max_epochs * -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
    return min(limits)


@final
class RunSummary(Callback):
    """Leaves loss_curve.png and sample.txt in the run's folder when training ends, and prints the result.

    Args:
        prompt: Text that the sample goes on from. An empty one begins a document.
        max_new_tokens: Length of the sample, at most. 0 draws none.
        temperature: Of the sample; 0 takes the likeliest token.
        top_p: The sample's tokens come from the smallest set of at least this probability.
        seed: Of the sample.
    """

    def __init__(self, prompt: str = "", max_new_tokens: int = 200, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0) -> None:
        if max_new_tokens < 0 or not temperature >= 0 or not 0 < top_p <= 1:
            given = f"{max_new_tokens}, {temperature}, {top_p}"
            raise ConfigError(f"RunSummary: needs max_new_tokens >= 0, temperature >= 0 and top_p in (0, 1], got {given}")
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling(temperature, top_p)
        self.seed = seed
        self.curve = LossCurve()
        self._tokens = 0.0
        self._report: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        tokens, bpb = _logged(trainer, "tokens"), _logged(trainer, "train/bpb")
        if tokens is not None and bpb is not None and tokens != self._tokens:
            self._tokens = tokens
            self.curve.add_train(tokens, bpb)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        bpb = _logged(trainer, "val/bpb")
        if bpb is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.curve.add_validation(self._tokens, bpb)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir if trainer.loggers and not getattr(trainer, "fast_dev_run", False) else None  # asks all ranks
        if not trainer.is_global_zero:
            return
        self._report = [_validation_line(self.curve)]
        sample = self._sample(trainer, pl_module)
        if sample is not None:
            self._report += ["sample:", _printable(sample)]
        if folder is None:
            why = "trainer.logger is false" if not trainer.loggers else "this run has no folder"
            self._report.append(f"no loss curve and no sample written: {why}")
            return
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.draw(Path(folder))
            if sample is not None:
                Path(folder, "sample.txt").write_text(sample, encoding="utf-8")
        except OSError as error:  # Checkpoints are saved behind this: a full disk must not keep them from it.
            self._report.append(f"loss curve and sample could not be written: {error}")
        self._report.append(f"run folder: {folder}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        if self._report:
            print("\n".join(self._report), flush=True)
            self._report = []

    def state_dict(self) -> dict[str, Any]:
        return {**self.curve.state_dict(), "tokens": self._tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve.load_state_dict(state_dict)
        self._tokens = state_dict.get("tokens", 0.0)  # where the next validation stands, if it comes before a step

    def draw(self, folder: Path) -> None:
        """Writes the loss curve of a run into its folder."""
        self.curve.draw(folder / CURVE, title="/".join(folder.parts[-2:]))

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """A text that the model goes on from the prompt; None if none is asked for or there is no tokenizer, or if it fails (reported)."""
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None or self.max_new_tokens == 0 or not isinstance(pl_module, LitLM):
            return None
        if any(isinstance(parameter, DTensor) for parameter in pl_module.lm.parameters()):
            self._report.append("no sample: the parameters are sharded")
            return None
        prompt = [tokenizer.bos_id, *(int(token) for token in tokenizer.encode(self.prompt))]
        try:
            with trainer.precision_plugin.forward_context():
                tokens = self._generate(pl_module.lm, prompt, stop=tokenizer.bos_id)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # see OSError above
            self._report.append(f"no sample: {type(error).__name__}: {' '.join(str(error).split())}")
            return None
        return str(tokenizer.decode([*prompt, *tokens]))

    def _generate(self, lm: DecoderLM, prompt: list[int], stop: int) -> list[int]:
        device = lm.embedding.weight.device
        generator = torch.Generator(device).manual_seed(self.seed)
        prompt_T = torch.tensor(prompt, device=device)
        return list(lm.generate(prompt_T, self.max_new_tokens, sampling=self.sampling, stop=stop, generator=generator))


def _validation_line(curve: LossCurve) -> str:
    if not curve.validation:
        return "final validation: none was run"
    tokens, bpb = curve.validation[-1]
    return f"final validation: {bpb:.4f} bits per byte after {short_number(tokens)} tokens"


def _printable(text: str) -> str:
    """Without control characters, and in what the output can encode: an untrained model says anything."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)
