"""y = sum_r out_r * (o_r + D x_r v) * SiLU(zs_r z); without ranks' scales (SCALED false) R = 1 and they are 1.

Shapes: M tokens; o [M, R, H * V] with strides of tokens and ranks, v, z [M, H * V] with strides of tokens; D [H]; x, zs, out [H, R, V]; y contiguous.
Strides come divided by ALIGN. A program takes BC columns and STEPS times BR rows.
"""

import triton
import triton.language as tl

from kernels.ranks._triton.common import columns, load_ranks, load_weights, steps_of


@triton.jit(do_not_specialize=["M", "o_M", "o_R", "v_M", "z_M"])
def gated_skip_forward(
    o, v, z, D, x, zs, out, y, M, o_M, o_R, v_M, z_M,
    H: tl.constexpr, V: tl.constexpr, R: tl.constexpr, SCALED: tl.constexpr,
    ALIGN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    cols, block = columns(H * V, BC)
    inside = cols < H * V
    weight = load_weights(D, x, cols, inside, R, V, SCALED)
    if SCALED:
        z_ranks = load_ranks(zs, cols, inside, R, V)
        out_ranks = load_ranks(out, cols, inside, R, V)
    first = block * (STEPS * BR)
    for step in range(steps_of(M - first, BR, STEPS)):
        rows = (first + step * BR + tl.arange(0, BR))[:, None]
        mask = (rows < M) & inside[None, :]
        value = tl.load(v + rows * v_M * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(z + rows * z_M * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BR, BC], tl.float32)
        for r in tl.static_range(R):
            read = tl.load(o + (rows * o_M + r * o_R.to(tl.int64)) * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            a = gate * z_ranks[r] if SCALED else gate
            gated = (read + weight[r] * value) * (a * tl.sigmoid(a))
            total += gated * out_ranks[r] if SCALED else gated
        tl.store(y + rows * (H * V) + cols[None, :], total.to(y.dtype.element_ty), mask=mask)
