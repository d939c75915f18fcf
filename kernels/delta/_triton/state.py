"""The serial pass over the chunks of a sequence (README.md, 2.3 to 2.5): residuals, outputs, states.

Shapes: C rows a chunk, HV value heads, K key size, V value size, BV value columns a program. Inputs are those of `solve.py`.
"""

import triton
import triton.language as tl

from kernels.delta._triton.tree import chunk_rows, wide


@triton.jit(do_not_specialize=["tokens", "per_sequence"])
def state_kernel(
    Y, U, P, Qg, Ktail, gamma, initial, first_chunk, starts, lengths, o, S_all, final, scale, tokens, per_sequence,
    S_O: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    INITIAL: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a sequence, head and block of value columns. SAVE keeps the states before the chunks, and R in U's place."""
    pid = tl.program_id(0)
    block, head, sequence = pid % (V // BV), pid // (V // BV) % HV, pid // (V // BV * HV)
    r, c, cv = tl.arange(0, C), tl.arange(0, K), block * BV + tl.arange(0, BV)
    dtype = U.dtype.element_ty
    if PACKED:
        first, end = tl.load(first_chunk + sequence), tl.load(first_chunk + sequence + 1)
    else:
        first, end = sequence * per_sequence, (sequence + 1) * per_sequence
    whole = (sequence.to(tl.int64) * HV + head) * K * V + (c[:, None] * V + cv[None, :])
    S = tl.zeros([K, BV], tl.float32)
    if INITIAL:
        S = tl.load(initial + whole)
    for chunk in range(first, end):
        start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
        at = wide(chunk) * HV + head
        S_d = S.to(dtype)
        if SAVE:
            tl.store(S_all + at * K * V + (c[:, None] * V + cv[None, :]), S_d)
        u_at = at * C * V + (r[:, None] * V + cv[None, :])
        R = tl.load(U + u_at)
        if B:
            Y_c = tl.load(Y + at * C * K + (r[:, None] * K + c[None, :]))
            R = (R.to(tl.float32) - tl.dot(Y_c, S_d, input_precision=PRECISION)).to(dtype)
            if SAVE:
                tl.store(U + u_at, R)
        o_c = scale * tl.dot(tl.load(Qg + at * C * K + (r[:, None] * K + c[None, :])), S_d, input_precision=PRECISION)
        o_c = tl.dot(tl.load(P + at * C * C + (r[:, None] * C + r[None, :])), R, o_c, input_precision=PRECISION)
        tl.store(o + start * S_O + head * V + (r[:, None] * S_O + cv[None, :]), o_c.to(dtype), mask=(r < rows)[:, None])
        if G == 1:
            S *= tl.load(gamma + at)
        if G == 2:
            S *= tl.load(gamma + at * K + c)[:, None]
        K_c = tl.load(Ktail + at * C * K + (r[:, None] * K + c[None, :]))
        S = tl.dot(tl.trans(K_c), R, S, input_precision=PRECISION)
    tl.store(final + whole, S)
