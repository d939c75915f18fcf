"""Why a training step went wrong: the step is run again with hooks, nothing is updated, and what is found goes into the run's folder.

All ranks of a distributed training take part, for a sharded model can only run on all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_modules.data.shards import replace_file
from lit_modules.data.windows import Batch
from lit_modules.decoder_lm import DecoderLM
from lit_modules.tracer import Range, bad_tensors, gathered, parameter_ranges, parts, run_again

FILE = "autopsy.json"
KEPT = 20  # steps whose loss, gradient norm and learning rate are remembered
LISTED = 8  # names of tensors in a list


class Step(NamedTuple):
    """A step that was taken or skipped."""

    step: int
    tokens: int  # seen after it
    loss: float
    grad_norm: float
    lr: float


class StepGuard:
    """Looks at every optimizer step before the weights change, and leaves it out or stops the run if its loss or gradient norm is not finite.

    It keeps references to the step's micro-batches and a few numbers of the steps before it, which costs no time and hardly any memory.

    Args:
        max_skipped: steps that a run may leave out.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.skipped = 0  # steps left out, over resumed runs
        self.steps: deque[Step] = deque(maxlen=KEPT)
        self.batches: list[Batch] = []  # this rank's micro-batches since the last step
        self.losses: list[Tensor] = []  # their summed nats

    def add(self, batch: Batch, loss: Tensor) -> None:
        """A micro-batch has gone forward."""
        self.batches.append(batch)
        self.losses.append(loss.detach())

    def begin(self) -> None:
        """Forgets the step under way."""
        self.batches, self.losses = [], []

    def end(self, step: Step) -> None:
        """The step is taken, or left out."""
        self.steps.append(step)
        self.begin()

    def check(
        self, trainer: Trainer, lm: DecoderLM, optimizer: Optimizer, loss_of: Callable[[Batch], Tensor], nll: float, norm: float, tokens: int
    ) -> None:
        """Drops the gradients of a step that is left out. All ranks have the same sums, so they do the same.

        Args:
            trainer, lm, loss_of: as in `write_autopsy`.
            optimizer: about to take the step.
            nll, norm: of the step, over all ranks.
            tokens: seen before the step.

        Raises:
            FloatingPointError: the step is not finite and no more may be left out; one line that names the autopsy.
        """
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        wrong = [] if math.isfinite(nll) else [f"loss is {nll}"]
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1):
            wrong.append(f"gradient norm is {norm}")
        if not wrong:
            return
        where, what = f"step {trainer.global_step} (after {tokens:,} tokens)", " and ".join(wrong)
        if self.skipped < self.max_skipped:
            self.skipped += 1
            optimizer.zero_grad(set_to_none=True)  # without gradients an optimizer changes nothing
            if trainer.is_global_zero:
                print(f"{where}: {what}; skipped, {self.skipped} of at most {self.max_skipped}", file=sys.stderr, flush=True)
            return
        file = None
        try:
            file = write_autopsy(trainer, lm, self, loss_of, what, tokens)
        except Exception as error:  # whatever it is (no memory is left for a second run, say), it must not hide why the run stops
            print(f"autopsy: failed: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        skipped = f" (steps skipped before: {self.skipped})" if self.skipped else ""
        raise FloatingPointError(f"{where}: {what}{skipped}; the weights were not changed{f'; autopsy: {file}' if file else ''}")


def write_autopsy(trainer: Trainer, lm: DecoderLM, guard: StepGuard, loss_of: Callable[[Batch], Tensor], what: str, tokens: int) -> Path | None:
    """Examines the step under way, says the result on stderr and writes it to the run's folder. Called by all ranks; drops the gradients.

    Args:
        trainer: of the run.
        lm: the model, with the gradients of the step.
        guard: holds the step's micro-batches.
        loss_of: the summed nats of a micro-batch, by the forward of the training.
        what: is wrong, for the reader.
        tokens: seen before the step.

    Returns:
        The file; None where the run has no folder or it cannot be written.
    """
    about: dict[str, Any] = {"format": 1, "what": what, "step": trainer.global_step, "tokens": tokens}
    about |= _cause(trainer, lm, guard, loss_of)
    about |= {"samples": _samples(trainer, about, len(guard.batches)), "seeds": _seeds(trainer, lm)}
    about |= {"last_steps": [step._asdict() for step in guard.steps], "run": _run(trainer)}
    folder = trainer.log_dir if trainer.loggers else trainer.default_root_dir  # log_dir asks all ranks
    if not trainer.is_global_zero:
        return None
    print("\n".join(readable(about)), file=sys.stderr, flush=True)
    if folder is None or Path(folder).resolve() == Path.cwd() or getattr(trainer, "fast_dev_run", False):
        return None
    path = Path(folder, FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(_plain(about), indent=1).encode())
    except OSError as error:
        print(f"autopsy: {path} could not be written: {error.strerror or error}", file=sys.stderr, flush=True)
        return None
    return path


# The cause


def _cause(trainer: Trainer, lm: DecoderLM, guard: StepGuard, loss_of: Callable[[Batch], Tensor]) -> dict[str, Any]:
    """The first thing that is not finite: a parameter, an activation or a gradient; with the rank and micro-batch, the gates and ranges there."""
    parameters = bad_tensors(((name, p) for name, p in lm.named_parameters()))
    gradients = bad_tensors(((name, p.grad) for name, p in reversed(list(lm.named_parameters())) if p.grad is not None))
    losses = [math.isfinite(float(loss)) for loss in guard.losses]
    found: dict[str, Any] = {"micro_batches": len(losses)}
    for rank in gathered({"parameters": parameters, "gradients": gradients, "losses": losses}):
        for key in ("parameters", "gradients"):
            found.setdefault(f"bad_{key}", []).extend(name for name in rank[key] if name not in found.get(f"bad_{key}", []))
        losses = [a and b for a, b in zip(losses, rank["losses"], strict=False)]
    suspects = [m for m, finite in enumerate(losses) if not finite] or range(len(losses))
    seen: dict[str, Any] | None = None
    for micro_batch in suspects:
        with trainer.precision_plugin.train_step_context(), torch.enable_grad():
            findings = run_again(lm, guard.batches[micro_batch], loss_of)
        rank = next((r for r, finding in enumerate(findings) if finding["first"]), None)
        if rank is not None or seen is None:
            seen = {"rank": rank or 0, "micro_batch": micro_batch, **findings[rank or 0]}
        if rank is not None:
            break
    found |= seen or {}
    if found["bad_parameters"]:
        found["first"] = {"kind": "parameter", "tensor": found["bad_parameters"][0]}
    elif not found.get("first") and found["bad_gradients"]:
        found["first"] = {"kind": "gradient", "tensor": found["bad_gradients"][0], "note": "the step run again is finite"}
    if found.get("first"):
        found["first"] |= _layer(lm, found["first"]["tensor"])
    return found | {"ranges": _ranges(lm, found.pop("outputs", {}))}


def _ranges(lm: DecoderLM, outputs: dict[str, Range]) -> dict[str, dict[str, Any]]:
    """Of the parameters and the output of each layer, embedding, norm and head: least, largest, and largest by size."""
    every = parameter_ranges(lm)
    ranges: dict[str, dict[str, Any]] = {}
    for module, part in parts(lm).items():
        inside = {name: _sized(r) for name, r in every.items() if name.startswith(f"{module}.") and not math.isnan(r["min"])}
        about = ranges.setdefault(part, {})
        if inside:
            largest = max(inside, key=lambda name: inside[name]["abs_max"])
            low, high = min(r["min"] for r in inside.values()), max(r["max"] for r in inside.values())
            about["parameters"] = {"min": low, "max": high, "abs_max": inside[largest]["abs_max"], "largest": largest}
        if part in outputs:
            about["output"] = _sized(outputs[part])
    return ranges


def _sized(found: Range) -> Range:
    return {**found, "abs_max": max(abs(found["min"]), abs(found["max"]))}


def _layer(lm: DecoderLM, tensor: str) -> dict[str, Any]:
    """The number of the layer that a tensor's name lies in, and its mixer."""
    name = tensor.rpartition(" ")[2].split(".")
    number = int(name[1]) if name[0] == "layers" and len(name) > 1 else None
    return {"layer": number, "mixer": None if number is None else lm.layer_names[number]}


# What surrounds it


def _samples(trainer: Trainer, found: dict[str, Any], micro_batches: int) -> dict[str, Any] | None:
    """The training samples of the step, and where those of the bad micro-batch lie; None if the data have no numbered samples."""
    data: Any = getattr(trainer, "datamodule", None)
    size = getattr(data, "batch_size", None)
    if not hasattr(data, "locate") or not isinstance(size, int) or getattr(trainer, "overfit_batches", False):
        return None
    world = int((trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"])
    first = int(data.state_dict()["samples"])  # those that were trained on: the step is not counted yet
    replica = found.get("rank", 0) * world // trainer.world_size  # tensor-parallel ranks are neighbours and see the same data
    start = first + (found.get("micro_batch", 0) * world + replica) * size
    return {"step": [first, first + micro_batches * size * world - 1], "micro_batch": [data.locate(i) for i in range(start, start + size)]}


def _seeds(trainer: Trainer, lm: DecoderLM) -> dict[str, Any]:
    state = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16).hexdigest()
    data = getattr(getattr(trainer, "datamodule", None), "seed", None)
    return {"initial_values": lm.settings["seed"], "data": data, "torch": torch.initial_seed(), "torch_state": state}


def _run(trainer: Trainer) -> dict[str, Any]:
    strategy = type(trainer.strategy).__name__
    return {"processes": trainer.world_size, "strategy": strategy, "precision": str(trainer.precision)}


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: those become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def readable(about: dict[str, Any]) -> list[str]:
    """The autopsy in a few lines."""
    lines = [f"autopsy: step {about['step']} (after {about['tokens']:,} tokens): {about['what']}"]
    first = about.get("first")
    if first is None:
        lines.append("  first: nothing: run again, the step is finite")
    else:
        where = f", layer {first['layer']} ({first['mixer']})" if first["layer"] is not None else ""
        count = f", {first['not_finite']:,} of {first['of']:,} not finite" if "of" in first else ""
        note = f"; {first['note']}" if "note" in first else ""
        op = f" ({first['op']})" if "op" in first else ""
        lines.append(f"  first: {first['kind']}: {first['tensor']}{op}{count}{where}{note}")
    lines.append(f"  micro-batch {about.get('micro_batch', 0) + 1} of {about['micro_batches']} on rank {about.get('rank', 0)}")
    for kind in ("parameters", "gradients"):
        if bad := about.get(f"bad_{kind}"):
            more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
            lines.append(f"  {kind} that are not finite: {', '.join(bad[:LISTED])}{more}")
    for layer, gates in about.get("gates", {}).items():
        if first is None or first["layer"] is None or layer.split()[0] == str(first["layer"]):
            ranges = (f"{name} {r['min']:.3g} .. {r['max']:.3g}{' (and not finite)' * bool(r['not_finite'])}" for name, r in gates.items())
            lines.append(f"  gates of layer {layer}: {', '.join(ranges)}")
    if largest := _largest(about["ranges"]):
        lines.append(f"  largest: {largest}")
    if about["samples"]:
        lines.append(f"  samples: {', '.join(str(place['sample']) for place in about['samples']['micro_batch'])}")
    norms = ", ".join(f"{step['grad_norm']:.3g}" for step in about["last_steps"][-LISTED:])
    return [*lines, f"  gradient norms before: {norms or 'none'}"]


def _largest(ranges: dict[str, dict[str, Any]]) -> str:
    """The largest parameter, and the largest output of a layer or another part of the model."""
    found = []
    for kind in ("parameters", "output"):
        sizes = {part: about[kind]["abs_max"] for part, about in ranges.items() if kind in about and not math.isnan(about[kind]["abs_max"])}
        if sizes:
            part = max(sizes, key=lambda name: sizes[name])
            where = f"in {ranges[part][kind]['largest']}" if kind == "parameters" else f"of {'layer ' * part[0].isdigit()}{part}"
            found.append(f"{kind.removesuffix('s')} {sizes[part]:.3g} {where}")
    return ", ".join(found)
