"""The tree of README.md, section 3, backwards (4.6): gradients of the rows of a chunk through its scores, for a decay per channel.

Everything stays in the layout M of the products' results; operands go to shared memory. Shapes: C = 64 rows a chunk, BK channels a program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.delta._gluon.shared import (
    barrier,
    exponent_to_half,
    offsets,
    power_of_two,
    shared_row,
    shared_sums,
    shared_tile,
    sums_from_the_start,
    whole_pieces,
    within,
)


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
def put_rows(Q_h, K_h, E_h, q, k, b, b_c, B: gl.constexpr, SHARED_B: gl.constexpr, M: gl.constexpr):
    """q, k and e times 2^n to float16; returns n, for each row by what is in that row: it is rounded alike whatever follows it.

    n is 8 for rows whose largest entry is in [2^-9, 2^7), as with keys and queries of length 1.
    """
    q_c, k_c = q.load(M).to(gl.float32), k.load(M).to(gl.float32)
    most = gl.maximum(gl.abs(q_c), gl.abs(k_c))
    if B:
        if SHARED_B:
            b_c = b.load(M)
        e_c = k_c * b_c.to(gl.float32)
        most = gl.maximum(most, gl.abs(e_c))
    n = exponent_to_half(gl.max(most, 1), 4, 24)
    to_half = gl.expand_dims(power_of_two(n), 1)
    Q_h.store((q_c * to_half).to(gl.float16))
    K_h.store((k_c * to_half).to(gl.float16))
    if B:
        E_h.store((e_c * to_half).to(gl.float16))
    return n


@gluon.jit
def add_level(
    dq, de, dk, G, sums, q, k, e, dP, dT, P_l, T_l, Q_x, K_x, E_x, level: gl.constexpr, B: gl.constexpr, C: gl.constexpr,
    BK: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """Adds (4.6) between the halves of the blocks of 2h rows, h = 2^level.

    dP and dT are cut down to the pairs of the level, so no row of an operand has to be zero, and one accumulator serves both dq, on upper rows, and
    dk, on lower ones.
    """
    cut(P_l, dP, level)
    x = decay(G, sums, 2**level, C, BK, M)
    x_half = x.to(gl.float16)
    K_x.store(k.load(M) * x_half)
    Q_x.store(q.load(M) * x_half)
    if B:
        E_x.store(e.load(M) * x_half)
        cut(T_l, dT, level)
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
def tree_gradients(sums, q, k, e, dP, dT, B: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, M: gl.constexpr):
    """What (4.6) sums over pairs of rows, but for the diagonal of dP; times what q, k, e and dP, dT hold."""
    dq, de, dk = gl.zeros([C, BK], gl.float32, layout=M), gl.zeros([C, BK], gl.float32, layout=M), gl.zeros([C, BK], gl.float32, layout=M)
    P_l, T_l = shared_tile(gl.float16, C, C), shared_tile(gl.float16, C, C)
    Q_x, K_x, E_x = shared_tile(gl.float16, C, BK), shared_tile(gl.float16, C, BK), shared_tile(gl.float16, C, BK)
    barrier()
    G = sums.load(M)
    for level in gl.static_range(6):
        dq, de, dk = add_level(dq, de, dk, G, sums, q, k, e, dP, dT, P_l, T_l, Q_x, K_x, E_x, level, B, C, BK, M)
    return dq, de, dk


@gluon.jit
def plain_gradients(
    dq, de, dk, q, k, b, b_c, dP, dT, B: gl.constexpr, SHARED_B: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, M: gl.constexpr
):  # fmt: skip
    """Adds the same where dP and dT hold the decay already, with the diagonal."""
    e = shared_tile(q.dtype, C, BK)
    if B:
        if SHARED_B:
            b_c = b.load(M).to(gl.float32)
        e.store((k.load(M).to(gl.float32) * b_c).to(q.dtype))
    fence_async_shared()
    barrier()
    dq = warpgroup_mma(dP, k, dq, is_async=True)
    dk = warpgroup_mma(dP.permute((1, 0)), q, dk, is_async=True)
    if B:
        dk = warpgroup_mma(dT.permute((1, 0)), e, dk, is_async=True)
        de = warpgroup_mma(dT, k, de, is_async=True)
    dq, dk, de = warpgroup_mma_wait(0, deps=(dq, dk, de))
    return dq, de, dk


@gluon.jit
def through_decay(dq, de, dk, dgamma, sums, k, C: gl.constexpr, BK: gl.constexpr, M: gl.constexpr):
    """dq, de, dk through the states (4.4, 4.5), now times the decays of (4.6); and in shared memory what every decay of the chunk is part of [BK]:
    the terms of (4.8) that hold G_C."""
    G = sums.load(M)
    from_start = gl.exp2(G)
    dk = dk * gl.exp2(sums.slice(C - 1, 1, dim=0).load(M) - G)
    behind, through, dtotal = shared_row(BK), shared_row(BK), shared_row(BK)
    behind.store(gl.sum(k.load(M).to(gl.float32) * dk, 0))
    through.store(dgamma)
    barrier()
    ONE: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0])
    total = gl.exp2(gl.sum(sums.slice(C - 1, 1, dim=0).load(ONE), 0))
    dtotal.store(behind.load(total.type.layout) + total * through.load(total.type.layout))
    return dq * from_start, de * from_start, dk, dtotal


@gluon.jit
def through_row_decay(dq, de, dk, dgamma, sums, k, C: gl.constexpr, M: gl.constexpr):
    """The same for a decay per head."""
    G, last = sums.load(gl.SliceLayout(1, M)), sums.slice(C - 1, 1, dim=0).load(gl.SliceLayout(1, M))
    from_start, to_end = gl.expand_dims(gl.exp2(G), 1), gl.expand_dims(gl.exp2(last - G), 1)
    dk = dk * to_end
    total = gl.exp2(gl.sum(last, 0))
    dtotal = gl.sum(gl.sum(k.load(M).to(gl.float32) * dk, 1), 0) + total * gl.sum(dgamma, 0)
    return dq * from_start, de * from_start, dk, dtotal


@gluon.jit
def put_decay_gradient(to, sums, dtotal, rows, S: gl.constexpr, COLUMN: gl.constexpr):
    """dg to memory, S numbers a row: what `sums` holds, dG [C, BK], summed from the end, and dtotal. Threads of the layout COLUMN hold columns."""
    C: gl.constexpr = sums.shape[0]
    BK: gl.constexpr = sums.shape[1]
    before = shared_sums(C, BK)
    before.store(sums_from_the_start(sums.load(COLUMN)))
    barrier()
    layout: gl.constexpr = whole_pieces(gl.float32, BK, gl.num_warps())
    # from the last row's sum: it is the same number in every row behind which nothing is left to add
    dg = (before.slice(C - 1, 1, dim=0).load(layout) - before.load(layout)) + sums.load(layout)
    dg += gl.expand_dims(dtotal.load(gl.SliceLayout(0, layout)), 0)
    gl.store(to + offsets(C, BK, S, layout), dg, mask=within(rows, C, BK, layout))
