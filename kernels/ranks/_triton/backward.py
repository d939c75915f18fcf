"""Gradients of o, v and z, and the sums over a program's rows that those of the parameters are made of. With u_r = o_r + D x_r v, a_r = zs_r z:

    do_r = dy * out_r * SiLU(a_r),     da_r = dy * out_r * u_r * SiLU'(a_r),     dv = sum_r D x_r do_r,     dz = sum_r zs_r da_r
    dx_r = D sum v do_r,     dzs_r = sum z da_r,     dout_r = sum dy * u_r * SiLU(a_r),     dD = sum_r x_r sum v do_r, later summed over a head

Shapes: as in `forward.py`; dy [M, H * V] with its stride of tokens; do, dv, dz contiguous; P row blocks: dD [P, H * V], dx, dzs, dout [P, H, R, V].
"""

import triton
import triton.language as tl

from kernels.ranks._triton.common import columns, load_ranks, load_weights, rank_columns, steps_of, store_ranks, zeros


@triton.jit
def store_skip(D, x, sums, dD, dx, cols, inside, R: tl.constexpr, V: tl.constexpr):
    """dD and dx from the sums of v do_r."""
    skip = tl.load(D + cols // V, mask=inside, other=0.0)
    total = tl.zeros_like(skip)
    for r in tl.static_range(R):
        at = rank_columns(cols, r, R, V)
        found = tl.sum(sums[r], 0)
        total += found * tl.load(x + at, mask=inside, other=0.0)
        tl.store(dx + at, found * skip, mask=inside)
    tl.store(dD + cols, total, mask=inside)


@triton.jit(do_not_specialize=["M", "dy_M", "o_M", "o_R", "v_M", "z_M"])
def gated_skip_backward(
    dy, o, v, z, D, x, zs, out, do, dv, dz, dD, dx, dzs, dout, M, dy_M, o_M, o_R, v_M, z_M,
    H: tl.constexpr, V: tl.constexpr, R: tl.constexpr, SCALED: tl.constexpr,
    ALIGN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = H * V
    cols, block = columns(W, BC)
    inside = cols < W
    weight = load_weights(D, x, cols, inside, R, V, SCALED)
    if SCALED:
        z_ranks = load_ranks(zs, cols, inside, R, V)
        out_ranks = load_ranks(out, cols, inside, R, V)
    sum_v, sum_z, sum_out = zeros(BR, BC, R), zeros(BR, BC, R), zeros(BR, BC, R)
    first = block * (STEPS * BR)
    for step in range(steps_of(M - first, BR, STEPS)):
        rows = (first + step * BR + tl.arange(0, BR))[:, None]
        mask = (rows < M) & inside[None, :]
        # 0 outside: adds nothing to the sums
        grad = tl.load(dy + rows * dy_M * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(v + rows * v_M * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(z + rows * z_M * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_v = tl.zeros([BR, BC], tl.float32)
        grad_z = tl.zeros([BR, BC], tl.float32)
        new_v, new_z, new_out = (), (), ()
        for r in tl.static_range(R):
            u = tl.load(o + (rows * o_M + r * o_R.to(tl.int64)) * ALIGN + cols[None, :], mask=mask, other=0.0).to(tl.float32) + weight[r] * value
            a = gate * z_ranks[r] if SCALED else gate
            s = tl.sigmoid(a)
            silu = a * s
            grad_gated = grad * out_ranks[r] if SCALED else grad
            grad_o = grad_gated * silu
            grad_a = grad_gated * u * (s + silu * (1.0 - s))
            grad_v += weight[r] * grad_o
            grad_z += grad_a * z_ranks[r] if SCALED else grad_a
            new_v += (sum_v[r] + value * grad_o,)
            if SCALED:
                new_z += (sum_z[r] + gate * grad_a,)
                new_out += (sum_out[r] + grad * (u * silu),)
            tl.store(do + (rows * R + r) * W + cols[None, :], grad_o.to(do.dtype.element_ty), mask=mask)
        sum_v = new_v
        if SCALED:
            sum_z, sum_out = new_z, new_out
        tl.store(dv + rows * W + cols[None, :], grad_v.to(dv.dtype.element_ty), mask=mask)
        tl.store(dz + rows * W + cols[None, :], grad_z.to(dz.dtype.element_ty), mask=mask)
    if SCALED:
        at = block * (W * R)
        store_skip(D, x, sum_v, dD + block * W, dx + at, cols, inside, R, V)
        store_ranks(dzs + at, sum_z, cols, inside, R, V)
        store_ranks(dout + at, sum_out, cols, inside, R, V)
    else:
        tl.store(dD + block * W + cols, tl.sum(sum_v[0], 0), mask=inside)
