"""The whole backward pass without erase and with at most one decay a head (README.md, section 7).

Shapes: C rows a chunk, H key heads, HV value heads, K key size, V value size, BV value columns a program. Gates: 0 absent, 1 scalar, 2 channel.
Inputs are [rows, heads, channels] with row strides S_x, R rows a token, gates and own one; the states [chunks, HV, K, V]; results [rows, HV, V], and
where programs of a head have to be summed [rows or tokens, HV, V / BV, K or 1]. Tiles named _t are transposed, row j and column i: most products take
them from registers.
"""

import triton
import triton.language as tl

from kernels.delta._triton.segments import carry, segment_chunks
from kernels.delta._triton.tree import chunk_rows, decayed, head_sums, wide


@triton.jit
def decay_gradient(E_t, before, after, through, C: tl.constexpr, PRECISION: tl.constexpr):
    """dg [C] (7.7): row l takes what lies on both sides of it, E_t [j, i] of pairs i >= l > j. Only sums, from the end; no difference of sums."""
    r = tl.arange(0, C)
    from_l = (r[:, None] <= r[None, :]).to(E_t.dtype)
    across = tl.dot(from_l, tl.trans(E_t), input_precision=PRECISION)  # [l, j]
    across = tl.where(r[None, :] < r[:, None], across + after[None, :], 0.0)
    return tl.sum(across, 1) + tl.cumsum(before, 0, reverse=True) + through


