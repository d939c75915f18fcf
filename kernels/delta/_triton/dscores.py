"""Gradients of queries, keys, decay and erase gate (README.md, 4.4 and 4.6 to 4.9), all chunks and blocks of channels at once.

Shapes: C = 64 rows a chunk, H key heads, HV value heads, K key size, V value size, BK channels a program, BV value columns a block.
Gates: 0 absent, 1 scalar, 2 channel. Inputs are [tokens, heads, channels] with token strides S_x or [chunks, HV, C, ..]; results
[tokens, HV, K], and for scalar gates [tokens, HV, K / BK], a part a program.
"""

import triton
import triton.language as tl

from kernels.delta._triton.tree import between, channel_ends, chunk_rows, decay_ends, n_chunks, wide


@triton.jit
def state_gradients(
    do, dZ, R, S, dS, rows, S_O: tl.constexpr, B: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQg, dEbar, dKtail [C, BK] (4.4, 4.5) and the row sums of dS * S [BK], for a block of rows of the states."""
    r, c, cv = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    dQg = tl.zeros([C, BK], tl.float32)
    dEbar = tl.zeros([C, BK], tl.float32)
    dKtail = tl.zeros([C, BK], tl.float32)
    dgamma = tl.zeros([BK], tl.float32)
    for vb in range(V // BV):
        at = vb * BV
        S_c = tl.load(S + at + (c[:, None] * V + cv[None, :]))
        dS_c = tl.load(dS + at + (c[:, None] * V + cv[None, :]))
        dgamma += tl.sum(S_c.to(tl.float32) * dS_c.to(tl.float32), 1)
        do_c = tl.load(do + at + (r[:, None] * S_O + cv[None, :]), mask=(r < rows)[:, None], other=0.0)
        dQg = tl.dot(do_c, tl.trans(S_c), dQg, input_precision=PRECISION)
        if B:
            dEbar = tl.dot(-tl.load(dZ + at + (r[:, None] * V + cv[None, :])), tl.trans(S_c), dEbar, input_precision=PRECISION)
        dKtail = tl.dot(tl.load(R + at + (r[:, None] * V + cv[None, :])), tl.trans(dS_c), dKtail, input_precision=PRECISION)
    return dQg, dEbar, dKtail, dgamma


@triton.jit
def add_level(
    dq, de, dk, q, k, e, dP, dT, sums, rest, rows, level, B: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds (4.6) between the halves of the blocks of 2h rows, h = 2^level; pointers dP and dT [C, C]."""
    r, c = tl.arange(0, C), tl.arange(0, BK)
    square = r[:, None] * C + r[None, :]
    dtype = dP.dtype.element_ty
    anchor = ((r >> (level + 1)) << (level + 1)) + (1 << level) - 1
    x = tl.exp2(-tl.abs(between(sums, rest, r, anchor, c, rows, S, EXACT)))  # x(r, a) or x(a, s), by the row's half
    upper = ((r >> level) & 1 == 1)[:, None]
    x_u, x_l = tl.where(upper, x, 0.0), tl.where(upper, 0.0, x)
    block = (r[:, None] ^ r[None, :]) >> level < 2
    k_l, q_u = (k * x_l).to(dtype), (q * x_u).to(dtype)
    d = tl.where(block, tl.load(dP + square), 0.0).to(dtype)
    dq += tl.dot(d, k_l, input_precision=PRECISION) * x_u
    dk_l = tl.dot(tl.trans(d), q_u, input_precision=PRECISION)
    if B:
        d = tl.where(block, tl.load(dT + square), 0.0).to(dtype)
        de += tl.dot(d, k_l, input_precision=PRECISION) * x_u
        dk_l = tl.dot(tl.trans(d), (e * x_u).to(dtype), dk_l, input_precision=PRECISION)
    dk += dk_l * x_l
    return dq, de, dk


@triton.jit
def plain_gradients(dq, de, dk, q, k, e, dP, dT, B: tl.constexpr, PRECISION: tl.constexpr):
    """The same for scores whose decay is on the tile [C, C]: dP and dT already times x."""
    dtype = dP.dtype
    k, q = k.to(dtype), q.to(dtype)
    dq = tl.dot(dP, k, dq, input_precision=PRECISION)
    dk = tl.dot(tl.trans(dP), q, dk, input_precision=PRECISION)
    if B:
        de = tl.dot(dT, k, de, input_precision=PRECISION)
        dk = tl.dot(tl.trans(dT), e.to(dtype), dk, input_precision=PRECISION)
    return dq, de, dk


@triton.jit(do_not_specialize=["tokens", "per_sequence", "sequences"])
def dscores_kernel(
    q, k, g, b, first_chunk, starts, lengths, R, S, do, dZ, dS, dP, dT, sums, rest, dq, dk, dg, db, scale, tokens, per_sequence, sequences,
    S_Q: tl.constexpr, S_K: tl.constexpr, S_G: tl.constexpr, S_B: tl.constexpr, S_O: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    HG: tl.constexpr, HB: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a chunk, head and block of channels."""
    PARTS: tl.constexpr = K // BK
    part, work = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    chunk, head = work // HV, work % HV
    if chunk >= n_chunks(first_chunk, per_sequence, sequences, PACKED):
        return
    start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
    r, c = tl.arange(0, C), tl.arange(0, BK)
    inside, square = (r < rows)[:, None], r[:, None] * C + r[None, :]
    at, ck = wide(work), wide(part) * BK
    row = wide(tl.program_id(0)) * BK  # of the states [chunks, HV, K, V]
    q += start * S_Q + (head // (HV // H)) * K + ck
    k += start * S_K + (head // (HV // H)) * K + ck
    g += start * S_G + head // (HV // HG)  # read for a scalar gate only
    b += start * S_B + (head // (HV // HB)) * (K if B == 2 else 1) + (ck if B == 2 else 0)
    sums += (start * HV + head) * K + ck
    rest += (start * HV + head) * K + ck
    dq_c, de_c, dk_c, dgamma = state_gradients(
        do + start * S_O + head * V, dZ + at * C * V, R + at * C * V, S + row * V, dS + row * V, rows,
        S_O, B, V, C, BK, BV, PRECISION,
    )  # fmt: skip
    k_c = tl.load(k + (r[:, None] * S_K + c[None, :]), mask=inside, other=0.0).to(tl.float32)
    q_c = tl.load(q + (r[:, None] * S_Q + c[None, :]), mask=inside, other=0.0).to(tl.float32)
    e_c = k_c
    if B == 1:
        b_c = tl.load(b + r * S_B, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    if B == 2:
        b_c = tl.load(b + (r[:, None] * S_B + c[None, :]), mask=inside, other=0.0).to(tl.float32)
    if B:
        e_c *= b_c
    if G:
        if G == 2:
            from_start, to_end, total = channel_ends(sums, rest, 0, rows, HV * K, C, BK, EXACT)
        else:
            from_start, to_end, total = decay_ends(g, rows, S_G, C)
            from_start, to_end = from_start[:, None], to_end[:, None]
        dq_c, de_c, dk_c = dq_c * from_start, de_c * from_start, dk_c * to_end
        dtotal = total * dgamma + tl.sum(k_c * dk_c, 0)
    dq_c *= scale  # dP has it already
    dP += at * C * C
    dT += at * C * C
    if G == 2:
        for level in range(6):
            dq_c, de_c, dk_c = add_level(dq_c, de_c, dk_c, q_c, k_c, e_c, dP, dT, sums, rest, rows, level, B, HV * K, C, BK, EXACT, PRECISION)
    else:
        dP_c = tl.load(dP + square)
        dT_c = dP_c
        if B:
            dT_c = tl.load(dT + square)
        dq_c, de_c, dk_c = plain_gradients(dq_c, de_c, dk_c, q_c, k_c, e_c, dP_c, dT_c, B, PRECISION)
    token = start * HV + head  # of results
    to = token * K + ck + (r[:, None] * (HV * K) + c[None, :])
    if G:
        dG = q_c * dq_c - k_c * dk_c  # (4.8)
        if B:
            dG += e_c * de_c
        if G == 2:
            dg_c = tl.cumsum(dG, 0, reverse=True) + dtotal[None, :]
            tl.debug_barrier()  # dg takes the memory of the sums, which have all been read
            tl.store(dg + to, dg_c, mask=inside)
            diagonal = tl.load(dP + r * (C + 1)).to(tl.float32)[:, None]  # it has no decay
            dq_c += diagonal * k_c
            dk_c += diagonal * q_c
        else:
            dg_r = tl.cumsum(tl.sum(dG, 1), 0, reverse=True) + tl.sum(dtotal, 0)
            tl.store(dg + (token + r * HV) * PARTS + part, dg_r, mask=r < rows)
    if B:
        dk_c += b_c * de_c
    if B == 1:
        tl.store(db + (token + r * HV) * PARTS + part, tl.sum(k_c * de_c, 1), mask=r < rows)
    if B == 2:
        tl.store(db + to, (k_c * de_c).to(db.dtype.element_ty), mask=inside)
    tl.store(dq + to, dq_c.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + to, dk_c.to(dk.dtype.element_ty), mask=inside)
