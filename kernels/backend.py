"""The only place that decides which implementation of an op runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Requested = Literal["auto", "triton", "reference"]
Resolved = Literal["triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(Requested)

# Ops that have Triton kernels. An op that is missing here runs on its plain-torch reference on every device.
TRITON_OPS: frozenset[str] = frozenset(
    {
        "causal_conv1d",
        "causal_conv1d_step",
        "delta_gates",
        "delta_rule",
        "delta_rule_step",
        "gated_rms_norm",
        "gated_skip",
        "l2_norm",
        "rank_values",
        "rotary_keys",
    }
)
HAS_TRITON = find_spec("triton") is not None


def resolve(op: str, requested: str, device: torch.device, refusal: str | None = None) -> Resolved:
    """The implementation that `op` uses for tensors on `device`.

    `refusal` says why the op's kernels cannot take these arguments (a dtype, a size), None if they can. "auto" then means the reference.

    Raises:
        ValueError: `requested` is not one of "auto", "triton", "reference".
        RefusedError: "triton" was asked for by name and cannot run there.
    """
    if requested not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "reference":
        return "reference"
    why = why_not(op, device) or refusal
    if requested == "auto":
        return "reference" if why or (device.type == "cpu" and not _as_on_gpu) else "triton"
    if why:
        raise RefusedError(f"{op}: backend='triton' cannot run: {why}; use backend='auto' or 'reference'")
    return "triton"


class RefusedError(NotImplementedError):
    """The kernels cannot take these arguments. torch raises its base class too, for what it lacks itself."""


def why_not(op: str, device: torch.device) -> str | None:
    """Why `op` has no kernel for `device` whatever its arguments; None if it has."""
    if op not in TRITON_OPS:
        return "this version has no Triton kernel for it"
    if _as_on_gpu:
        return None
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"tensors are on {device.type}"
    return None if HAS_TRITON else "Triton is not installed (pip install triton)"


_as_on_gpu = False


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, ops resolve as for a GPU: for tensors that hold nothing (`FakeTensorMode`), of which only sizes are asked."""
    global _as_on_gpu
    _as_on_gpu, before = True, _as_on_gpu
    try:
        yield
    finally:
        _as_on_gpu = before


_interpreted: bool | None = None


def interpreted() -> bool:
    """Whether Triton was loaded as an interpreter, which runs the same kernels on the CPU: for tests, and only ever by the name "triton"."""
    global _interpreted  # asked once: the answer stays, and a compiler cannot trace the question
    triton = sys.modules.get("triton")
    if _interpreted is None and triton is not None:
        _interpreted = bool(triton.knobs.runtime.interpret)
    return bool(_interpreted)
