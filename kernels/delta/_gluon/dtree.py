"""The tree of README.md, section 3, backwards (4.6): gradients of the rows of a chunk through its scores, for a decay per channel.

Everything stays in the layout M of the products' results; operands go to shared memory. Shapes: C = 64 rows a chunk, BK channels a program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.delta._gluon.shared import barrier, shared_row, shared_tile, sums_from_the_start


@gluon.jit
def decay(G, sums, h: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, M: gl.constexpr):
    """x(r, a) of upper and x(a, s) of lower rows [C, BK], a the last row of the lower half of a block of 2h; G in registers and in `sums`."""
    blocks = gl.reshape(G, [C // (2 * h), 2 * h, BK])
    layout: gl.constexpr = blocks.type.layout
    anchor = sums.reshape([C // (2 * h), 2 * h, BK]).slice(h - 1, 1, dim=1).load(layout)
    x = gl.exp2(-gl.abs(blocks - anchor))
    return gl.convert_layout(gl.reshape(x, [C, BK]), M, assert_trivial=True)


@gluon.jit
def cut(to, d, level: gl.constexpr):
    """The entries of d [C, C], zero above the diagonal, whose rows part from their columns at `level`: two columns at a time."""
    C: gl.constexpr = d.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    r = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(1, layout)), 1)
    pair = gl.expand_dims(gl.arange(0, C // 2, layout=gl.SliceLayout(0, layout)), 0)
    x = d._reinterpret(gl.int32, [C, C // 2], words).load(layout)
    if level == 0:
        x = gl.where(((r >> 1) == pair) & ((r & 1) == 1), x & 0xFFFF, 0)
    elif level < 3:
        x = gl.where((((r >> 1) ^ pair) >> (level - 1)) == 1, x, 0)
    else:  # the same for four pairs of columns, which a thread holds
        x = gl.where((((r >> 3) ^ (pair >> 2)) >> (level - 3)) == 1, x, 0)
    to._reinterpret(gl.int32, [C, C // 2], words).store(x)


@gluon.jit
def add_level(
    dq, de, dk, G, sums, q, k, b, b_c, dP, dT, P_l, T_l, Q_x, K_x, E_x, level: gl.constexpr, B: gl.constexpr, SHARED_B: gl.constexpr,
    C: gl.constexpr, BK: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """Adds (4.6) between the halves of the blocks of 2h rows, h = 2^level.

    dP and dT are cut down to the pairs of the level, so no row of an operand has to be zero, and one accumulator serves both dq, on upper rows, and
    dk, on lower ones.
    """
    dtype: gl.constexpr = Q_x.dtype
    cut(P_l, dP, level)
    x = decay(G, sums, 2**level, C, BK, M)
    kx = k.load(M).to(gl.float32) * x
    K_x.store(kx.to(dtype))
    Q_x.store((q.load(M).to(gl.float32) * x).to(dtype))
    if B:
        cut(T_l, dT, level)
        if SHARED_B:
            b_c = b.load(M).to(gl.float32)
        E_x.store((kx * b_c).to(dtype))
    fence_async_shared()
    barrier()
    zero = gl.zeros([C, BK], gl.float32, layout=M)
    z = warpgroup_mma(P_l, K_x, zero, use_acc=False, is_async=True)
    z = warpgroup_mma(P_l.permute((1, 0)), Q_x, z, is_async=True)
    if B:
        z = warpgroup_mma(T_l.permute((1, 0)), E_x, z, is_async=True)
        ze = warpgroup_mma(T_l, K_x, zero, use_acc=False, is_async=True)
        z, ze = warpgroup_mma_wait(0, deps=(z, ze))
        de += ze * x
    else:
        z = warpgroup_mma_wait(0, deps=(z,))
    upper = gl.expand_dims((gl.arange(0, C, layout=gl.SliceLayout(1, M)) >> level) & 1, 1) == 1
    z = z * x
    dq = gl.where(upper, dq + z, dq)
    dk = gl.where(upper, dk, dk + z)
    barrier()
    return dq, de, dk


@gluon.jit
def through_decay(dq, de, dk, dgamma, sums, k, scale, C: gl.constexpr, BK: gl.constexpr, M: gl.constexpr, COLUMN: gl.constexpr):
    """dq, de, dk through the states (4.4, 4.5), now times the decays of (4.6); and what every decay of the chunk is part of [1, BK]: the terms of
    (4.8) that hold G_C."""
    G = sums.load(M)
    from_start = gl.exp2(G)
    dq = dq * (from_start * scale)
    de = de * -from_start
    dk = dk * gl.exp2(sums.slice(C - 1, 1, dim=0).load(M) - G)
    behind, through = shared_row(BK), shared_row(BK)
    behind.store(gl.sum(k.load(M).to(gl.float32) * dk, 0))
    through.store(dgamma)
    barrier()
    total = gl.exp2(sums.slice(C - 1, 1, dim=0).load(COLUMN))
    dtotal = gl.expand_dims(behind.load(gl.SliceLayout(0, COLUMN)), 0) + total * gl.expand_dims(through.load(gl.SliceLayout(0, COLUMN)), 0)
    return dq, de, dk, dtotal


@gluon.jit
def tree_gradients(
    dq, de, dk, sums, q, k, b, b_c, dP, dT, B: gl.constexpr, SHARED_B: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """Adds what (4.6) sums over pairs of rows, but for the diagonal of dP."""
    dtype: gl.constexpr = q.dtype
    G = sums.load(M)
    P_l, T_l = shared_tile(dtype, C, C), shared_tile(dtype, C, C)
    Q_x, K_x, E_x = shared_tile(dtype, C, BK), shared_tile(dtype, C, BK), shared_tile(dtype, C, BK)
    for level in gl.static_range(6):
        dq, de, dk = add_level(dq, de, dk, G, sums, q, k, b, b_c, dP, dT, P_l, T_l, Q_x, K_x, E_x, level, B, SHARED_B, C, BK, M)
    return dq, de, dk


@gluon.jit
def decay_gradient(dG, sums, dtotal, layout: gl.constexpr):
    """dg [C, BK] in a layout whose threads hold columns: sums of dG from the end, and dtotal. Overwrites `sums`."""
    barrier()
    sums.store(dG)
    barrier()
    dG = sums.load(layout)
    before = sums_from_the_start(dG)
    barrier()
    sums.store(before)
    barrier()
    # from the last row's sum: it is the same number in every row behind which nothing is left to add
    return (sums.slice(sums.shape[0] - 1, 1, dim=0).load(layout) - before) + dG + dtotal
