"""The serial pass backwards (README.md, 4.1 and 4.3): gradients of the residuals and of the states.

Shapes: C rows a chunk, HV value heads, K key size, V value size, BV value columns a program. Inputs are those of `solve.py`.
"""

import triton
import triton.language as tl

from kernels.delta._triton.tree import chunk_rows, wide


@triton.jit(do_not_specialize=["tokens", "per_sequence"])
def dstate_kernel(
    Y, P, Qg, Ktail, gamma, do, dfinal, first_chunk, starts, lengths, dR, dS_all, dinitial, scale, tokens, per_sequence,
    S_O: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a sequence, head and block of value columns. dS_all holds the gradients of the states behind the chunks."""
    pid = tl.program_id(0)
    block, head, sequence = pid % (V // BV), pid // (V // BV) % HV, pid // (V // BV * HV)
    r, c, cv = tl.arange(0, C), tl.arange(0, K), block * BV + tl.arange(0, BV)
    dtype = dR.dtype.element_ty
    if PACKED:
        first, end = tl.load(first_chunk + sequence), tl.load(first_chunk + sequence + 1)
    else:
        first, end = sequence * per_sequence, (sequence + 1) * per_sequence
    whole = (sequence.to(tl.int64) * HV + head) * K * V + (c[:, None] * V + cv[None, :])
    dS = tl.load(dfinal + whole)
    for i in range(0, end - first):
        chunk = end - 1 - i
        start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
        at = wide(chunk) * HV + head
        dS_d = dS.to(dtype)
        tl.store(dS_all + at * K * V + (c[:, None] * V + cv[None, :]), dS_d)
        do_c = tl.load(do + start * S_O + head * V + (r[:, None] * S_O + cv[None, :]), mask=(r < rows)[:, None], other=0.0)
        P_c = tl.load(P + at * C * C + (r[:, None] * C + r[None, :]))
        K_c = tl.load(Ktail + at * C * K + (r[:, None] * K + c[None, :]))
        dR_c = tl.dot(K_c, dS_d, input_precision=PRECISION)
        dR_c = tl.dot(tl.trans(P_c), do_c, dR_c, input_precision=PRECISION).to(dtype)
        tl.store(dR + at * C * V + (r[:, None] * V + cv[None, :]), dR_c)
        if G == 1:
            dS *= tl.load(gamma + at)
        if G == 2:
            dS *= tl.load(gamma + at * K + c)[:, None]
        Q_c = tl.load(Qg + at * C * K + (r[:, None] * K + c[None, :]))
        dS += scale * tl.dot(tl.trans(Q_c), do_c, input_precision=PRECISION)
        if B:
            Y_c = tl.load(Y + at * C * K + (r[:, None] * K + c[None, :]))
            dS -= tl.dot(tl.trans(Y_c), dR_c, input_precision=PRECISION)
    tl.store(dinitial + whole, dS)
