"""The whole forward pass without erase and with at most one decay a head (README.md, section 7): a chunk goes through no memory.

Shapes: C rows a chunk, H key heads, HV value heads, K key size, V value size, BV value columns a program. Gates: 0 absent, 1 scalar, 2 channel.
Inputs are [rows, heads, channels] with row strides S_x: R rows a token, gates and own one (7.8).
"""

import triton
import triton.language as tl

from kernels.delta._triton.segments import carry, segment_chunks
from kernels.delta._triton.tree import chunk_rows, decayed, head_sums, wide


@triton.jit(do_not_specialize=["tokens", "per_sequence", "segments", "chunks"])
def scan_kernel(
    q, k, v, g, w, own, initial, local, decay, first_chunk, starts, lengths, o, S_all, final, scale, tokens, per_sequence, segments, chunks,
    S_Q: tl.constexpr, S_K: tl.constexpr, S_V: tl.constexpr, S_G: tl.constexpr, S_W: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    OWN: tl.constexpr, S_OWN: tl.constexpr, R: tl.constexpr,
    INITIAL: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a sequence, head, segment (of packed sequences there is one) and block of value columns. SAVE keeps the states before the chunks.
    `local` and `decay` are of `segments.py`, not read for one segment."""
    pid = tl.program_id(0)
    block, head, part = pid % (V // BV), pid // (V // BV) % HV, pid // (V // BV * HV)
    sequence, segment = part // segments, part % segments
    r, c, cv = tl.arange(0, C), tl.arange(0, K), block * BV + tl.arange(0, BV)
    dtype = v.dtype.element_ty
    q += (head // (HV // H)) * K
    k += (head // (HV // H)) * K
    g += head // (HV // HG)
    v += head * V
    o += head * V
    w += head * (V if W == 2 else 1)
    own += head
    first, end = segment_chunks(first_chunk, sequence, segment, per_sequence, chunks, PACKED)
    place, entry = sequence.to(tl.int64) * HV + head, c[:, None] * V + cv[None, :]
    whole = place * K * V + entry
    S = tl.zeros([K, BV], tl.float32)
    if INITIAL:
        S = tl.load(initial + whole)
    for before in range(segment):
        S = carry(S, local, decay, place * segments + before, K * V, entry)
    for chunk in range(first, end):
        start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
        inside = (r < rows)[:, None]
        S_d = S.to(dtype)
        if SAVE:
            tl.store(S_all + (wide(chunk) * HV + head) * K * V + entry, S_d)
        q_c = tl.load(q + start * S_Q + (r[:, None] * S_Q + c[None, :]), mask=inside, other=0.0)
        k_c = tl.load(k + start * S_K + (r[:, None] * S_K + c[None, :]), mask=inside, other=0.0)
        R_c = tl.load(v + start * S_V + (r[:, None] * S_V + cv[None, :]), mask=inside, other=0.0)
        if W == 2:
            R_c = (R_c.to(tl.float32) * tl.load(w + start * S_W + (r[:, None] * S_W + cv[None, :]), mask=inside, other=0.0).to(tl.float32)).to(dtype)
        read = tl.full([C], scale, tl.float32)  # what one number a row does is done on products, in float32; on rows for the state alone
        write = tl.full([C], 1.0, tl.float32)
        if W == 1:
            write = tl.load(w + (start // R) * S_W + (r // R) * S_W, mask=r < rows, other=0.0).to(tl.float32)
        P = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
        seen = (r // R)[:, None] >= (r // R)[None, :]
        if OWN:
            weight = tl.load(own + (start // R) * S_OWN + (r // R) * S_OWN, mask=r < rows, other=0.0).to(tl.float32)
            P *= tl.where((r // R)[:, None] == (r // R)[None, :], (scale * weight)[None, :], (scale * write)[None, :])
        else:
            P *= (scale * write)[None, :]
        if G:
            sums, rest, total, total_rest = head_sums(g + (start // R) * S_G, rows, S_G, C, R, EXACT)
            P *= decayed(sums[:, None], rest[:, None], sums[None, :], rest[None, :], EXACT)
            read *= decayed(sums, rest, 0.0, 0.0, EXACT)
            write *= decayed(total, total_rest, sums, rest, EXACT)
            S *= decayed(total, total_rest, 0.0, 0.0, EXACT)
        P = tl.where(seen, P, 0.0)  # behind all that it is multiplied by: a later weight, or decay, that is no number stays where it is
        o_c = tl.dot(q_c, S_d, input_precision=PRECISION) * read[:, None]
        o_c = tl.dot(P.to(dtype), R_c, o_c, input_precision=PRECISION)
        tl.store(o + start * (HV * V) + (r[:, None] * (HV * V) + cv[None, :]), o_c.to(dtype), mask=inside)
        if G or W == 1:
            R_c = (R_c.to(tl.float32) * write[:, None]).to(dtype)
        S = tl.dot(tl.trans(k_c), R_c, S, input_precision=PRECISION)
    if segment == segments - 1:
        tl.store(final + whole, S)