@triton.jit
def by_token(x, R: tl.constexpr, C: tl.constexpr):
    """Sums [C / R] of x [C] over the rows of each token."""
    return tl.sum(tl.reshape(x, (C // R, R)), 1) if R > 1 else x


@triton.jit(do_not_specialize=["tokens", "per_sequence", "segments", "chunks"])
def dscan_kernel(
    q, k, v, g, w, own, S_all, do, dfinal, local, decay, first_chunk, starts, lengths, dq, dk, dv, dg, dw, down, dinitial, scale,
    tokens, per_sequence, segments, chunks,
    S_Q: tl.constexpr, S_K: tl.constexpr, S_V: tl.constexpr, S_G: tl.constexpr, S_W: tl.constexpr, S_O: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    OWN: tl.constexpr, S_OWN: tl.constexpr, R: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a sequence, head, segment (as in `scan.py`) and block of value columns, from the last chunk to the first."""
    PARTS: tl.constexpr = V // BV
    pid = tl.program_id(0)
    part, head = pid % PARTS, pid // PARTS % HV
    sequence, segment = pid // (PARTS * HV) // segments, pid // (PARTS * HV) % segments
    r, c, cv = tl.arange(0, C), tl.arange(0, K), part * BV + tl.arange(0, BV)
    dtype = v.dtype.element_ty
    VW: tl.constexpr = V if W == 2 else 1
    q += (head // (HV // H)) * K
    k += (head // (HV // H)) * K
    g += head // (HV // HG)
    v += head * V
    do += head * V
    w += head * VW
    own += head
    first, end = segment_chunks(first_chunk, sequence, segment, per_sequence, chunks, PACKED)
    place, entry = sequence.to(tl.int64) * HV + head, c[:, None] * V + cv[None, :]
    whole = place * K * V + entry
    dS = tl.load(dfinal + whole)
    for behind in range(segments - 1 - segment):
        dS = carry(dS, local, decay, place * segments + (segments - 1 - behind), K * V, entry)
    for n in range(0, end - first):
        chunk = end - 1 - n
        start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
        inside = (r < rows)[:, None]
        token = start * HV + head  # of results
        summed = token * PARTS + part
        of_token = ((start // R) * HV + head) * PARTS + part  # and rows / R tokens from there on
        t = tl.arange(0, C // R)
        k_c = tl.load(k + start * S_K + (r[:, None] * S_K + c[None, :]), mask=inside, other=0.0)
        q_c = tl.load(q + start * S_Q + (r[:, None] * S_Q + c[None, :]), mask=inside, other=0.0)
        do_c = tl.load(do + start * S_O + (r[:, None] * S_O + cv[None, :]), mask=inside, other=0.0)
        S_d = tl.load(S_all + (wide(chunk) * HV + head) * K * V + entry)
        v_c = tl.load(v + start * S_V + (r[:, None] * S_V + cv[None, :]), mask=inside, other=0.0)
        dS_d = dS.to(dtype)
        R_c = v_c  # what is written, R in README.md
        read = tl.full([C], scale, tl.float32)  # what one number a row does is done on products, in float32; on rows for the state alone
        tail = tl.full([C], 1.0, tl.float32)
        write = tail
        if W == 1:
            write = tl.load(w + (start // R) * S_W + (r // R) * S_W, mask=r < rows, other=0.0).to(tl.float32)
        if W == 2:
            w_c = tl.load(w + start * S_W + (r[:, None] * S_W + cv[None, :]), mask=inside, other=0.0).to(tl.float32)
            R_c = (v_c.to(tl.float32) * w_c).to(dtype)
        if G:
            sums, rest, total, total_rest = head_sums(g + (start // R) * S_G, rows, S_G, C, R, EXACT)
            read *= decayed(sums, rest, 0.0, 0.0, EXACT)
            tail *= decayed(total, total_rest, sums, rest, EXACT)

        # --- the state, first: what else needs its gradient has it in `dtype`, and its other factors leave the registers
        if G:
            dS *= decayed(total, total_rest, 0.0, 0.0, EXACT)
            through = tl.sum(dS * S_d.to(tl.float32))
        dS = tl.dot(tl.trans(q_c), (do_c.to(tl.float32) * read[:, None]).to(dtype), dS, input_precision=PRECISION)

        # --- the scores, and their gradients times scale and decay; masked behind the weights, as in the forward pass
        seen = (r // R)[None, :] >= (r // R)[:, None]
        P_t = tl.where(seen, tl.dot(k_c, tl.trans(q_c), input_precision=PRECISION), 0.0)
        dA_t = tl.dot(R_c, tl.trans(do_c), input_precision=PRECISION)
        x = scale
        if G:
            x *= tl.where(seen, decayed(sums[None, :], rest[None, :], sums[:, None], rest[:, None], EXACT), 0.0)
        if OWN:
            same = (r // R)[None, :] == (r // R)[:, None]
            weight = tl.load(own + (start // R) * S_OWN + (r // R) * S_OWN, mask=r < rows, other=0.0).to(tl.float32)
            dA_t *= x
            E_t = dA_t * P_t  # of pairs without their weights
            of_own = by_token(tl.sum(tl.where(same, E_t, 0.0), 1), R, C)
            tl.store(down + of_token + t * (HV * PARTS), of_own.to(down.dtype.element_ty), mask=t * R < rows)
            of_write = tl.sum(tl.where(same, 0.0, E_t), 1)
            weights = tl.where(same, weight[:, None], write[:, None])
            dA_t = tl.where(seen, dA_t * weights, 0.0)
            x *= tl.where(seen, weights, 0.0)
        else:
            dA_t = tl.where(seen, dA_t * write[:, None], 0.0) * x
        if G:
            E_t = (dA_t * P_t).to(dtype)
        dA_t, P_t = dA_t.to(dtype), (P_t * x).to(dtype)

        # --- values and write gate
        dR = tl.dot(k_c, dS_d, input_precision=PRECISION)
        if G or OWN:
            through_v = tl.sum(dR * R_c.to(tl.float32), 1) * tail
        if G:
            after = through_v * write
        if OWN:
            if W == 1:
                of_write = by_token(of_write + through_v, R, C)
                tl.store(dw + of_token + t * (HV * PARTS), of_write.to(dw.dtype.element_ty), mask=t * R < rows)
            dR = tl.dot(P_t, do_c, dR * (tail * write)[:, None], input_precision=PRECISION)
        else:
            dR = tl.dot(P_t, do_c, dR * tail[:, None], input_precision=PRECISION)
            if W == 1:
                of_write = by_token(tl.sum(dR * v_c.to(tl.float32), 1), R, C)
                tl.store(dw + of_token + t * (HV * PARTS), of_write.to(dw.dtype.element_ty), mask=t * R < rows)
                dR *= write[:, None]
        if W == 2:
            tl.store(dw + token * V + (r[:, None] * (HV * V) + cv[None, :]), (dR * v_c.to(tl.float32)).to(dw.dtype.element_ty), mask=inside)
            dR *= w_c
        tl.store(dv + token * V + (r[:, None] * (HV * V) + cv[None, :]), dR.to(dv.dtype.element_ty), mask=inside)

        # --- keys and queries
        dk_c = tl.dot(R_c, tl.trans(dS_d), input_precision=PRECISION) * (write * tail)[:, None]
        dk_c = tl.dot(dA_t, q_c, dk_c, input_precision=PRECISION)
        tl.store(dk + summed * K + (r[:, None] * (HV * PARTS * K) + c[None, :]), dk_c.to(dk.dtype.element_ty), mask=inside)
        dq_c = tl.dot(do_c, tl.trans(S_d), input_precision=PRECISION) * read[:, None]
        if G:
            before = tl.sum(dq_c * q_c.to(tl.float32), 1)
        dq_c = tl.dot(tl.trans(dA_t), k_c, dq_c, input_precision=PRECISION)
        tl.store(dq + summed * K + (r[:, None] * (HV * PARTS * K) + c[None, :]), dq_c.to(dq.dtype.element_ty), mask=inside)

        if G:
            dg_c = decay_gradient(E_t, before, after, through, C, PRECISION)
            tl.store(dg + of_token + (r // R) * (HV * PARTS), dg_c, mask=(r < rows) & (r % R == 0))
    if segment == 0:
        tl.store(dinitial + whole, dS)
