"""Gradients of q and k. With y = x r, r = 1 / sqrt(sum x^2 + eps):

    dx = r (dy - y sum(dy * y))

Shapes: as in `forward.py`; dq_unit, dk_unit [M, H, SIZE] with their strides; dq, dk contiguous.
"""

import triton
import triton.language as tl

from kernels.qk_norm._triton.forward import load_rows, reciprocal_length


@triton.jit
def through_norm(dy, x, eps):
    """dx [BR, BS] from dy and x."""
    r = reciprocal_length(x, eps)
    y = x * r
    return r * (dy - y * tl.sum(dy * y, 1)[:, None])


@triton.jit(do_not_specialize=["R"])
def l2_norm_backward(
    dq_unit, dk_unit, q, k, dq, dk, R, dq_unit_M, dq_unit_H, dk_unit_M, dk_unit_H, q_M, q_H, k_M, k_H, eps,
    H: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    BR: tl.constexpr = TILE // BS
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    cols = tl.arange(0, BS)
    mask = (rows < R)[:, None] & (cols < SIZE)[None, :]
    token, head = rows // H, rows % H
    q_grad = load_rows(dq_unit, dq_unit_M, dq_unit_H, token, head, cols, mask)
    k_grad = load_rows(dk_unit, dk_unit_M, dk_unit_H, token, head, cols, mask)
    q_rows = load_rows(q, q_M, q_H, token, head, cols, mask)
    k_rows = load_rows(k, k_M, k_H, token, head, cols, mask)
    at = rows[:, None] * SIZE + cols[None, :]
    tl.store(dq + at, through_norm(q_grad, q_rows, eps).to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + at, through_norm(k_grad, k_rows, eps).to(dk.dtype.element_ty), mask=mask)
