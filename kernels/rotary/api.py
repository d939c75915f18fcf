"""The public function: check the arguments, choose the implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.rotary import op, reference
from kernels.varlen import check_cu_seqlens

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_SIZE = 256  # channels of a head
MAX_RANK = 65_535  # an axis of the grid


def rotary_keys(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    theta: Tensor,
    delta: Tensor,
    *,
    first: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    neighbours: bool = True,
    dtype: torch.dtype | None = None,
    backend: backends.Requested = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of Mamba-3: every head's and rank's bias is added to its group's channels, and pairs of the sums turn by a running angle.

        angle_t = first + sum_{s <= t} pi tanh(theta_s) delta_s,   k_t = rotate(B_t + B_bias, angle_t),   q_t = rotate(C_t + C_bias, angle_t)

    Args:
        B, C: [batch, T, R, G, K], floating, K even: ranks, and groups of heads.
        B_bias, C_bias: [H, R, K], float32 (float64 if B, C or theta is float64); H a multiple of G.
        theta: [batch, T, A], floating, A at most K / 2; the pairs behind A do not turn.
        delta: step sizes, [batch, T, H], of the biases' dtype. In the kernels turns of more than 2^21 times 2 pi have no meaning.
        first: angles before the first token, [N, H, A], of the biases' dtype; N = batch or the number of packed sequences; None: zero.
        cu_seqlens: [N+1] integer, strictly increasing from 0 to T: T holds N packed sequences, batch is 1, and nothing crosses a boundary.
        neighbours: pairs (2i, 2i+1); else (i, i + K/2).
        dtype: of q and k; None: B's.
        backend: "auto" | "triton" (K at most 256, no float64) | "reference"; see `kernels.backend.resolve`.

    Returns:
        q, k [batch, T, R, H, K] and the last angle of each sequence, [N, H, A] in [-pi, pi] in the biases' dtype. The reference sums in float64; the
        kernels in fixed point, 2^-32 of 2 pi a step, where a sum loses nothing: a turn is off by 2^-33 and by a few 2^-24 of itself, from float32.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or readable values that do not fit.
        NotImplementedError: `backend="triton"` where it cannot run.
    """
    dtype = B.dtype if dtype is None else dtype
    _check(B, C, B_bias, C_bias, theta, delta, first, cu_seqlens, dtype)
    chosen = backends.resolve("rotary_keys", backend, B.device, _refusal(B, B_bias, dtype))
    with torch.autocast(B.device.type, enabled=False):
        if chosen == "reference":
            return reference.rotary_keys(B, C, B_bias, C_bias, theta, delta, first, cu_seqlens, neighbours, dtype)
        q, k, last, *_ = op.run(B, C, B_bias, C_bias, theta, delta, first, cu_seqlens, neighbours, dtype)
    return q, k, last


def _refusal(B: Tensor, bias: Tensor, dtype: torch.dtype) -> str | None:
    if torch.float64 in (bias.dtype, dtype):
        return "its kernels take no float64"
    if B.shape[2] > MAX_RANK:
        return f"rank {B.shape[2]} is above {MAX_RANK}"
    return f"K = {B.shape[-1]} is above {MAX_SIZE}" if B.shape[-1] > MAX_SIZE else None


def _check(
    B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, theta: Tensor, delta: Tensor, first: Tensor | None, cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if B.ndim != 5 or 0 in B.shape or B.shape[-1] % 2:
        raise ValueError(f"rotary_keys: B must have axes [batch, T, R, G, K] of at least 1 each with an even K, got shape {list(B.shape)}")
    batch, tokens, rank, groups, size = B.shape
    if B_bias.ndim != 3 or B_bias.shape[0] == 0 or B_bias.shape[0] % groups or B_bias.shape[1:] != (rank, size):
        raise ValueError(f"rotary_keys: B_bias must have shape [H, {rank}, {size}] with H a multiple of G = {groups}, got {list(B_bias.shape)}")
    heads, angles = B_bias.shape[0], theta.shape[-1] if theta.ndim else 0
    if not 0 < angles <= size // 2:
        raise ValueError(f"rotary_keys: theta must have 1 to K / 2 = {size // 2} angles, got shape {list(theta.shape)}")
    sequences = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"rotary_keys: packed sequences (cu_seqlens) need a batch of 1, got {batch}")
        check_cu_seqlens(cu_seqlens, tokens, op="rotary_keys")
        sequences = cu_seqlens.numel() - 1
    shapes = {
        "C": (C, B.shape),
        "C_bias": (C_bias, B_bias.shape),
        "theta": (theta, (batch, tokens, angles)),
        "delta": (delta, (batch, tokens, heads)),
        "first": (first, (sequences, heads, angles)),
    }
    for name, (x, shape) in shapes.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"rotary_keys: {name} must have shape {list(shape)}, got {list(x.shape)}")
    for name, x in (("B", B), ("C", C), ("theta", theta)):
        if x.dtype not in DTYPES:
            raise TypeError(f"rotary_keys: {name} must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if dtype not in DTYPES:
        raise TypeError(f"rotary_keys: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    accumulator = torch.float64 if torch.float64 in (B.dtype, C.dtype, theta.dtype) else torch.float32
    for name, x in (("B_bias", B_bias), ("C_bias", C_bias), ("delta", delta), ("first", first)):
        if x is not None and x.dtype != accumulator:
            raise TypeError(f"rotary_keys: {name} must be {accumulator} for B, C and theta of these dtypes, got {x.dtype}")
    for name, x in (("C", C), ("B_bias", B_bias), ("C_bias", C_bias), ("theta", theta), ("delta", delta), ("first", first)):
        if x is not None and x.device != B.device:
            raise ValueError(f"rotary_keys: {name} is on {x.device}, B on {B.device}")
