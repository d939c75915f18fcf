"""The serial half of the backward pass without erase, for heads that share queries and keys (README.md, section 7): the gradients of the states
behind the chunks. `_gluon/dchunks.py` makes the rest from them.

Shapes: as in `scan.py`; inputs of 16 bits. `numbers` [chunks, HV, 4, C], float32, are what the rest has to know of the rows of a chunk: the running
sum of the decay in log 2; the write gate; x(C, row); and x(C, 0), the same in every row.
"""

import triton
import triton.language as tl

from kernels.delta._triton.segments import carry, segment_chunks
from kernels.delta._triton.tree import chunk_rows, decayed, head_sums, wide

# the order of `numbers`
SUMS, WRITE, TAIL, GAMMA, NUMBERS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)


@triton.jit(do_not_specialize=["tokens", "per_sequence", "segments", "chunks"])
def dstates_kernel(
    q, g, w, do, dfinal, local, decay, first_chunk, starts, lengths, dS_all, numbers, dinitial, scale, tokens, per_sequence, segments, chunks,
    S_Q: tl.constexpr, S_G: tl.constexpr, S_W: tl.constexpr, S_O: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a sequence, head, segment (as in `scan.py`) and block of value columns, from the last chunk to the first."""
    pid = tl.program_id(0)
    block, head, part = pid % (V // BV), pid // (V // BV) % HV, pid // (V // BV * HV)
    sequence, segment = part // segments, part % segments
    r, c, cv = tl.arange(0, C), tl.arange(0, K), block * BV + tl.arange(0, BV)
    dtype = do.dtype.element_ty
    q += (head // (HV // H)) * K
    g += head // (HV // HG)
    do += head * V
    w += head
    first, end = segment_chunks(first_chunk, sequence, segment, per_sequence, chunks, PACKED)
    place, entry = sequence.to(tl.int64) * HV + head, c[:, None] * V + cv[None, :]
    dS = tl.load(dfinal + place * K * V + entry)
    for behind in range(segments - 1 - segment):
        dS = carry(dS, local, decay, place * segments + (segments - 1 - behind), K * V, entry)
    for n in range(0, end - first):
        chunk = end - 1 - n
        start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
        inside = (r < rows)[:, None]
        at = wide(chunk) * HV + head
        q_c = tl.load(q + start * S_Q + (r[:, None] * S_Q + c[None, :]), mask=inside, other=0.0)
        do_c = tl.load(do + start * S_O + (r[:, None] * S_O + cv[None, :]), mask=inside, other=0.0)
        tl.store(dS_all + at * K * V + entry, dS.to(dtype))
        sums, rest, total, total_rest = head_sums(g + start * S_G, rows, S_G, C, 1, False)
        gamma = decayed(total, total_rest, 0.0, 0.0, False)
        write = tl.full([C], 1.0, tl.float32)
        if W:
            write = tl.load(w + start * S_W + r * S_W, mask=r < rows, other=0.0).to(tl.float32)
        if block == 0:
            of_chunk = numbers + at * (NUMBERS * C) + r
            tl.store(of_chunk + SUMS * C, sums)
            tl.store(of_chunk + WRITE * C, write)
            tl.store(of_chunk + TAIL * C, decayed(total, total_rest, sums, rest, False))
            tl.store(of_chunk + GAMMA * C, r * 0.0 + gamma)
        read = scale * decayed(sums, rest, 0.0, 0.0, False)
        dS *= gamma
        dS = tl.dot(tl.trans(q_c), (do_c.to(tl.float32) * read[:, None]).to(dtype), dS)
    if segment == 0:
        tl.store(dinitial + place * K * V + entry, dS)
