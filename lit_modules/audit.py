"""What is wrong with a model's parameters before it trains, and which of them get no gradient at the first step: a line each.

Nothing here knows names of parameters. What is constant on purpose, such as a norm's weight, or the same in two places, is so again when
`reset_parameters` of its module draws it anew (`mixers.init.draw`); how far a decay may start is what its module's `initial_ranges` declares.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_modules.decoder_lm import DecoderLM
from mixers.errors import ConfigError
from mixers.init import draw

SLACK = 1e-3  # a value is rounded when it is drawn, and may be stored in less than float32
LISTED = 20  # findings that are printed


class Finding(NamedTuple):
    """Something about one parameter."""

    name: str
    what: str
    fatal: bool = False  # training cannot begin

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


class _Owned(NamedTuple):
    """A parameter, the module that draws it, and its name there."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    attribute: str


class _Summary(NamedTuple):
    """A parameter's entries, over all ranks that hold a part of it."""

    finite: bool
    least: float
    most: float
    sums: tuple[float, float]  # least and largest sum of a part: with the above a fingerprint


def audit(lm: DecoderLM, *, fresh: bool = True) -> list[Finding]:
    """One finding at most for each parameter. All ranks of a sharded model call it, and get the same.

    Args:
        lm: the model as it is about to train.
        fresh: no checkpoint was loaded: decays must start in the range that their mixer declares.
    """
    owned = list(_owned(lm))
    summaries = _summaries([entry.parameter for entry in owned])
    wide = lm.parameter_groups().fp32
    found: dict[str, Finding] = {}
    for entry, summary in zip(owned, summaries, strict=True):
        what, fatal = _alone(lm, entry, summary, fp32=entry.name in wide, fresh=fresh)
        if what:
            found[entry.name] = Finding(entry.name, what, fatal)
    for entry, other in _same(lm, [(e, s) for e, s in zip(owned, summaries, strict=True) if e.name not in found and s.least < s.most]):
        found[entry.name] = Finding(entry.name, f"has the same values as {other.name} and is not tied to it")
    return [found[entry.name] for entry in owned if entry.name in found]


def _owned(lm: nn.Module) -> Iterator[_Owned]:
    """Tied parameters once, under their first name."""
    seen: set[int] = set()
    for prefix, module in lm.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield _Owned(f"{prefix}.{attribute}" if prefix else attribute, parameter, module, attribute)


def _alone(lm: DecoderLM, entry: _Owned, summary: _Summary, *, fp32: bool, fresh: bool) -> tuple[str | None, bool]:
    """What is wrong with a parameter whatever the others are, and whether it keeps the model from training."""
    parameter = entry.parameter
    if fp32 and parameter.dtype not in (torch.float32, torch.float64):
        return f"is declared float32 but stored in {str(parameter.dtype).removeprefix('torch.')}", True
    if not summary.finite:
        return "has values that are not finite", True
    ranges: dict[str, tuple[float, float]] = getattr(entry.module, "initial_ranges", dict)()
    if fresh and entry.attribute in ranges:
        low, high = ranges[entry.attribute]
        if summary.least < low - SLACK * max(1, abs(low)) or summary.most > high + SLACK * max(1, abs(high)):
            return f"starts at {summary.least:.4g} .. {summary.most:.4g}, outside of {low:.4g} .. {high:.4g}", False
    if parameter.numel() > 1 and summary.least == summary.most:
        drawn = _drawn(lm, entry)
        if bool((drawn != drawn.flatten()[0]).any()):
            return f"is {summary.least:g} everywhere, and {type(entry.module).__name__} draws values that differ", False
    return None, False


def _drawn(lm: DecoderLM, entry: _Owned) -> Tensor:
    return draw(entry.module, entry.attribute, lm.settings["seed"], entry.name)


