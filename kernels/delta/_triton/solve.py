"""From the scores of a chunk to what the serial pass reads (README.md, 2.2): the inverse, Y, U, the decayed queries and keys.

Shapes: C = 64 rows a chunk, H key heads, HV value heads, K key size, V value size; BK, BV channels a block. Gates: 0 absent, 1 scalar, 2 channel.
Inputs are [tokens, heads, channels] with token strides S_x; results [chunks, HV, C, ..], rows past the end of a sequence zero.
"""

import triton
import triton.language as tl

from kernels.delta._triton.tree import channel_ends, chunk_rows, decay_ends, decay_tile, n_chunks, wide


@triton.jit
def plain_scores(
    q, k, b, rows, S_Q: tl.constexpr, S_K: tl.constexpr, S_B: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T and e k^T [C, C]: the scores without decay, all rows against all."""
    r, c = tl.arange(0, C), tl.arange(0, BK)
    inside = (r < rows)[:, None]
    P = tl.zeros([C, C], tl.float32)
    T = tl.zeros([C, C], tl.float32)
    for kb in range(K // BK):
        at = kb * BK
        k_c = tl.load(k + at + (r[:, None] * S_K + c[None, :]), mask=inside, other=0.0)
        P = tl.dot(tl.load(q + at + (r[:, None] * S_Q + c[None, :]), mask=inside, other=0.0), tl.trans(k_c), P, input_precision=PRECISION)
        if B == 2:
            e = k_c.to(tl.float32) * tl.load(b + at + (r[:, None] * S_B + c[None, :]), mask=inside, other=0.0).to(tl.float32)
            T = tl.dot(e.to(k_c.dtype), tl.trans(k_c), T, input_precision=PRECISION)
        if B == 1:
            T = tl.dot(k_c, tl.trans(k_c), T, input_precision=PRECISION)
    if B == 1:  # one gate a row: after the product, in float32
        T *= tl.load(b + r * S_B, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    return P, T


@triton.jit
def inverse(T, C: tl.constexpr, EXACT: tl.constexpr):
    """(I + T)^-1 for T [C, C] strictly lower, from the inverses of diagonal blocks of h rows to those of 2h: A - A T_h A, where T_h is T between the
    halves of the blocks. (Powers of T instead grow without a decay, and cancel.)

    Its products take float16, which has the 11 bits of tf32 and needs no transposed copies; for float32 inputs three tf32 products each.
    """
    r = tl.arange(0, C)
    parted = r[:, None] ^ r[None, :]  # rows part at level h if their indices differ at most in the bits up to h, and in that of h
    A = tl.where(r[:, None] == r[None, :], 1.0, tl.where(parted == 1, -T, 0.0))
    for level in tl.static_range(1, 6):
        T_h = tl.where((parted >> level) == 1, T, 0.0)
        if EXACT:
            A -= tl.dot(tl.dot(A, T_h, input_precision="tf32x3"), A, input_precision="tf32x3")
        else:
            A_h = A.to(tl.float16)
            A -= tl.dot(tl.dot(A_h, T_h.to(tl.float16)).to(tl.float16), A_h)
    return A


@triton.jit(do_not_specialize=["tokens", "per_sequence", "sequences"])
def solve_kernel(
    q, k, v, g, b, w, first_chunk, starts, lengths, sums, rest, T, P, A, Y, U, Qg, Ktail, gamma, scale, tokens, per_sequence, sequences,
    S_Q: tl.constexpr, S_K: tl.constexpr, S_V: tl.constexpr, S_G: tl.constexpr, S_B: tl.constexpr, S_W: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    G: tl.constexpr, B: tl.constexpr, W: tl.constexpr, HG: tl.constexpr, HB: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a chunk and head. With a decay per channel P and T hold the scores below the diagonal (`scores.py`), else they are made here."""
    work = tl.program_id(0)
    chunk, head = work // HV, work % HV
    if chunk >= n_chunks(first_chunk, per_sequence, sequences, PACKED):
        return
    r, c, cv = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    dtype = k.dtype.element_ty
    start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
    inside = (r < rows)[:, None]
    below = (r[:, None] > r[None, :]) & inside
    square = r[:, None] * C + r[None, :]
    at = wide(work) * C
    q += start * S_Q + (head // (HV // H)) * K
    k += start * S_K + (head // (HV // H)) * K
    v += start * S_V + head * V
    g += start * S_G + (head // (HV // HG)) * (K if G == 2 else 1)
    b += start * S_B + (head // (HV // HB)) * (K if B == 2 else 1)
    w += start * S_W + head * (V if W == 2 else 1)
    sums += (start * HV + head) * K
    rest += (start * HV + head) * K

    # --- scores, and the inverse; without erase A = I
    if G == 2:
        P_c = tl.load(P + at * C + square).to(tl.float32)
        diagonal = tl.zeros([C], tl.float32)
        if B:
            T_c = tl.load(T + at * C + square).to(tl.float32)
    else:
        P_c, T_c = plain_scores(q, k, b, rows, S_Q, S_K, S_B, B, K, C, BK, PRECISION)
        if G == 1:
            x = decay_tile(g, rows, S_G, C)
            P_c, T_c = P_c * x, T_c * x
        P_c *= scale
        diagonal = tl.sum(tl.where(r[:, None] == r[None, :], P_c, 0.0), 1)
    if B:
        A_c = inverse(tl.where(below, T_c, 0.0), C, EXACT).to(dtype)
        tl.store(A + at * C + square, A_c)

    # --- what multiplies the state: Qg, Ktail, Y
    if G == 0:
        tl.store(gamma + work, 1.0)
    if G == 1:
        from_start, to_end, total = decay_ends(g, rows, S_G, C)
        from_start, to_end = from_start[:, None], to_end[:, None]
        tl.store(gamma + work, total)
    for kb in range(K // BK):
        ck = kb * BK
        k_c = tl.load(k + ck + (r[:, None] * S_K + c[None, :]), mask=inside, other=0.0).to(tl.float32)
        q_c = tl.load(q + ck + (r[:, None] * S_Q + c[None, :]), mask=inside, other=0.0).to(tl.float32)
        if G == 2:
            from_start, to_end, total = channel_ends(sums, rest, ck, rows, HV * K, C, BK, EXACT)
            tl.store(gamma + wide(work) * K + ck + c, total)
            diagonal += scale * tl.sum(q_c * k_c, 1)
        to = at * K + ck + (r[:, None] * K + c[None, :])
        if B:
            e = k_c
            if B == 1:
                e *= tl.load(b + r * S_B, mask=r < rows, other=0.0).to(tl.float32)[:, None]
            else:
                e *= tl.load(b + ck + (r[:, None] * S_B + c[None, :]), mask=inside, other=0.0).to(tl.float32)
            if G:
                e *= from_start
            tl.store(Y + to, tl.dot(A_c, e.to(dtype), input_precision=PRECISION).to(dtype))
        if G:
            q_c, k_c = q_c * from_start, k_c * to_end
        tl.store(Qg + to, q_c.to(dtype))
        tl.store(Ktail + to, k_c.to(dtype))
    P_c = tl.where(below, P_c, 0.0)
    tl.store(P + at * C + square, tl.where(r[:, None] == r[None, :], diagonal[:, None], P_c).to(dtype))

    # --- what is written: U
    for vb in range(V // BV):
        ck = vb * BV
        z = tl.load(v + ck + (r[:, None] * S_V + cv[None, :]), mask=inside, other=0.0).to(tl.float32)
        if W == 1:
            z *= tl.load(w + r * S_W, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        if W == 2:
            z *= tl.load(w + ck + (r[:, None] * S_W + cv[None, :]), mask=inside, other=0.0).to(tl.float32)
        z = z.to(dtype)
        if B:
            z = tl.dot(A_c, z, input_precision=PRECISION).to(dtype)
        tl.store(U + at * V + ck + (r[:, None] * V + cv[None, :]), z)
