"""g = -exp(a) softplus(f + delta), b_scale sigmoid(b), sigmoid(w): one launch, a program works on columns of one of the three.

Shapes: M tokens; f [M, F], b [M, NB], w [M, NW] with their row strides; a [F/C], delta [F]; g [M, F], b_out, w_out contiguous.
A program takes max(ROWS, BR) rows of BC columns, BR = TILE / BC rows at a time.
"""

import triton
import triton.language as tl

from kernels.gates._triton.softplus import softplus


@triton.jit
def sigmoid_columns(x, y, scale, M, stride, width, block, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """y = scale * sigmoid(x) for column block `block`."""
    cols = block * BC + tl.arange(0, BC)
    first = tl.program_id(0).to(tl.int64) * max(ROWS, BR) + tl.arange(0, BR)
    for step in range(0, ROWS, BR):
        rows = first + step
        mask = (rows < M)[:, None] & (cols < width)[None, :]
        logits = tl.load(x + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + rows[:, None] * width + cols[None, :], (scale * tl.sigmoid(logits)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def decay_columns(f, a, delta, g, M, stride, width, block, C: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """g for column block `block`."""
    cols = block * BC + tl.arange(0, BC)
    inside = cols < width
    rate = -tl.exp(tl.load(a + cols // C, mask=inside, other=0.0))
    offset = tl.load(delta + cols, mask=inside, other=0.0)
    first = tl.program_id(0).to(tl.int64) * max(ROWS, BR) + tl.arange(0, BR)
    for step in range(0, ROWS, BR):
        rows = first + step
        mask = (rows < M)[:, None] & inside[None, :]
        x = tl.load(f + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32) + offset[None, :]
        tl.store(g + rows[:, None] * width + cols[None, :], rate[None, :] * softplus(x), mask=mask)


@triton.jit(do_not_specialize=["M"])
def gates_forward(
    f, a, delta, b, w, g, b_out, w_out, M,
    f_stride, b_stride, w_stride, F, NB, NW, b_scale,
    C: tl.constexpr, BC: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    BR: tl.constexpr = TILE // BC
    block = tl.program_id(1)
    f_blocks, b_blocks = tl.cdiv(F, BC), tl.cdiv(NB, BC)
    if block < f_blocks:
        decay_columns(f, a, delta, g, M, f_stride, F, block, C, ROWS, BR, BC)
    elif block < f_blocks + b_blocks:
        sigmoid_columns(b, b_out, b_scale, M, b_stride, NB, block - f_blocks, ROWS, BR, BC)
    else:
        sigmoid_columns(w, w_out, 1.0, M, w_stride, NW, block - f_blocks - b_blocks, ROWS, BR, BC)
