"""Where a program works, and how it reads what belongs to a column.

Shapes: M tokens, W = H * V columns; parameters of ranks [H, R, V], of heads [H].
"""

import triton
import triton.language as tl


@triton.jit
def columns(width, BC: tl.constexpr):
    """The program's columns [BC], and its row block: neighbours share rows, so that whole rows are read at a time."""
    blocks = tl.cdiv(width, BC)
    program = tl.program_id(0).to(tl.int64)
    return (program % blocks).to(tl.int32) * BC + tl.arange(0, BC), program // blocks


@triton.jit
def steps_of(rows, BR: tl.constexpr, STEPS: tl.constexpr):
    """How many times BR rows a program takes that has `rows` before it."""
    return tl.minimum(tl.cdiv(rows, BR), STEPS).to(tl.int32)


@triton.jit
def rank_columns(cols, r, R: tl.constexpr, V: tl.constexpr):
    """Where rank r of the columns lies in [H, R, V]."""
    return cols + (cols // V) * ((R - 1) * V) + r * V


@triton.jit
def load_ranks(x, cols, inside, R: tl.constexpr, V: tl.constexpr):
    """x [H, R, V] of the columns: R rows [1, BC]."""
    rows = ()
    for r in tl.static_range(R):
        rows += (tl.load(x + rank_columns(cols, r, R, V), mask=inside, other=0.0)[None, :],)
    return rows


@triton.jit
def load_weights(D, x, cols, inside, R: tl.constexpr, V: tl.constexpr, SCALED: tl.constexpr):
    """What the columns' values weigh in each rank, D x_r: R rows [1, BC]."""
    skip = tl.load(D + cols // V, mask=inside, other=0.0)[None, :]
    rows = ()
    for r in tl.static_range(R):
        if SCALED:
            rows += (skip * tl.load(x + rank_columns(cols, r, R, V), mask=inside, other=0.0)[None, :],)
    return rows if SCALED else (skip,)


@triton.jit
def zeros(BR: tl.constexpr, BC: tl.constexpr, R: tl.constexpr):
    """R sums [BR, BC]."""
    rows = ()
    for _ in tl.static_range(R):
        rows += (tl.zeros([BR, BC], tl.float32),)
    return rows


@triton.jit
def store_ranks(x, rows, cols, inside, R: tl.constexpr, V: tl.constexpr):
    """The sums over their rows of R tensors [BR, BC] into x [H, R, V]."""
    for r in tl.static_range(R):
        tl.store(x + rank_columns(cols, r, R, V), tl.sum(rows[r], 0), mask=inside)
