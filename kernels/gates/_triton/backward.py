"""Gradients of f, b, w, and the sums over a program's rows that the gradients of a and delta are made of, from g and from the logits b and w.

Shapes: M tokens; dg [M, F], db, b [M, NB], dw, w [M, NW] with their row strides; g [M, F], df, db_in, dw_in contiguous; a [F/C];
partial [P, 2, F] with P row blocks: the sums of df, and of dg * g, whose sum over a head is da. A program takes rows and columns as in `forward.py`.
"""

import triton
import triton.language as tl

from kernels.gates._triton.softplus import sigmoid_of_softplus


@triton.jit
def sigmoid_columns(
    dy, x, dx, scale, M, dy_stride, stride, width, row_block, block,
    ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dy * scale * s (1 - s), s = sigmoid(x), for a block of columns."""
    cols = block * BC + tl.arange(0, BC)
    first = row_block * ROWS + tl.arange(0, BR)
    for step in tl.range(0, ROWS, BR, num_stages=STAGES):
        rows = first + step
        mask = (rows < M)[:, None] & (cols < width)[None, :]
        grad = tl.load(dy + rows[:, None] * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(tl.load(x + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32))
        tl.store(dx + rows[:, None] * width + cols[None, :], (grad * scale * (s * (1.0 - s))).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def decay_columns(
    dg, g, a, df, partial, M, dg_stride, width, row_block, block,
    C: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """df and the two partial sums for a block of columns."""
    cols = block * BC + tl.arange(0, BC)
    inside = cols < width
    rate = -tl.exp(tl.load(a + cols // C, mask=inside, other=0.0))
    per_rate = 1.0 / tl.where(rate < -1e-37, rate, float("-inf"))  # a rate too small for a reciprocal has gradients too small for a number
    first = row_block * ROWS + tl.arange(0, BR)
    sum_df = tl.zeros([BR, BC], tl.float32)
    sum_dg_g = tl.zeros([BR, BC], tl.float32)
    for step in tl.range(0, ROWS, BR, num_stages=STAGES):
        rows = first + step
        mask = (rows < M)[:, None] & inside[None, :]
        grad = tl.load(dg + rows[:, None] * dg_stride + cols[None, :], mask=mask, other=0.0)  # 0 outside: adds nothing to the sums
        decay = tl.load(g + rows[:, None] * width + cols[None, :], mask=mask, other=0.0)
        grad_x = grad * (rate[None, :] * sigmoid_of_softplus(decay * per_rate[None, :]))
        sum_df += grad_x
        sum_dg_g += grad * decay
        tl.store(df + rows[:, None] * width + cols[None, :], grad_x.to(df.dtype.element_ty), mask=mask)
    out = partial + row_block * (2 * width) + cols
    tl.store(out, tl.sum(sum_df, 0), mask=inside)
    tl.store(out + width, tl.sum(sum_dg_g, 0), mask=inside)


@triton.jit(do_not_specialize=["M"])
def gates_backward(
    dg, db, dw, g, a, b, w, df, db_in, dw_in, partial, M,
    dg_stride, db_stride, dw_stride, b_stride, w_stride, F, NB, NW, b_scale,
    C: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    f_blocks, b_blocks = tl.cdiv(F, BC), tl.cdiv(NB, BC)
    column_blocks = f_blocks + b_blocks + tl.cdiv(NW, BC)
    row_block, block = (tl.program_id(0) // column_blocks).to(tl.int64), tl.program_id(0) % column_blocks  # neighbours read the same rows
    if block < f_blocks:
        decay_columns(dg, g, a, df, partial, M, dg_stride, F, row_block, block, C, ROWS, BR, BC, STAGES)
    elif block < f_blocks + b_blocks:
        sigmoid_columns(db, b, db_in, b_scale, M, db_stride, b_stride, NB, row_block, block - f_blocks, ROWS, BR, BC, STAGES)
    else:
        sigmoid_columns(dw, w, dw_in, 1.0, M, dw_stride, w_stride, NW, row_block, block - f_blocks - b_blocks, ROWS, BR, BC, STAGES)
