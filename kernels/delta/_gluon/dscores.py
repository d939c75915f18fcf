"""Gradients of queries, keys, decay and erase gate (README.md, 4.4 to 4.9) on Hopper: what `_triton/dscores.py` computes, and the scores' gradients.

For a decay per channel the operands of products with dP and dT are float16 times a power of two, a row's own: with the 8 bits of bfloat16 the
gradients were up to 1.6 times as wrong. With 2^n_r for row r of q, k and e, dP_rs and dT_rs take 2^(n + 16 - n_r - n_s), results 2^(n_r - n - 16).

Shapes: C = 64 rows a chunk, H key heads, HV value heads, K key size, V value size, BK channels a program, BV value columns a block.
Gates: 0 absent, 1 scalar, 2 channel. Inputs are [tokens, heads, channels] with token strides S_x or [chunks, HV, C, ..]; results
[tokens, HV, K], and for scalar gates [tokens, HV, K / BK], a part a program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.delta._gluon.dtree import plain_gradients, put_decay_gradient, put_rows, through_decay, through_row_decay, tree_gradients
from kernels.delta._gluon.shared import (
    barrier,
    chunk_rows,
    exponent_to_half,
    fetch,
    log2_decay,
    n_chunks,
    power_of_two,
    put_tile,
    result_tile,
    rows_of,
    shared_row,
    shared_sums,
    shared_tile,
    sums_from_the_end,
    sums_from_the_start,
    tile,
)

MIDDLE = gl.constexpr(8)  # the exponent that most rows have (`put_rows`)


@gluon.jit
def fetch_values(do_s, dZ_s, R_s, do, dZ, R, vb: gl.constexpr, rows, S_O: gl.constexpr, B: gl.constexpr, V: gl.constexpr, BV: gl.constexpr):
    """Begins to copy a block of value columns."""
    fetch(do_s, do + vb * BV, S_O, rows)
    if B:
        fetch(dZ_s, dZ + vb * BV, V)
    fetch(R_s, R + vb * BV, V)


@gluon.jit
def fetch_states(S_s, dS_s, S, dS, vb: gl.constexpr, V: gl.constexpr, BV: gl.constexpr):
    """The same for the states."""
    fetch(S_s, S + vb * BV, V)
    fetch(dS_s, dS + vb * BV, V)
    async_copy.commit_group()


@gluon.jit
def fetched(LATER: gl.constexpr):
    """What has been copied can be read, by products too; but for the last LATER groups."""
    async_copy.wait_group(LATER)
    fence_async_shared()
    barrier()


@gluon.jit
def score_gradients(
    do_s, dZ_s, R_s, do, dZ, R, rows, S_O: gl.constexpr, B: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BV: gl.constexpr, M: gl.constexpr
):
    """dO R^T and dZ R^T [C, C]. The first block is on its way, and if it is all, the states behind it; leaves the last one in shared memory."""
    dP, dT = gl.zeros([C, C], gl.float32, layout=M), gl.zeros([C, C], gl.float32, layout=M)
    for vb in gl.static_range(V // BV):
        if vb > 0:
            barrier()
            fetch_values(do_s, dZ_s, R_s, do, dZ, R, vb, rows, S_O, B, V, BV)
            async_copy.commit_group()
        fetched(1 if V == BV else 0)
        dP = warpgroup_mma(do_s, R_s.permute((1, 0)), dP, is_async=True)
        if B:
            dT = warpgroup_mma(dZ_s, R_s.permute((1, 0)), dT, is_async=True)
            dP, dT = warpgroup_mma_wait(0, deps=(dP, dT))
        else:
            dP = warpgroup_mma_wait(0, deps=(dP,))
    return dP, dT


@gluon.jit
def put_scores(P_s, T_s, diagonal, dP, dT, sums, scale, exponents, G: gl.constexpr, B: gl.constexpr, C: gl.constexpr, M: gl.constexpr):
    """dP and dT (4.5), times the decay of a head. For a decay per channel without dP's diagonal, which is kept for itself, and times 2^n over what
    both rows of a pair were multiplied by; returns n. Only pairs of rows with a gradient count for n."""
    r = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(1, M)), 1)
    s = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(0, M)), 0)
    dP, dT = dP * scale, gl.where(r > s, dT, 0.0)
    if G == 2:
        diagonal.store(gl.sum(gl.where(r == s, dP, 0.0), 1))
        dP = gl.where(r > s, dP, 0.0)
    else:
        dP = gl.where(r >= s, dP, 0.0)
    if G == 1:
        difference = gl.expand_dims(sums.load(gl.SliceLayout(1, M)), 1) - gl.expand_dims(sums.load(gl.SliceLayout(0, M)), 0)
        x = gl.exp2(gl.where(r > s, difference, 0.0))
        dP, dT = dP * x, dT * x
    n = 0
    if G == 2:
        x = gl.expand_dims(power_of_two(MIDDLE - exponents.load(gl.SliceLayout(1, M))), 1)
        x = x * gl.expand_dims(power_of_two(MIDDLE - exponents.load(gl.SliceLayout(0, M))), 0)
        dP, dT = dP * x, dT * x
        most = gl.abs(dP)
        if B:
            most = gl.maximum(most, gl.abs(dT))
        n = exponent_to_half(gl.max(most), 0, 80)
        dP, dT = dP * power_of_two(n), dT * power_of_two(n)
    P_s.store(dP.to(P_s.dtype))
    if B:
        T_s.store((-dT).to(T_s.dtype))
    return n


@gluon.jit
def state_gradients(
    do_s, dZ_s, R_s, S_s, dS_s, do, dZ, R, S, dS, rows, S_O: gl.constexpr, B: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BK: gl.constexpr,
    BV: gl.constexpr, M: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """dQg, dEbar, dKtail [C, BK] (4.4, 4.5) and the row sums of dS * S [BK], for a block of rows of the states. Goes on with what `score_gradients`
    has left."""
    dq = gl.zeros([C, BK], gl.float32, layout=M)
    de = gl.zeros([C, BK], gl.float32, layout=M)
    dk = gl.zeros([C, BK], gl.float32, layout=M)
    dgamma = gl.zeros([BK], gl.float32, layout=gl.SliceLayout(1, WIDE))
    LAST: gl.constexpr = V // BV - 1
    for i in gl.static_range(LAST + 1):
        if i > 0:
            barrier()
            fetch_values(do_s, dZ_s, R_s, do, dZ, R, LAST - i, rows, S_O, B, V, BV)
        if LAST > 0:
            fetch_states(S_s, dS_s, S, dS, LAST - i, V, BV)
        fetched(0)
        dq = warpgroup_mma(do_s, S_s.permute((1, 0)), dq, is_async=True)
        if B:
            de = warpgroup_mma(dZ_s, S_s.permute((1, 0)), de, is_async=True)
        dk = warpgroup_mma(R_s, dS_s.permute((1, 0)), dk, is_async=True)
        dq, de, dk = warpgroup_mma_wait(0, deps=(dq, de, dk))
        dgamma += gl.sum(S_s.load(WIDE).to(gl.float32) * dS_s.load(WIDE).to(gl.float32), 1)
    return dq, -de, dk, dgamma


@gluon.jit(do_not_specialize=["tokens", "per_sequence", "sequences"])
def dscores_kernel(
    q, k, g, b, first_chunk, starts, lengths, R, S, do, dZ, dS, dq, dk, dg, db, scale, tokens, per_sequence, sequences,
    S_Q: gl.constexpr, S_K: gl.constexpr, S_G: gl.constexpr, S_B: gl.constexpr, S_O: gl.constexpr,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, G: gl.constexpr, B: gl.constexpr,
    HG: gl.constexpr, HB: gl.constexpr, PACKED: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
):  # fmt: skip
    """One program a chunk, head and block of channels."""
    PARTS: gl.constexpr = K // BK
    part, work = gl.program_id(0) % PARTS, gl.program_id(0) // PARTS
    chunk, head = work // HV, work % HV
    if chunk >= n_chunks(first_chunk, per_sequence, sequences, PACKED):
        return
    start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
    at, ck, row = work.to(gl.int64), part * BK, gl.program_id(0).to(gl.int64) * BK
    q += start * S_Q + (head // (HV // H)) * K + ck
    k += start * S_K + (head // (HV // H)) * K + ck
    g += start * S_G + (head // (HV // HG)) * (K if G == 2 else 1) + (ck if G == 2 else 0)
    b += start * S_B + (head // (HV // HB)) * (K if B == 2 else 1) + (ck if B == 2 else 0)
    do += start * S_O + head * V
    dZ += at * C * V
    R += at * C * V
    S += row * V
    dS += row * V
    dtype: gl.constexpr = q.dtype.element_ty
    SHARED_B: gl.constexpr = B == 2 and b.dtype.element_ty == dtype  # a wider gate waits in registers
    GROUPS: gl.constexpr = gl.num_warps() // 4
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BK // GROUPS, 16])
    SQUARE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    # one column of 16 rows a thread: sums over time are its own work
    COLUMN: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [4, GROUPS], [0, 1])
    ROW: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    r = gl.arange(0, C, layout=gl.SliceLayout(1, M))

    # --- the gradients of the scores
    q_s, k_s, b_s = shared_tile(dtype, C, BK), shared_tile(dtype, C, BK), shared_tile(dtype, C, BK)
    do_s, dZ_s, R_s = shared_tile(dtype, C, BV), shared_tile(dtype, C, BV), shared_tile(dtype, C, BV)
    S_s, dS_s = shared_tile(dtype, BK, BV), shared_tile(dtype, BK, BV)
    fetch_values(do_s, dZ_s, R_s, do, dZ, R, 0, rows, S_O, B, V, BV)
    fetch(q_s, q, S_Q, rows)
    fetch(k_s, k, S_K, rows)
    if SHARED_B:
        fetch(b_s, b, S_B, rows)
    async_copy.commit_group()
    if V == BV:
        fetch_states(S_s, dS_s, S, dS, 0, V, BV)
    sums, diagonal = shared_row(C), shared_row(C)
    if G == 2:
        sums = shared_sums(C, BK)
        sums.store(sums_from_the_start(log2_decay(tile(g, rows, S_G, C, BK, COLUMN))))
    if G == 1:
        sums.store(sums_from_the_start(log2_decay(rows_of(g, rows, S_G, C, ROW))))
    dP, dT = score_gradients(do_s, dZ_s, R_s, do, dZ, R, rows, S_O, B, V, C, BV, SQUARE)
    b_c = dP  # not read
    if B == 1:
        b_c = gl.expand_dims(gl.load(b + r * S_B, mask=r < rows, other=0.0).to(gl.float32), 1)
    if B == 2 and not SHARED_B:
        b_c = tile(b, rows, S_B, C, BK, M)
    exponents = shared_row(C, gl.int32)
    if G == 2:
        q_h, k_h, e_h = shared_tile(gl.float16, C, BK), shared_tile(gl.float16, C, BK), shared_tile(gl.float16, C, BK)
        exponents.store(put_rows(q_h, k_h, e_h, q_s, k_s, b_s, b_c, B, SHARED_B, M))
        barrier()
    operand: gl.constexpr = gl.float16 if G == 2 else dtype
    P_s, T_s = shared_tile(operand, C, C), shared_tile(operand, C, C)
    n = put_scores(P_s, T_s, diagonal, dP, dT, sums, scale, exponents, G, B, C, SQUARE)

    # --- through the states, whose memory is free then, and the scores
    dq_c, de_c, dk_c, dgamma = state_gradients(do_s, dZ_s, R_s, S_s, dS_s, do, dZ, R, S, dS, rows, S_O, B, V, C, BK, BV, M, WIDE)
    if G == 2:
        dq_c, de_c, dk_c, dtotal = through_decay(dq_c, de_c, dk_c, dgamma, sums, k_s, C, BK, M)
        tree_q, tree_e, tree_k = tree_gradients(sums, q_h, k_h, e_h, P_s, T_s, B, C, BK, M)
        one = gl.expand_dims(power_of_two(exponents.load(gl.SliceLayout(1, M)) - n - 2 * MIDDLE), 1)
        dq_c, de_c, dk_c = dq_c * scale + tree_q * one, de_c + tree_e * one, dk_c + tree_k * one
    else:
        if G == 1:
            dq_c, de_c, dk_c, dtotal = through_row_decay(dq_c, de_c, dk_c, dgamma, sums, k_s, C, M)
        dq_c, de_c, dk_c = plain_gradients(dq_c * scale, de_c, dk_c, q_s, k_s, b_s, b_c, P_s, T_s, B, SHARED_B, C, BK, M)

    # --- results
    token = start * HV + head
    to = token * K + ck
    k_c, q_c = k_s.load(M).to(gl.float32), q_s.load(M).to(gl.float32)
    dG = q_c * dq_c - k_c * dk_c  # (4.8)
    dq_s, dk_s, db_s = result_tile(dq, C, BK), result_tile(dk, C, BK), result_tile(db, C, BK)
    if B:
        db_c = k_c * de_c
        if SHARED_B:
            b_c = b_s.load(M).to(gl.float32)
        if B == 2:
            db_s.store(db_c.to(db_s.dtype))
        else:
            gl.store(db + (token + r * HV) * PARTS + part, gl.sum(db_c, 1), mask=r < rows)
        dG += b_c * db_c
        dk_c += b_c * de_c
    if G == 2:
        own = gl.expand_dims(diagonal.load(gl.SliceLayout(1, M)), 1)  # it has no decay
        dq_c += own * k_c
        dk_c += own * q_c
    barrier()
    if G == 2:
        sums.store(dG)
    if G == 1:
        sums.store(gl.sum(dG, 1))
    dq_s.store(dq_c.to(dq_s.dtype))
    dk_s.store(dk_c.to(dk_s.dtype))
    barrier()
    put_tile(dq + to, dq_s, rows, HV * K)
    put_tile(dk + to, dk_s, rows, HV * K)
    if B == 2:
        put_tile(db + to, db_s, rows, HV * K)
    if G == 2:
        put_decay_gradient(dg + to, sums, dtotal, rows, HV * K, COLUMN)
    if G == 1:
        t = gl.arange(0, C, layout=ROW)
        # from the end: lanes share the sums, and what they add up must not hang on rows behind which nothing is left
        gl.store(dg + (token + t * HV) * PARTS + part, sums_from_the_end(sums.load(ROW)) + dtotal, mask=t < rows)
