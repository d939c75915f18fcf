"""The public function: check the arguments, choose the implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.gates import op, reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def delta_gates(
    f: Tensor,
    a: Tensor,
    delta: Tensor,
    b: Tensor | None = None,
    w: Tensor | None = None,
    *,
    b_scale: float = 1.0,
    backend: backends.Requested = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gates of `kernels.delta_rule` from the outputs of their projections.

        g = -exp(a) * softplus(f + delta),   b = b_scale * sigmoid(b),   w = sigmoid(w)

    Args:
        f: [.., H * C], floating; slices of a wider tensor are read in place.
        a: logarithm of the decay rate, [H], float32 (float64 for float64 f).
        delta: [H * C], float32 (float64 for float64 f).
        b: logits of the erase gate, [.., any width] with f's leading axes, floating; None: no such gate.
        w: logits of the write gate, likewise.
        b_scale: factor on the erase gate; 2 allows negative eigenvalues.
        backend: "auto" | "triton" | "reference"; see `kernels.backend.resolve`.

    Returns:
        The log-decay g [.., H, C], float32 (float64 for float64 f), and b and w in the dtypes and shapes of their logits; None stays None.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
        NotImplementedError: `backend="triton"` where it cannot run.
    """
    _check(f, a, delta, b, w)
    wide = any(x is not None and x.dtype == torch.float64 for x in (f, b, w))
    chosen = backends.resolve("delta_gates", backend, f.device, "its kernels take no float64" if wide else None)
    with torch.autocast(f.device.type, enabled=False):
        if chosen == "reference":
            return reference.gates(f, a, delta, b, w, b_scale)
        absent = f.new_empty((*f.shape[:-1], 0))  # to the kernels a gate that is absent has no columns
        g, b_out, w_out = op.run(f, a, delta, absent if b is None else b, absent if w is None else w, float(b_scale))
    return g, None if b is None else b_out, None if w is None else w_out


def _check(f: Tensor, a: Tensor, delta: Tensor, b: Tensor | None, w: Tensor | None) -> None:
    if f.ndim == 0 or 0 in f.shape:
        raise ValueError(f"delta_gates: f must have axes [.., H * C] of at least 1 each, got shape {list(f.shape)}")
    width = f.shape[-1]
    if a.ndim != 1 or a.shape[0] == 0 or width % a.shape[0]:
        raise ValueError(f"delta_gates: a must have shape [H] with H a divisor of f's {width} channels, got {list(a.shape)}")
    if tuple(delta.shape) != (width,):
        raise ValueError(f"delta_gates: delta must have shape [H * C = {width}], got {list(delta.shape)}")
    for name, x in (("b", b), ("w", w)):
        if x is not None and (x.ndim != f.ndim or x.shape[:-1] != f.shape[:-1] or x.shape[-1] == 0):
            raise ValueError(f"delta_gates: {name} must have f's leading axes {list(f.shape[:-1])} and channels, got shape {list(x.shape)}")
    for name, x in (("f", f), ("b", b), ("w", w)):
        if x is not None and x.dtype not in DTYPES:
            raise TypeError(f"delta_gates: {name} must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    accumulator = torch.promote_types(f.dtype, torch.float32)
    for name, x in (("a", a), ("delta", delta)):
        if x.dtype != accumulator:
            raise TypeError(f"delta_gates: {name} must be {accumulator} for {f.dtype} f, got {x.dtype}")
    for name, x in (("a", a), ("delta", delta), ("b", b), ("w", w)):
        if x is not None and x.device != f.device:
            raise ValueError(f"delta_gates: {name} is on {x.device}, f on {f.device}")
