"""g = -exp(a) softplus(f + delta), b_scale sigmoid(b), sigmoid(w): one launch, a program works on columns of one of the three.

Shapes: M tokens; f [M, F], b [M, NB], w [M, NW] with their row strides; a [F/C], delta [F]; g [M, F], b_out, w_out contiguous.
A program takes ROWS rows of BC columns, BR rows at a time.
"""

import triton
import triton.language as tl

from kernels.gates._triton.softplus import softplus


@triton.jit
def sigmoid_columns(x, y, scale, M, stride, width, row_block, block, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """y = scale * sigmoid(x) for a block of columns."""
    cols = block * BC + tl.arange(0, BC)
    first = row_block * ROWS + tl.arange(0, BR)
    for step in range(0, ROWS, BR):
        rows = first + step
        mask = (rows < M)[:, None] & (cols < width)[None, :]
        logits = tl.load(x + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + rows[:, None] * width + cols[None, :], (scale * tl.sigmoid(logits)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def decay_columns(f, a, delta, g, M, stride, width, row_block, block, C: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """g for a block of columns."""
    cols = block * BC + tl.arange(0, BC)
    inside = cols < width
    rate = -tl.exp(tl.load(a + cols // C, mask=inside, other=0.0))
    offset = tl.load(delta + cols, mask=inside, other=0.0)
    first = row_block * ROWS + tl.arange(0, BR)
    for step in range(0, ROWS, BR):
        rows = first + step
        mask = (rows < M)[:, None] & inside[None, :]
        x = tl.load(f + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32) + offset[None, :]
        tl.store(g + rows[:, None] * width + cols[None, :], rate[None, :] * softplus(x), mask=mask)


@triton.jit(do_not_specialize=["M"])
def gates_forward(
    f, a, delta, b, w, g, b_out, w_out, M,
    f_stride, b_stride, w_stride, F, NB, NW, b_scale,
    C: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    f_blocks, b_blocks = tl.cdiv(F, BC), tl.cdiv(NB, BC)
    column_blocks = f_blocks + b_blocks + tl.cdiv(NW, BC)
    row_block, block = (tl.program_id(0) // column_blocks).to(tl.int64), tl.program_id(0) % column_blocks  # neighbours read the same rows
    if block < f_blocks:
        decay_columns(f, a, delta, g, M, f_stride, F, row_block, block, C, ROWS, BR, BC)
    elif block < f_blocks + b_blocks:
        sigmoid_columns(b, b_out, b_scale, M, b_stride, NB, row_block, block - f_blocks, ROWS, BR, BC)
    else:
        sigmoid_columns(w, w_out, 1.0, M, w_stride, NW, row_block, block - f_blocks - b_blocks, ROWS, BR, BC)
