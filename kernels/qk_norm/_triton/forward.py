"""x -> x r, r = 1 / sqrt(sum x^2 + eps), of q and k.

Shapes: R = M * H rows of SIZE channels, BS: SIZE rounded up to a power of two; q, k [M, H, SIZE] with their strides; outputs contiguous.
A program takes BR = TILE / BS rows of both.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(x, x_M, x_H, token, head, cols, mask):
    """Rows [BR, BS] in float32, 0 outside."""
    return tl.load(x + (token * x_M + head * x_H)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def reciprocal_length(x, eps):
    """r [BR, 1] of the rows x [BR, BS]."""
    return tl.rsqrt(tl.sum(x * x, 1) + eps)[:, None]


@triton.jit(do_not_specialize=["R"])
def l2_norm_forward(
    q, k, q_unit, k_unit, R, q_M, q_H, k_M, k_H, eps,
    H: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    BR: tl.constexpr = TILE // BS
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    cols = tl.arange(0, BS)
    mask = (rows < R)[:, None] & (cols < SIZE)[None, :]
    token, head = rows // H, rows % H
    q_rows = load_rows(q, q_M, q_H, token, head, cols, mask)
    k_rows = load_rows(k, k_M, k_H, token, head, cols, mask)
    at = rows[:, None] * SIZE + cols[None, :]
    tl.store(q_unit + at, (q_rows * reciprocal_length(q_rows, eps)).to(q_unit.dtype.element_ty), mask=mask)
    tl.store(k_unit + at, (k_rows * reciprocal_length(k_rows, eps)).to(k_unit.dtype.element_ty), mask=mask)
