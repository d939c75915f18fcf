"""Pairs of channels: (2i, 2i+1) if NEIGHBOURS, else (i, i + K/2).

Shapes: HB rows, BP pairs from the pair P0 up to P1.
"""

import triton
import triton.language as tl


@triton.jit
def load_pairs(
    x, rows, inside, P0: tl.constexpr, P1: tl.constexpr, BP: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Both channels [HB, BP] of the rows that begin at x + rows [HB], in float32, 0 outside. A thread reads VECTOR channels of a row at most."""
    if NEIGHBOURS:
        cols = 2 * P0 + tl.arange(0, 2 * BP)
        at = tl.max_contiguous(rows[:, None] + cols[None, :], [1, min(VECTOR, 2 * BP)])
        both = tl.load(x + at, mask=inside[:, None] & (cols < 2 * P1)[None, :], other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BP, 2)))
    else:
        cols = P0 + tl.arange(0, BP)
        at = rows[:, None] + cols[None, :]
        if BP > 1:  # on a sum that folds to a scalar the compiler stumbles over the hint
            at = tl.max_contiguous(at, [1, min(VECTOR, BP)])
        mask = inside[:, None] & (cols < P1)[None, :]
        first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + at + K // 2, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    y, rows, inside, first, second, P0: tl.constexpr, P1: tl.constexpr, BP: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """[HB, BP] each, to the rows that begin at y + rows [HB]."""
    dtype = y.dtype.element_ty
    if NEIGHBOURS:
        cols = 2 * P0 + tl.arange(0, 2 * BP)
        both = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (first.shape[0], 2 * BP))
        tl.store(y + rows[:, None] + cols[None, :], both, mask=inside[:, None] & (cols < 2 * P1)[None, :])
    else:
        cols = P0 + tl.arange(0, BP)
        mask = inside[:, None] & (cols < P1)[None, :]
        tl.store(y + rows[:, None] + cols[None, :], first.to(dtype), mask=mask)
        tl.store(y + rows[:, None] + (cols + K // 2)[None, :], second.to(dtype), mask=mask)