def _same(lm: DecoderLM, entries: list[tuple[_Owned, _Summary]]) -> Iterator[tuple[_Owned, _Owned]]:
    """Parameters with the values of an earlier one, where both are drawn differently."""
    groups: dict[Any, list[_Owned]] = defaultdict(list)
    for entry, summary in entries:
        groups[entry.parameter.shape, summary].append(entry)
    for first, *others in groups.values():
        for other in others:
            pair = _local(first.parameter), _local(other.parameter)
            equal = pair[0].shape == pair[1].shape and torch.equal(*pair)
            if _least([float(equal)], [first.parameter])[0] and not torch.equal(_drawn(lm, first), _drawn(lm, other)):
                yield other, first


def _summaries(parameters: list[nn.Parameter]) -> list[_Summary]:
    rows = []
    for parameter in parameters:
        x = _local(parameter).detach()
        if x.numel():
            low, high = x.aminmax()
            total = x.sum(dtype=torch.float64)
            row = torch.stack([x.isfinite().all().double(), low.double(), -high.double(), total, -total])
        else:  # a shard may be empty
            row = torch.tensor([1.0, *[torch.inf] * 4], dtype=torch.float64, device=x.device)
        rows.append(row.nan_to_num(0.0))  # so that it can be compared; `finite` says it
    values = _least(torch.stack(rows).flatten().tolist(), parameters)
    table = [values[i : i + 5] for i in range(0, len(values), 5)]
    return [_Summary(bool(finite), least, -most, (low, -high)) for finite, least, most, low, high in table]


def _least(values: list[float], parameters: Sequence[Tensor]) -> list[float]:
    """The least of every value over all ranks if a parameter is sharded. What all ranks hold is not changed by that."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return values
    reduced = torch.tensor(values, dtype=torch.float64, device=_local(parameters[0]).device)
    torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MIN)
    return reduced.tolist()


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def without_gradient(lm: DecoderLM) -> list[Finding] | None:
    """Trainable parameters that a backward pass has left without a gradient, or with one that is zero everywhere; None if all of them are."""
    trainable = [(entry.name, entry.parameter) for entry in _owned(lm) if entry.parameter.requires_grad]
    local = [None if p.grad is None else _local(p.grad) for _, p in trainable]
    zero = [1.0 if grad is None else float(not bool(grad.count_nonzero())) for grad in local]
    zero = _least(zero, [parameter for _, parameter in trainable])
    if all(zero):
        return None
    missing = {name for (name, _), grad in zip(trainable, local, strict=True) if grad is None}
    words = {True: "gets no gradient at the first step", False: "its gradient at the first step is zero everywhere"}
    return [Finding(name, words[name in missing]) for (name, _), nothing in zip(trainable, zero, strict=True) if nothing]


@final
class Audit(Callback):
    """Prints the findings on a `LitLM` to stderr when training starts and behind its first backward pass.

    Raises:
        ConfigError: a parameter with which the model cannot train.
    """

    def __init__(self) -> None:
        self._pending = False
        self._all_zero = False  # whether that has been said

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lm: Any = pl_module.lm
        findings = audit(lm, fresh=trainer.ckpt_path is None and trainer.global_step == 0)
        _print(trainer, findings)
        if fatal := next((finding for finding in findings if finding.fatal), None):
            raise ConfigError(f"model: training cannot begin: {fatal}")
        self._pending = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:  # noqa: ARG002
        lm: Any = pl_module.lm
        if not self._pending:
            return
        findings = without_gradient(lm)
        if findings is not None:
            _print(trainer, findings)
            self._pending = False
        elif pl_module.targets and not self._all_zero:  # else the step has nothing to predict
            _print(trainer, [Finding("model", "its gradient is zero in every parameter: nothing is learned")])
            self._all_zero = True


def _print(trainer: Trainer, findings: list[Finding]) -> None:
    if not trainer.is_global_zero:
        return
    for finding in findings[:LISTED]:
        print(f"audit: {'error' if finding.fatal else 'warning'}: {finding}", file=sys.stderr, flush=True)
    if len(findings) > LISTED:
        print(f"audit: and {len(findings) - LISTED} more", file=sys.stderr, flush=True)
