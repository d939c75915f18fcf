"""What a segment of a sequence adds to its state, or to the state's gradient (README.md, section 7), so that the segments can then go side by side.

Shapes: as in `scan.py`; N segments of a sequence, of so many chunks each, the last one of what is left.
"""

import triton
import triton.language as tl

from kernels.delta._triton.tree import chunk_rows, decayed, head_sums


@triton.jit
def segment_chunks(first_chunk, sequence, segment, per_sequence, chunks, PACKED: tl.constexpr):
    """The first chunk of a segment and the one behind its last; of packed sequences all are whole."""
    if PACKED:
        first, end = tl.load(first_chunk + sequence), tl.load(first_chunk + sequence + 1)
    else:
        first = sequence * per_sequence + segment * chunks
        end = tl.minimum(first + chunks, (sequence + 1) * per_sequence)
    return first, end


@triton.jit
def carry(S, local, decay, at, size, entry):
    """The state on one side of a segment from the state S on the other; `at`: the segment's place in `decay` [..] and `local` [.., K, V]; `size`: K
    times V; `entry`: which of a state's entries S holds."""
    return S * tl.load(decay + at) + tl.load(local + at * size + entry)


@triton.jit(do_not_specialize=["tokens", "per_sequence", "segments", "chunks"])
def segments_kernel(
    x, y, g, w, local, decay, scale, tokens, per_sequence, segments, chunks,
    S_X: tl.constexpr, S_Y: tl.constexpr, S_G: tl.constexpr, S_W: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    R: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, BACK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a sequence, head, segment and block of value columns. x, y, scale are k, v, 1; BACK: q, dO and the op's scale, from the
    last chunk to the first.

    Leaves (7.3) from S_0 = 0, or dS_0 of (7.6) from dS_C = 0, of a whole segment in `local` [sequences, HV, N, K, V], and its gamma in `decay`.
    A segment that no other follows, in the order of the pass, has no program.
    """
    pid = tl.program_id(0)
    block, head, part = pid % (V // BV), pid // (V // BV) % HV, pid // (V // BV * HV)
    sequence, segment = part // (segments - 1), part % (segments - 1) + BACK
    r, c, cv = tl.arange(0, C), tl.arange(0, K), block * BV + tl.arange(0, BV)
    dtype = y.dtype.element_ty
    x += (head // (HV // H)) * K
    g += head // (HV // HG)
    y += head * V
    w += head * (V if W == 2 else 1)
    first, end = segment_chunks(None, sequence, segment, per_sequence, chunks, False)
    S = tl.zeros([K, BV], tl.float32)
    gamma = tl.full((), 1.0, tl.float32)
    for n in range(0, end - first):
        chunk = end - 1 - n if BACK else first + n
        start, rows = chunk_rows(chunk, None, None, tokens, per_sequence, False, C)
        inside = (r < rows)[:, None]
        x_c = tl.load(x + start * S_X + (r[:, None] * S_X + c[None, :]), mask=inside, other=0.0)
        y_c = tl.load(y + start * S_Y + (r[:, None] * S_Y + cv[None, :]), mask=inside, other=0.0)
        weight = tl.full([C], scale, tl.float32)  # as in `scan.py`, `dscan.py`: on what is then rounded
        if W == 2:
            y_c = (y_c.to(tl.float32) * tl.load(w + start * S_W + (r[:, None] * S_W + cv[None, :]), mask=inside, other=0.0).to(tl.float32)).to(dtype)
        if W == 1:
            weight *= tl.load(w + (start // R) * S_W + (r // R) * S_W, mask=r < rows, other=0.0).to(tl.float32)
        if G:
            sums, rest, total, total_rest = head_sums(g + (start // R) * S_G, rows, S_G, C, R, EXACT)
            across = decayed(total, total_rest, 0.0, 0.0, EXACT)
            S *= across
            gamma *= across
            if BACK:
                weight *= decayed(sums, rest, 0.0, 0.0, EXACT)
            else:
                weight *= decayed(total, total_rest, sums, rest, EXACT)
        S = tl.dot(tl.trans(x_c), (y_c.to(tl.float32) * weight[:, None]).to(dtype), S, input_precision=PRECISION)
    at = (sequence.to(tl.int64) * HV + head) * segments + segment
    tl.store(local + at * (K * V) + (c[:, None] * V + cv[None, :]), S)
    tl.store(decay + at, gamma, mask=block == 0)
