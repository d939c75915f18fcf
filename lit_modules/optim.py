"""The optimizer: which parameters decay, the learning rate by tokens, and gradients of a mean over all tokens of a step."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lit_modules.decoder_lm import DecoderLM
from mixers.errors import ConfigError


def cosine_lr(tokens: float, *, peak: float, warmup_tokens: int, max_tokens: int, final_ratio: float) -> float:
    """The learning rate after `tokens` tokens: linear from 0 to `peak`, then half a cosine to `final_ratio * peak`, where it stays."""
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    span = max_tokens - warmup_tokens
    done = min(tokens - warmup_tokens, span) / span if span else 0.0
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


class Group(NamedTuple):
    """Parameters that are updated alike."""

    name: str  # "decay" or "no decay"
    weight_decay: float
    parameters: list[tuple[str, nn.Parameter]]  # with their names in the model


def optimizer_groups(lm: DecoderLM, weight_decay: float) -> list[Group]:
    """The trainable parameters of `lm`, each in exactly one group, by the roles that its mixers declare. Empty groups are left out.

    Raises:
        TypeError: a mixer declares a parameter that it does not have, or one declared float32 is stored in less.
    """
    roles = lm.parameter_groups()
    parameters = dict(lm.named_parameters())
    if missing := sorted((roles.no_decay | roles.fp32) - parameters.keys()):
        raise TypeError(f"{missing[0]}: is in parameter_groups() but is no parameter of the model")
    for name in sorted(roles.fp32):
        if parameters[name].dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: is declared float32 but stored in {_short(parameters[name].dtype)}")
    trainable = [(name, parameter) for name, parameter in parameters.items() if parameter.requires_grad]
    no_decay = roles.no_decay | roles.fp32
    groups = [
        Group("decay", weight_decay, [(name, p) for name, p in trainable if name not in no_decay]),
        Group("no decay", 0.0, [(name, p) for name, p in trainable if name in no_decay]),
    ]
    return [group for group in groups if group.parameters]


def build_adamw(groups: Sequence[Group], *, lr: float, betas: tuple[float, float], fused: bool) -> torch.optim.AdamW:
    """AdamW over the groups. `fused` is taken up where all parameters are on CUDA."""
    fused = fused and all(parameter.is_cuda for group in groups for _, parameter in group.parameters)
    settings = [{"params": [p for _, p in group.parameters], "weight_decay": group.weight_decay} for group in groups]
    return torch.optim.AdamW(settings, lr=lr, betas=betas, fused=fused or None)


class GroupRow(NamedTuple):
    """One line of the table of groups."""

    group: str
    weight_decay: float
    parameters: int  # numbers
    tensors: int
    dtypes: str  # e.g. "bfloat16, float32"
    names: list[str]  # distinct names, layer numbers replaced by *


def describe_groups(groups: Iterable[Group]) -> list[GroupRow]:
    """A row for each group."""
    rows = []
    for group in groups:
        tensors = [parameter for _, parameter in group.parameters]
        dtypes = sorted({_short(t.dtype) for t in tensors})
        names = dict.fromkeys(re.sub(r"\d+", "*", name) for name, _ in group.parameters)
        rows.append(GroupRow(group.name, group.weight_decay, sum(t.numel() for t in tensors), len(tensors), ", ".join(dtypes), list(names)))
    return rows


def group_table(rows: Sequence[GroupRow], *, max_names: int = 6) -> Table:
    """The rows as a table to print, with up to `max_names` names a row, shortened so that it fits 80 columns."""
    table = Table(title="Optimizer groups", title_justify="left")
    for column in ("group", "decay", "parameters", "tensors", "dtype", "names"):
        numeric = column in ("decay", "parameters", "tensors")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        short = [name.removeprefix("layers.").removesuffix(".weight") for name in row.names]
        names = [*short[:max_names], *([f"and {len(short) - max_names} more"] if len(short) > max_names else [])]
        table.add_row(row.group, f"{row.weight_decay:g}", f"{row.parameters:,}", f"{row.tensors:,}", row.dtypes, "\n".join(names))
    return table


def scale_and_clip(parameters: Iterable[nn.Parameter], factor: float, *, max_norm: float | None = None, max_value: float | None = None) -> float:
    """Multiply all gradients by `factor`, then clip them, in place.

    One pass where plain scaling and `clip_grad_norm_` take two.

    Args:
        parameters: those without a gradient are skipped.
        factor: for the whole gradient, > 0.
        max_norm: bound on the norm of all gradients together; None or 0: no bound.
        max_value: bound on the size of each entry; None or 0: no bound.

    Returns:
        The norm behind scaling and before clipping. If it is not finite, the gradients are left as they were.

    Raises:
        ConfigError: a bound below 0, which would turn the gradients around.
    """
    if not (max_norm or 0) >= 0 or not (max_value or 0) >= 0:
        raise ConfigError(f"trainer.gradient_clip_val: must be >= 0, got {max_norm if max_value is None else max_value}")
    grads = _by_mesh(p.grad for p in parameters if p.grad is not None)
    norm = factor * _total_norm(grads)
    if not math.isfinite(norm):
        return norm
    if max_norm:
        factor *= min(1.0, max_norm / (norm + 1e-6))
    for group in grads:
        if factor != 1.0:
            torch._foreach_mul_(group, factor)
        if max_value:
            torch._foreach_clamp_min_(group, -max_value)
            torch._foreach_clamp_max_(group, max_value)
    return norm


def _by_mesh(grads: Iterable[Tensor]) -> list[list[Tensor]]:
    """Sharded and plain tensors apart, and by dtype: no operation takes both."""
    groups: dict[object, list[Tensor]] = defaultdict(list)
    for grad in grads:
        groups[(grad.device_mesh if isinstance(grad, DTensor) else None, grad.dtype)].append(grad)
    return list(groups.values())


def _total_norm(grads: Sequence[list[Tensor]]) -> float:
    norms = [get_total_norm(group) for group in grads]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return math.hypot(*torch.stack([norm.double() for norm in whole]).tolist()) if whole else 0.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
