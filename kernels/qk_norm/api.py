"""The public function: check the arguments, choose the implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.qk_norm import op, reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_SIZE = 1024  # a program holds whole rows


def l2_norm(q: Tensor, k: Tensor, *, backend: backends.Requested = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys for the delta rule: each head divided by its length, as `causal_conv1d` does it behind the convolution.

        x -> x / sqrt(sum(x^2) + 1e-6)

    Args:
        q: [.., size], floating; slices of a wider tensor are read in place.
        k: q's shape, floating; likewise.
        backend: "auto" | "triton" (size at most 1024; one launch for both) | "reference"; see `kernels.backend.resolve`.

    Returns:
        q and k of length 1, each in its tensor's shape and dtype; computed in at least float32 and rounded once.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
        NotImplementedError: `backend="triton"` where it cannot run.
    """
    _check(q, k)
    chosen = backends.resolve("l2_norm", backend, q.device, _refusal(q, k))
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            return reference.l2_norm(q, k)
        q_unit, k_unit = op.run(q, k)
    return q_unit, k_unit


def _refusal(q: Tensor, k: Tensor) -> str | None:
    if torch.float64 in (q.dtype, k.dtype):
        return "its kernels take no float64"
    return f"size {q.shape[-1]} is above {MAX_SIZE}" if q.shape[-1] > MAX_SIZE else None


def _check(q: Tensor, k: Tensor) -> None:
    if q.ndim == 0 or 0 in q.shape:
        raise ValueError(f"l2_norm: q must have axes [.., size] of at least 1 each, got shape {list(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"l2_norm: k must have q's shape {list(q.shape)}, got {list(k.shape)}")
    if k.device != q.device:
        raise ValueError(f"l2_norm: k is on {k.device}, q on {q.device}")
    for name, x in (("q", q), ("k", k)):
        if x.dtype not in DTYPES:
            raise TypeError(f"l2_norm: {name} must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
