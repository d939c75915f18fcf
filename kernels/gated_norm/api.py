"""The public function: check the arguments, choose the implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.gated_norm import op, reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_SIZE = 8192  # a program holds whole rows


def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, *, backend: backends.Requested = "auto") -> Tensor:
    """RMSNorm over the last axis, times SiLU of a gate where there is one.

        y = x / sqrt(mean(x^2) + eps) * weight * gate * sigmoid(gate)

    Args:
        x: [.., size], floating; slices of a wider tensor are read in place.
        gate: x's shape, floating; likewise. None: 1 in place of its SiLU; then no square of a large entry overflows.
        weight: [size], floating.
        eps: added to the mean of the squares.
        backend: "auto" | "triton" (size at most 8192) | "reference"; see `kernels.backend.resolve`.

    Returns:
        y, x's shape and dtype; computed in float32 (float64 if any input is) and rounded once.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
        NotImplementedError: `backend="triton"` where it cannot run.
    """
    _check(x, gate, weight)
    chosen = backends.resolve("gated_rms_norm", backend, x.device, _refusal(x, gate, weight))
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "reference":
            return reference.gated_rms_norm(x, gate, weight, eps)
        y: Tensor = op.run(x, gate, weight, float(eps))
    return y


def _refusal(x: Tensor, gate: Tensor | None, weight: Tensor) -> str | None:
    if torch.float64 in (x.dtype, x.dtype if gate is None else gate.dtype, weight.dtype):
        return "its kernels take no float64"
    return f"size {x.shape[-1]} is above {MAX_SIZE}" if x.shape[-1] > MAX_SIZE else None


def _check(x: Tensor, gate: Tensor | None, weight: Tensor) -> None:
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"gated_rms_norm: x must have axes [.., size] of at least 1 each, got shape {list(x.shape)}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate must have x's shape {list(x.shape)}, got {list(gate.shape)}")
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"gated_rms_norm: weight must have shape [size = {x.shape[-1]}], got {list(weight.shape)}")
    for name, t in (("x", x), ("gate", gate), ("weight", weight)):
        if t is None:
            continue
        if t.dtype not in DTYPES:
            raise TypeError(f"gated_rms_norm: {name} must be one of {', '.join(map(str, DTYPES))}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"gated_rms_norm: {name} is on {t.device}, x on {x.device}")
