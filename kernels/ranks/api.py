"""The public functions: check the arguments, choose the implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.ranks import op, reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_RANKS = 16  # a program holds every rank's sums
SCALES = ("v_scale", "z_scale", "out_scale")


def gated_skip(
    o: Tensor,
    v: Tensor,
    z: Tensor,
    D: Tensor,
    v_scale: Tensor | None = None,
    z_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    *,
    backend: backends.Requested = "auto",
) -> Tensor:
    """What a Mamba-3 layer does to the outputs o of its recurrence: a skip connection from the values, a gate, a sum over the R ranks.

        y = sum_r out_scale_r * (o_r + D * v_scale_r * v) * SiLU(z_scale_r * z)

    Args:
        o: [.., R, H, V], floating, whatever v's dtype.
        v: values, [.., H, V], floating; column slices of a projection are read in place.
        z: the gate before SiLU, v's shape, floating; likewise.
        D: a number a head, [H], float32 (float64 for float64 v).
        v_scale, z_scale, out_scale: [H, R, V], D's dtype; all three, or with R = 1 none, as if they were 1.
        backend: "auto" | "triton" (at most 16 ranks) | "reference"; see `kernels.backend.resolve`.

    Returns:
        y, v's shape and dtype; computed in at least float32 and rounded once.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
        NotImplementedError: `backend="triton"` where it cannot run.
    """
    given = {name: x for name, x in zip(SCALES, (v_scale, z_scale, out_scale), strict=True) if x is not None}
    _check_values("gated_skip", v)
    if o.ndim != v.ndim + 1 or o.shape[:-3] + o.shape[-2:] != v.shape or o.shape[-3] == 0:
        raise ValueError(f"gated_skip: o must have v's axes {list(v.shape)} with ranks before the last two, got shape {list(o.shape)}")
    if z.shape != v.shape:
        raise ValueError(f"gated_skip: z must have v's shape {list(v.shape)}, got {list(z.shape)}")
    if len(given) not in (0, 3) or not (given or o.shape[-3] == 1):
        raise ValueError(f"gated_skip: {', '.join(SCALES)} go together, and only one rank has none; got {len(given)} for {o.shape[-3]} ranks")
    _check_floating("gated_skip", v, o=o, z=z)
    _check_parameters("gated_skip", v, v.shape[-2:-1], D=D)
    _check_parameters("gated_skip", v, torch.Size((v.shape[-2], o.shape[-3], v.shape[-1])), **given)
    chosen = backends.resolve("gated_skip", backend, v.device, _refusal(o.shape[-3], o, v, z))
    with torch.autocast(v.device.type, enabled=False):
        scales = tuple(given.values())
        if chosen == "reference":
            return reference.gated_skip(o, v, z, D, scales)
        y: Tensor = op.run(o, v, z, D, *(scales or [D.new_empty(0)] * 3))
    return y


def rank_values(v: Tensor, scale: Tensor, *, backend: backends.Requested = "auto") -> Tensor:
    """The values of every rank of a Mamba-3 layer: y_r = scale_r * v.

    Args:
        v: [.., H, V], floating; column slices of a projection are read in place.
        scale: [H, R, V], float32 (float64 for float64 v).
        backend: "auto" | "triton" (at most 16 ranks) | "reference"; see `kernels.backend.resolve`.

    Returns:
        y [.., R, H, V], contiguous, in v's dtype; rounded once.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
        NotImplementedError: `backend="triton"` where it cannot run.
    """
    _check_values("rank_values", v)
    ranks = scale.shape[1] if scale.ndim == 3 else 0
    _check_parameters("rank_values", v, torch.Size((v.shape[-2], max(ranks, 1), v.shape[-1])), scale=scale)
    chosen = backends.resolve("rank_values", backend, v.device, _refusal(ranks, v))
    with torch.autocast(v.device.type, enabled=False):
        if chosen == "reference":
            return reference.rank_values(v, scale)
        y: Tensor = op.run_rank_values(v, scale)
    return y


def _refusal(ranks: int, *tensors: Tensor) -> str | None:
    if any(x.dtype == torch.float64 for x in tensors):
        return "its kernels take no float64"
    return f"{ranks} ranks are above {MAX_RANKS}" if ranks > MAX_RANKS else None


def _check_values(op: str, v: Tensor) -> None:
    if v.ndim < 2 or 0 in v.shape:
        raise ValueError(f"{op}: v must have axes [.., H, V] of at least 1 each, got shape {list(v.shape)}")
    _check_floating(op, v, v=v)


def _check_floating(op: str, v: Tensor, /, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
        if x.device != v.device:
            raise ValueError(f"{op}: {name} is on {x.device}, v on {v.device}")


def _check_parameters(op: str, v: Tensor, shape: torch.Size, /, **tensors: Tensor) -> None:
    accumulator = torch.promote_types(v.dtype, torch.float32)
    for name, x in tensors.items():
        if x.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(x.shape)}")
        if x.dtype != accumulator:
            raise TypeError(f"{op}: {name} must be {accumulator} for {v.dtype} v, got {x.dtype}")
        if x.device != v.device:
            raise ValueError(f"{op}: {name} is on {x.device}, v on {v.device}")
