"""Gradients of queries, keys, decay and erase gate (README.md, 4.4 and 4.6 to 4.9) on Hopper: what `_triton/dscores.py` computes.

Shapes: C = 64 rows a chunk, H key heads, HV value heads, K key size, V value size, BK channels a program, BV value columns a block.
Gates: 0 absent, 1 scalar, 2 channel. Inputs are [tokens, heads, channels] with token strides S_x or [chunks, HV, C, ..]; results
[tokens, HV, K], and for scalar gates [tokens, HV, K / BK], a part a program.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.delta._gluon.dtree import decay_gradient, through_decay, tree_gradients
from kernels.delta._gluon.shared import (
    barrier,
    chunk_rows,
    fetch,
    log2_decay,
    n_chunks,
    offsets,
    rows_of,
    shared_row,
    shared_sums,
    shared_tile,
    sums_from_the_end,
    sums_from_the_start,
    tile,
    within,
)


@gluon.jit
def state_products(dq, de, dk, do, dZ, R, S, dS, B: gl.constexpr):
    """Adds dO S^T, dZ S^T (not yet negative) and R dS^T, blocks in shared memory."""
    dq = warpgroup_mma(do, S.permute((1, 0)), dq, is_async=True)
    if B:
        de = warpgroup_mma(dZ, S.permute((1, 0)), de, is_async=True)
    dk = warpgroup_mma(R, dS.permute((1, 0)), dk, is_async=True)
    dq, de, dk = warpgroup_mma_wait(0, deps=(dq, de, dk))
    return dq, de, dk


@gluon.jit
def state_gradients(
    do, dZ, R, S, dS, rows, S_O: gl.constexpr, B: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    M: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """dQg, -dEbar, dKtail [C, BK] (4.4, 4.5) and the row sums of dS * S [BK], for a block of rows of the states."""
    dtype: gl.constexpr = S.dtype.element_ty
    dq = gl.zeros([C, BK], gl.float32, layout=M)
    de = gl.zeros([C, BK], gl.float32, layout=M)
    dk = gl.zeros([C, BK], gl.float32, layout=M)
    dgamma = gl.zeros([BK], gl.float32, layout=gl.SliceLayout(1, WIDE))
    for vb in gl.static_range(V // BV):
        do_s, dZ_s, R_s = shared_tile(dtype, C, BV), shared_tile(dtype, C, BV), shared_tile(dtype, C, BV)
        S_s, dS_s = shared_tile(dtype, BK, BV), shared_tile(dtype, BK, BV)
        fetch(S_s, S + vb * BV, V)
        fetch(do_s, do + vb * BV, S_O, rows)
        if B:
            fetch(dZ_s, dZ + vb * BV, V)
        fetch(dS_s, dS + vb * BV, V)
        fetch(R_s, R + vb * BV, V)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        dq, de, dk = state_products(dq, de, dk, do_s, dZ_s, R_s, S_s, dS_s, B)
        dgamma += gl.sum(S_s.load(WIDE).to(gl.float32) * dS_s.load(WIDE).to(gl.float32), 1)
        barrier()
    return dq, de, dk, dgamma


@gluon.jit
def through_row_decay(dq, de, dk, dgamma, sums, k, C: gl.constexpr, M: gl.constexpr):
    """The gradients through the states, now times the decays of (4.6), and what every decay of the chunk is part of, for a decay per head."""
    G, last = sums.load(gl.SliceLayout(1, M)), sums.slice(C - 1, 1, dim=0).load(gl.SliceLayout(1, M))
    from_start, to_end = gl.expand_dims(gl.exp2(G), 1), gl.expand_dims(gl.exp2(last - G), 1)
    dk = dk * to_end
    total = gl.exp2(gl.sum(last, 0))
    dtotal = gl.sum(gl.sum(k.load(M).to(gl.float32) * dk, 1), 0) + total * gl.sum(dgamma, 0)
    return dq * from_start, de * from_start, dk, dtotal


@gluon.jit
def plain_gradients(dq, de, dk, q, k, b, b_c, dP, dT, B: gl.constexpr, SHARED_B: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, M: gl.constexpr):
    """Adds what (4.6) sums over pairs of rows where dP and dT hold the decay already."""
    if B:
        if SHARED_B:
            b_c = b.load(M).to(gl.float32)
        e = shared_tile(q.dtype, C, BK)
        e.store((k.load(M).to(gl.float32) * b_c).to(q.dtype))
        fence_async_shared()
        barrier()
    dq = warpgroup_mma(dP, k, dq, is_async=True)
    dk = warpgroup_mma(dP.permute((1, 0)), q, dk, is_async=True)
    if B:
        dk = warpgroup_mma(dT.permute((1, 0)), e, dk, is_async=True)
        de = warpgroup_mma(dT, k, de, is_async=True)
        dq, dk, de = warpgroup_mma_wait(0, deps=(dq, dk, de))
    else:
        dq, dk = warpgroup_mma_wait(0, deps=(dq, dk))
    return dq, de, dk


@gluon.jit(do_not_specialize=["tokens", "per_sequence", "sequences"])
def dscores_kernel(
    q, k, g, b, first_chunk, starts, lengths, R, S, do, dZ, dS, dP, dT, dq, dk, dg, db, scale, tokens, per_sequence, sequences,
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
    dP += at * C * C
    dT += at * C * C
    dtype: gl.constexpr = q.dtype.element_ty
    SHARED_B: gl.constexpr = B == 2 and b.dtype.element_ty == dtype  # a wider gate waits in registers
    GROUPS: gl.constexpr = gl.num_warps() // 4
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BK // GROUPS, 16])
    # one column of 16 rows a thread: sums over time are its own work
    COLUMN: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [4, GROUPS], [0, 1])
    ROW: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    r = gl.arange(0, C, layout=gl.SliceLayout(1, M))

    # --- through the states; what comes later is on its way meanwhile
    q_s, k_s, b_s = shared_tile(dtype, C, BK), shared_tile(dtype, C, BK), shared_tile(dtype, C, BK)
    dP_s, dT_s = shared_tile(dtype, C, C), shared_tile(dtype, C, C)
    fetch(q_s, q, S_Q, rows)
    fetch(k_s, k, S_K, rows)
    if SHARED_B:
        fetch(b_s, b, S_B, rows)
    fetch(dP_s, dP, C)
    if B:
        fetch(dT_s, dT, C)
    async_copy.commit_group()
    if G == 2:
        sums = shared_sums(C, BK)
        sums.store(sums_from_the_start(log2_decay(tile(g, rows, S_G, C, BK, COLUMN))))
    if G == 1:
        sums = shared_row(C)
        sums.store(sums_from_the_start(log2_decay(rows_of(g, rows, S_G, C, ROW))))
    dq_c, de_c, dk_c, dgamma = state_gradients(
        do + start * S_O + head * V, dZ + at * C * V, R + at * C * V, S + row * V, dS + row * V, rows, S_O, B, V, C, BK, BV, M, WIDE,
    )  # fmt: skip
    b_c = dk_c  # not read
    if B == 1:
        b_c = gl.expand_dims(gl.load(b + r * S_B, mask=r < rows, other=0.0).to(gl.float32), 1)
    if B == 2 and not SHARED_B:
        b_c = tile(b, rows, S_B, C, BK, M)

    # --- through the scores
    if G == 2:
        dq_c, de_c, dk_c, dtotal = through_decay(dq_c, de_c, dk_c, dgamma, sums, k_s, scale, C, BK, M, COLUMN)
        dq_c, de_c, dk_c = tree_gradients(dq_c, de_c, dk_c, sums, q_s, k_s, b_s, b_c, dP_s, dT_s, B, SHARED_B, C, BK, M)
    else:
        dq_c, de_c = dq_c * scale, -de_c
        if G == 1:
            dq_c, de_c, dk_c, dtotal = through_row_decay(dq_c, de_c, dk_c, dgamma, sums, k_s, C, M)
        dq_c, de_c, dk_c = plain_gradients(dq_c, de_c, dk_c, q_s, k_s, b_s, b_c, dP_s, dT_s, B, SHARED_B, C, BK, M)

    # --- results
    token = start * HV + head
    to = token * K + ck + offsets(C, BK, HV * K, M)
    inside = within(rows, C, BK, M)
    k_c, q_c = k_s.load(M).to(gl.float32), q_s.load(M).to(gl.float32)
    dG = q_c * dq_c - k_c * dk_c  # (4.8)
    if B:
        db_c = k_c * de_c
        if SHARED_B:
            b_c = b_s.load(M).to(gl.float32)
        if B == 2:
            gl.store(db + to, db_c.to(db.dtype.element_ty), mask=inside)
        else:
            gl.store(db + (token + r * HV) * PARTS + part, gl.sum(db_c, 1), mask=r < rows)
        dG += b_c * db_c
        dk_c += b_c * de_c
    if G == 2:
        diagonal = gl.expand_dims(gl.load(dP + r * (C + 1)).to(gl.float32), 1)  # it has no decay
        dq_c += diagonal * k_c
        dk_c += diagonal * q_c
    gl.store(dq + to, dq_c.to(dq.dtype.element_ty), mask=inside)
    gl.store(dk + to, dk_c.to(dk.dtype.element_ty), mask=inside)
    if G == 2:
        dg_c = decay_gradient(dG, sums, dtotal, COLUMN)
        gl.store(dg + token * K + ck + offsets(C, BK, HV * K, COLUMN), dg_c, mask=within(rows, C, BK, COLUMN))
    if G == 1:
        t = gl.arange(0, C, layout=ROW)
        barrier()
        sums.store(gl.sum(dG, 1))
        barrier()
        # from the end: lanes share the sums, and what they add up must not hang on rows behind which nothing is left
        gl.store(dg + (token + t * HV) * PARTS + part, sums_from_the_end(sums.load(ROW)) + dtotal, mask=t < rows)
