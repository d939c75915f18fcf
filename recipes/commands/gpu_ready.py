"""What `fit` does before it trains on a GPU: says what every mixer's ops will run on, and refuses where a kernel has proved wrong."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace

from kernels import backend as backends
from lit_modules.decoder_lm import DecoderLM
from mixers import mamba_ssm, registry
from mixers.base import SequenceMixer
from mixers.errors import ConfigError
from recipes.commands import checks, verdict
from recipes.commands.checks import Result, Trial

TOKENS = 4  # of the input that a mixer is traced with
DTYPES = {"16-mixed": torch.float16, "16-true": torch.float16, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


class Call(NamedTuple):
    """What an op of a mixer resolves to."""

    op: str
    backend: str
    why: str | None  # why it is not Triton


def device_of(trainer: Namespace) -> torch.device | None:
    """The GPU that a trainer's settings lead to; None: it will not use one."""
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    first = trainer.devices[0] if isinstance(trainer.devices, list) and trainer.devices else torch.cuda.current_device() if on_gpu else 0
    return torch.device("cuda", first) if on_gpu else None


def get_ready(lm: DecoderLM, precision: str, device: torch.device) -> list[str]:
    """The lines that say which backend each mixer's ops run on.

    Raises:
        ConfigError: a kernel that the model would use is wrong on this GPU.
    """
    dtype = DTYPES.get(precision, torch.float32)
    calls = trace_all(lm, dtype, device)
    results = verdict.prove(trials(lm, calls, dtype), device, say=_progress)
    torch.cuda.empty_cache()
    refuse_wrong(results, torch.cuda.get_device_name(device))
    return name_backends(lm, calls, dtype, device)


def name_backends(lm: DecoderLM, calls: dict[str, list[Call] | None], dtype: torch.dtype, device: torch.device) -> list[str]:
    """A line for every name in the layout: its layers, and what they run on."""
    found = distinct(lm).items()
    own = {name: mixer.runs_on(device, dtype) for name, (mixer, _) in found}
    return [f"layers {', '.join(map(str, layers))} ({name}): {own[name] or describe(calls[name])}" for name, (_, layers) in found]


def distinct(lm: DecoderLM) -> dict[str, tuple[SequenceMixer[Any], list[int]]]:
    """The first layer of every name in the layout, and the indices of all of them."""
    where: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(lm.layer_names):
        where[name].append(i)
    return {name: (lm.mixers()[layers[0]], layers) for name, layers in where.items()}


def trace_all(lm: DecoderLM, dtype: torch.dtype, device: torch.device) -> dict[str, list[Call] | None]:
    """`trace` of every name in the layout."""
    return {name: trace(mixer, dtype, device) for name, (mixer, _) in distinct(lm).items()}


def trace(mixer: SequenceMixer[Any], dtype: torch.dtype, device: torch.device) -> list[Call] | None:
    """The ops that a mixer calls and what they resolve to on `device`: a copy of it, all zero, runs on a few tokens on the CPU. None if it fails."""
    choice = getattr(mixer, "kernels", None)
    on_package = isinstance(choice, mamba_ssm.Choice) and choice.resolve(device, dtype) == "mamba_ssm"
    with resolutions(device) as calls:
        try:
            stand_in = copy.deepcopy(mixer).to(dtype).to_empty(device="cpu")
            if on_package:
                stand_in.kernels = choice._replace(requested="delta")
            with torch.no_grad():
                for tensor in (*stand_in.parameters(), *stand_in.buffers()):
                    tensor.zero_()
                stand_in(torch.zeros(1, TOKENS, mixer.d_model, dtype=dtype))
        except Exception:  # a plug-in may need a GPU, or values that are not 0; its training is not refused for that
            return None
    return [Call(call.op, "mamba_ssm", None) if on_package and call.op == "delta_rule" else call for call in calls]


@contextmanager
def resolutions(device: torch.device) -> Iterator[list[Call]]:
    """Collects what ops resolve to, as if their tensors were on `device`; they run on their reference."""
    calls: list[Call] = []
    resolve = backends.resolve

    def collect(op: str, requested: str, _: torch.device, refusal: str | None = None) -> backends.Resolved:
        chosen = resolve(op, requested, device, refusal)
        call = Call(op, chosen, None if chosen == "triton" else backends.why_not(op, device) or refusal)
        if call not in calls:
            calls.append(call)
        return "reference"

    backends.resolve = collect  # type: ignore[assignment]
    try:
        yield calls
    finally:
        backends.resolve = resolve


def describe(calls: list[Call] | None) -> str:
    """The calls of a mixer in a line: the ops of each backend, with the reason where it is not Triton."""
    if calls is None:
        return "its backends show when it runs"
    groups: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        groups[f"{call.backend} ({call.why})" if call.why else call.backend].append(call.op)
    return "; ".join(f"{', '.join(ops)}: {backend}" for backend, ops in groups.items()) or "torch"


def trials(lm: DecoderLM, calls: dict[str, list[Call] | None], dtype: torch.dtype) -> list[Trial]:
    """The checks of the kernels that a model uses, in its dtype: recurrences with the model's own head sizes, other ops near them; all of them for a
    mixer that could not be traced."""
    unknown = None in calls.values()
    ops = None if unknown else {call.op for found in calls.values() for call in found or () if call.backend == "triton"}
    mixed = [mixer for name, (mixer, _) in distinct(lm).items() if calls[name]]  # attention and the like have no kernels of ours
    sizes = {size for mixer in mixed for name in ("head_dim", "v_head_dim", "d_state") if (size := getattr(mixer, name, None))}
    settings = lm.settings["mixers"]
    names = {str((settings.get(name) or {}).get("mixer", name)) for name in lm.layer_names}
    families = names & checks.MIXERS
    others = unknown or any(name not in registry.available() for name in names)
    if others:
        return checks.select(ops, [dtype])
    heads: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for name, (mixer, _) in distinct(lm).items():
        family = str((settings.get(name) or {}).get("mixer", name))
        if family in families and calls[name]:
            heads[family].add(head_sizes(mixer))
    return checks.select(ops, [dtype], sizes, families, heads)


def head_sizes(mixer: SequenceMixer[Any]) -> tuple[int, int]:
    """K and V of the heads of a recurrence that has checks of its own."""
    S = getattr(mixer.init_state(1, device="meta"), "S", None)
    return (mixer.d_state, mixer.head_dim) if S is None else (S.shape[-2], S.shape[-1])  # type: ignore[return-value]


def refuse_wrong(results: list[Result], gpu: str) -> None:
    """ConfigError if any check failed."""
    failed = [result for result in results if not result.passed]
    if failed:
        raise ConfigError(
            f"kernels: {len(failed)} of {len(results)} checks failed on {gpu}, the first is {failed[0].label}; "
            "no training starts on wrong kernels: see python -m recipes doctor"
        )


def _progress(result: Result, known: bool) -> None:
    if not known:
        print(f"checking kernels, once for each GPU and version: {result.label}: {'ok' if result.passed else 'FAILED'}", flush=True)
