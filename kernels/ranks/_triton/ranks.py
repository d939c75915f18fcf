"""The values of every rank, y_r = scale_r v, and back: dv = sum_r scale_r dy_r, dscale_r = sum over tokens of v dy_r.

Shapes: M tokens; v [M, H * V] with its stride of tokens; scale [H, R, V]; y [M, R, H * V] contiguous, dy with its strides of tokens and ranks;
dv contiguous; dscale [P, H, R, V] with P row blocks. A program takes columns and rows as in `forward.py`.
"""

import triton
import triton.language as tl

from kernels.ranks._triton.common import columns, load_ranks, steps_of, store_ranks, zeros


@triton.jit(do_not_specialize=["M", "v_M"])
def rank_values_forward(
    v, scale, y, M, v_M,
    H: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    ALIGN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    cols, block = columns(H * V, BC)
    inside = cols < H * V
    scales = load_ranks(scale, cols, inside, R, V)
    first = block * (STEPS * BR)
    for step in range(steps_of(M - first, BR, STEPS)):
        rows = (first + step * BR + tl.arange(0, BR))[:, None]
        mask = (rows < M) & inside[None, :]
        value = tl.load(v + rows * v_M * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        for r in tl.static_range(R):
            tl.store(y + (rows * R + r) * (H * V) + cols[None, :], (value * scales[r]).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "dy_M", "dy_R", "v_M"])
def rank_values_backward(
    dy, v, scale, dv, dscale, M, dy_M, dy_R, v_M,
    H: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    ALIGN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    cols, block = columns(H * V, BC)
    inside = cols < H * V
    scales = load_ranks(scale, cols, inside, R, V)
    sums = zeros(BR, BC, R)
    first = block * (STEPS * BR)
    for step in range(steps_of(M - first, BR, STEPS)):
        rows = (first + step * BR + tl.arange(0, BR))[:, None]
        mask = (rows < M) & inside[None, :]
        value = tl.load(v + rows * v_M * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_v = tl.zeros([BR, BC], tl.float32)
        new = ()
        for r in tl.static_range(R):
            grad = tl.load(dy + (rows * dy_M + r * dy_R.to(tl.int64)) * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            grad_v += grad * scales[r]
            new += (sums[r] + grad * value,)
        sums = new
        tl.store(dv + rows * (H * V) + cols[None, :], grad_v.to(dv.dtype.element_ty), mask=mask)
    store_ranks(dscale + block * (H * V * R), sums, cols, inside, R, V)
