"""Everything of a chunk that needs no state (README.md, 2.2), for a decay per channel on Hopper: the scores, the inverse, Y, U, Qg, Ktail.

What `_triton/scores.py` and `_triton/solve.py` compute, without running sums: the rows of q, e and k carry their decay from level to level.

Shapes: C = 64 rows a chunk, R = C / 2 rows of a half tile, H key heads, HV value heads, K key size, V value size, BV value columns a block.
Gates: 0 absent, 1 scalar, 2 channel. Inputs are [tokens, heads, channels] with token strides S_x; results [chunks, HV, C, ..], rows past the end of a
sequence zero.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.delta._gluon.shared import barrier, chunk_rows, n_chunks, offsets, tile
from kernels.delta._gluon.tree import (
    far_keys,
    far_queries,
    group_gate,
    group_tile,
    interleave,
    keep,
    near_levels,
    over,
    parted,
    put,
    put_diagonal,
    put_kept,
    whole,
)


@gluon.jit
def inverse(T, C: gl.constexpr):
    """(I + T)^-1 for T [C, C] in float16 in shared memory, strictly lower, by (6.1).

    For A of diagonal blocks, A T A is A T_h A on the pairs of level h: not T but the product is cut down.
    """
    GROUPS: gl.constexpr = gl.num_warps() // 4
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    shared: gl.constexpr = T.layout
    r, s = gl.arange(0, C, layout=gl.SliceLayout(1, M)), gl.arange(0, C, layout=gl.SliceLayout(0, M))
    parted = gl.expand_dims(r, 1) ^ gl.expand_dims(s, 0)
    A = gl.where(parted == 0, 1.0, gl.where(parted == 1, -T.load(M).to(gl.float32), 0.0))
    A_0 = gl.allocate_shared_memory(gl.float16, [C, C], shared)
    A_1 = gl.allocate_shared_memory(gl.float16, [C, C], shared)
    AT_s = gl.allocate_shared_memory(gl.float16, [C, C], shared)
    zero = gl.zeros([C, C], gl.float32, layout=M)
    for level in gl.static_range(1, 6):
        A_h = A_1 if level % 2 else A_0
        A_h.store(A.to(gl.float16))
        fence_async_shared()
        barrier()
        AT = warpgroup_mma(A_h, T, zero, use_acc=False, is_async=True)
        AT = warpgroup_mma_wait(0, deps=(AT,))
        AT_s.store(AT.to(gl.float16))
        fence_async_shared()
        barrier()
        ATA = warpgroup_mma(AT_s, A_h, zero, use_acc=False, is_async=True)
        ATA = warpgroup_mma_wait(0, deps=(ATA,))
        A = gl.where((parted >> level) == 1, A - ATA, A)
    return A


@gluon.jit
def written(v, w, rows, S_V: gl.constexpr, S_W: gl.constexpr, W: gl.constexpr, C: gl.constexpr, BV: gl.constexpr, layout: gl.constexpr):
    """The operands of z [C, BV]."""
    x = tile(v, rows, S_V, C, BV, layout)
    gate = x
    if W == 1:
        r = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
        gate = gl.expand_dims(gl.load(w + r * S_W, mask=r < rows, other=0.0), 1)
    if W == 2:
        gate = tile(w, rows, S_W, C, BV, layout)
    return x, gate


@gluon.jit
def gated(x, gate, W: gl.constexpr):
    """z, rounded."""
    z = x
    if W:
        z = (x.to(gl.float32) * gate.to(gl.float32)).to(x.dtype)
    return z


@gluon.jit
def values(
    v, w, T, A, Y, U, Ebar, rows, start, head, work,
    S_V: gl.constexpr, S_W: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, B: gl.constexpr, W: gl.constexpr, BV: gl.constexpr,
):  # fmt: skip
    """A, Y, U from T in memory, Ebar [C, K] and the operands of z."""
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = WARPS // 4
    # of products with A: [C, K], [C, BV]
    FULL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, K // GROUPS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, max(8, BV // GROUPS), 16])
    # 16 bytes a thread
    ROWS_C: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ROWS_K: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [WARPS, 1], [1, 0])
    ROWS_V: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [WARPS, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    shared_v: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * BV), 16, 2)
    dtype: gl.constexpr = Ebar.dtype
    at = work.to(gl.int64) * C
    v += start * S_V + head * V
    w += start * S_W + head * (V if W == 2 else 1)
    U += at * V
    v_c, w_c = written(v, w, rows, S_V, S_W, W, C, BV, ROWS_V)
    own_v = offsets(C, BV, V, ROWS_V)
    if B:
        barrier()
        row = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(1, ROWS_C)), 1)
        column = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(0, ROWS_C)), 0)
        own_c, own_k = offsets(C, C, C, ROWS_C), offsets(C, K, K, ROWS_K)
        T_s = gl.allocate_shared_memory(gl.float16, [C, C], shared)
        A_s = gl.allocate_shared_memory(dtype, [C, C], shared)
        e_s = gl.allocate_shared_memory(dtype, [C, K], shared)
        z_s = gl.allocate_shared_memory(dtype, [C, BV], shared_v)
        T_c = gl.load(T + own_c)
        e_s.store(Ebar)
        T_s.store(gl.where(row > column, T_c, 0.0).to(gl.float16))
        A_c = inverse(T_s, C)
        z_s.store(gated(v_c, w_c, W))
        A_s.store(A_c.to(dtype))
        fence_async_shared()
        barrier()
        y = warpgroup_mma(A_s, e_s, gl.zeros([C, K], gl.float32, layout=FULL), use_acc=False, is_async=True)
        u = warpgroup_mma(A_s, z_s, gl.zeros([C, BV], gl.float32, layout=VALUES), use_acc=False, is_async=True)
        gl.store(A + at * C + own_c, A_s.load(ROWS_C))
        y, u = warpgroup_mma_wait(0, deps=(y, u))
        barrier()
        e_s.store(y.to(dtype))
        z_s.store(u.to(dtype))
        barrier()
        gl.store(Y + at * K + own_k, e_s.load(ROWS_K))
        gl.store(U + own_v, z_s.load(ROWS_V))
        for vb in range(1, V // BV):
            v_c, w_c = written(v + vb * BV, w + (vb * BV if W == 2 else 0), rows, S_V, S_W, W, C, BV, ROWS_V)
            barrier()
            z_s.store(gated(v_c, w_c, W))
            fence_async_shared()
            barrier()
            u = warpgroup_mma(A_s, z_s, gl.zeros([C, BV], gl.float32, layout=VALUES), use_acc=False, is_async=True)
            u = warpgroup_mma_wait(0, deps=(u,))
            barrier()
            z_s.store(u.to(dtype))
            barrier()
            gl.store(U + vb * BV + own_v, z_s.load(ROWS_V))
    else:
        gl.store(U + own_v, gated(v_c, w_c, W))
        for vb in range(1, V // BV):
            v_c, w_c = written(v + vb * BV, w + (vb * BV if W == 2 else 0), rows, S_V, S_W, W, C, BV, ROWS_V)
            gl.store(U + vb * BV + own_v, gated(v_c, w_c, W))


@gluon.jit(do_not_specialize=["tokens", "per_sequence", "sequences"])
def intra_kernel(
    q, k, v, g, b, w, first_chunk, starts, lengths, T, P, A, Y, U, Qg, Ktail, gamma, scale, tokens, per_sequence, sequences,
    S_Q: gl.constexpr, S_K: gl.constexpr, S_V: gl.constexpr, S_G: gl.constexpr, S_B: gl.constexpr, S_W: gl.constexpr,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, B: gl.constexpr, W: gl.constexpr,
    HG: gl.constexpr, HB: gl.constexpr, PACKED: gl.constexpr, BV: gl.constexpr,
):  # fmt: skip
    """One program a chunk and head, K / 16 warps. T is the memory of A as float16: the scores of e stay there until the inverse takes them."""
    work = gl.program_id(0)
    chunk, head = work // HV, work % HV
    if chunk >= n_chunks(first_chunk, per_sequence, sequences, PACKED):
        return
    start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
    at = work.to(gl.int64) * C
    q += start * S_Q + (head // (HV // H)) * K
    k += start * S_K + (head // (HV // H)) * K
    g += start * S_G + (head // (HV // HG)) * K
    b += start * S_B + (head // (HV // HB)) * (K if B == 2 else 1)

    dtype: gl.constexpr = q.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = WARPS // 4
    R: gl.constexpr = C // 2
    # two columns of 16 rows a thread, or of 8 rows, a group: blocks of up to 16 rows are its own work
    COLUMNS: gl.constexpr = gl.BlockedLayout([16, 2], [1, 32], [4, GROUPS], [1, 0])
    GROUP: gl.constexpr = gl.BlockedLayout([8, 2], [1, 32], [4, GROUPS], [1, 0])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, R // GROUPS, 16])
    SQUARE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    # --- inputs; the diagonal of P, which has no decay
    q_s = gl.allocate_shared_memory(dtype, [C, K], shared)
    k_s = gl.allocate_shared_memory(dtype, [C, K], shared)
    g_0 = group_tile(g, rows, S_G, 0, C, K, GROUP)
    k_0 = group_tile(k, rows, S_K, 0, C, K, GROUP)
    q_0 = group_tile(q, rows, S_Q, 0, C, K, GROUP)
    b_0 = group_gate(b, rows, S_B, 0, B, C, K, GROUP)
    k_1 = group_tile(k, rows, S_K, 1, C, K, GROUP)
    q_1 = group_tile(q, rows, S_Q, 1, C, K, GROUP)
    b_1 = group_gate(b, rows, S_B, 1, B, C, K, GROUP)
    g_1 = group_tile(g, rows, S_G, 1, C, K, GROUP)
    k_s.store(whole(k_0, k_1, 8))
    q_s.store(whole(q_0, q_1, 8))
    fence_async_shared()
    barrier()
    diagonal = warpgroup_mma(q_s, k_s.permute((1, 0)), gl.zeros([C, C], gl.float32, layout=SQUARE), use_acc=False, is_async=True)
    diagonal = warpgroup_mma_wait(0, deps=(diagonal,))
    put_diagonal(P + at * C, diagonal * scale)
    barrier()

    # --- scores of blocks of up to 16 rows
    zero = gl.zeros([C, R], gl.float32, layout=HALF)
    left_0, right_0 = gl.allocate_shared_memory(dtype, [C, K], shared), gl.allocate_shared_memory(dtype, [R, K], shared)
    left_1, right_1 = gl.allocate_shared_memory(dtype, [C, K], shared), gl.allocate_shared_memory(dtype, [R, K], shared)
    left_2, right_2 = gl.allocate_shared_memory(dtype, [C, K], shared), gl.allocate_shared_memory(dtype, [R, K], shared)
    left_3, right_3 = gl.allocate_shared_memory(dtype, [C, K], shared), gl.allocate_shared_memory(dtype, [R, K], shared)
    results: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    P_0, T_0 = gl.allocate_shared_memory(dtype, [R, R], results), gl.allocate_shared_memory(gl.float16, [R, R], results)
    P_1, T_1 = gl.allocate_shared_memory(dtype, [R, R], results), gl.allocate_shared_memory(gl.float16, [R, R], results)
    P_2, T_2 = gl.allocate_shared_memory(dtype, [R, R], results), gl.allocate_shared_memory(gl.float16, [R, R], results)
    decays = gl.allocate_shared_memory(gl.float32, [4, K], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    Q_0, E_0, K_0, decay_0 = near_levels(q_0, k_0, b_0, g_0, (left_0, right_0), (left_1, right_1), (left_2, right_2), 0, B)
    Q_1, E_1, K_1, decay_1 = near_levels(q_1, k_1, b_1, g_1, (left_0, right_0), (left_1, right_1), (left_2, right_2), 1, B)
    left_3.store(interleave(Q_1.to(dtype), E_1.to(dtype)))
    right_3.store(K_0.to(dtype))
    Q_1, E_1, K_0 = gl.reshape(Q_1, [C // 16, 8, K]), gl.reshape(E_1, [C // 16, 8, K]), gl.reshape(K_0, [C // 16, 8, K])
    since, until = over(decay_0, Q_1), over(decay_1, K_0)
    Q_c = gl.convert_layout(whole(Q_0, Q_1 * since, 8), COLUMNS, assert_trivial=True)
    E_c = gl.convert_layout(whole(E_0, E_1 * since, 8), COLUMNS, assert_trivial=True)
    K_c = gl.convert_layout(whole(K_0 * until, K_1, 8), COLUMNS, assert_trivial=True)
    decays.store(decay_0 * decay_1)
    fence_async_shared()
    barrier()
    acc = warpgroup_mma(left_0, right_0.permute((1, 0)), zero, use_acc=False, is_async=True)
    done = warpgroup_mma_wait(0, deps=(acc,))
    acc = warpgroup_mma(left_1, right_1.permute((1, 0)), zero, use_acc=False, is_async=True)
    keep(done, (P_0, T_0), scale, B)
    done = warpgroup_mma_wait(0, deps=(acc,))
    acc = warpgroup_mma(left_2, right_2.permute((1, 0)), zero, use_acc=False, is_async=True)
    keep(done, (P_1, T_1), scale, B)
    done = warpgroup_mma_wait(0, deps=(acc,))
    acc = warpgroup_mma(left_3, right_3.permute((1, 0)), zero, use_acc=False, is_async=True)
    keep(done, (P_2, T_2), scale, B)
    done = warpgroup_mma_wait(0, deps=(acc,))

    # --- and of larger ones: from here on the decay of a block comes from other warps
    r = gl.arange(0, C, layout=gl.SliceLayout(1, COLUMNS))
    block = gl.expand_dims(r // 16, 1)
    d_0, d_1 = decays.slice(0, 1).load(COLUMNS), decays.slice(1, 1).load(COLUMNS)
    d_2, d_3 = decays.slice(2, 1).load(COLUMNS), decays.slice(3, 1).load(COLUMNS)
    barrier()
    left_4, right_4 = gl.allocate_shared_memory(dtype, [2 * C, K], shared), gl.allocate_shared_memory(dtype, [C, K], shared)
    left_5, right_5 = gl.allocate_shared_memory(dtype, [2 * C, K], shared), gl.allocate_shared_memory(dtype, [C, K], shared)
    P_3, T_3 = gl.allocate_shared_memory(dtype, [R, R], results), gl.allocate_shared_memory(gl.float16, [R, R], results)
    keep(done, (P_3, T_3), scale, B)
    c = gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, COLUMNS)), 0)
    own = gl.expand_dims(r, 1) * K + c
    front, back = d_0 * d_1, d_2 * d_3
    far_keys(K_c, right_4, 16)
    K_c = K_c * gl.where(block == 0, d_1, gl.where(block == 2, d_3, 1.0))
    far_keys(K_c, right_5, 32)
    gl.store(Ktail + at * K + own, (K_c * gl.where(block < 2, back, 1.0)).to(dtype))
    far_queries(Q_c, E_c, left_4, 16)
    since = gl.where(block == 1, d_0, gl.where(block == 3, d_2, 1.0))
    Q_c, E_c = Q_c * since, E_c * since
    far_queries(Q_c, E_c, left_5, 32)
    since = gl.where(block >= 2, front, 1.0)
    gl.store(Qg + at * K + own, (Q_c * since).to(dtype))
    Ebar = (E_c * since).to(dtype)
    fence_async_shared()
    barrier()
    acc = warpgroup_mma(left_4.slice(C, C), right_4.slice(0, R).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc_5 = warpgroup_mma(left_5.slice(C, C), right_5.slice(0, R).permute((1, 0)), zero, use_acc=False, is_async=True)
    one_row: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, GROUPS], [1, 0])
    total = gl.convert_layout(front * back, one_row, assert_trivial=True)
    gl.store(gamma + work.to(gl.int64) * K + gl.expand_dims(gl.arange(0, K, layout=gl.SliceLayout(0, one_row)), 0), total)
    P += at * C
    T += at * C
    put_kept((P_0, T_0), P, T, 1, B)
    put_kept((P_1, T_1), P, T, 2, B)
    put_kept((P_2, T_2), P, T, 4, B)
    put_kept((P_3, T_3), P, T, 8, B)
    done, done_5 = warpgroup_mma_wait(0, deps=(acc, acc_5))
    of_q, of_e = parted(done, scale, dtype)
    put(of_q, of_e, P, T, 16, B)
    of_q, of_e = parted(done_5, scale, dtype)
    put(of_q, of_e, P, T, 32, B)
    values(v, w, T, A, Y, U, Ebar, rows, start, head, work, S_V, S_W, K, V, C, B, W, BV)
