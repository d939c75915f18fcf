"""Scores of a chunk under a decay per channel, by the tree of README.md, section 3.

Shapes: C = 64 rows a chunk, H key heads, HV value heads, K key size, BK channels a block. b: 0 absent, 1 scalar, 2 channel.
Inputs are [tokens, heads, channels] with token strides S_x; results [chunks, HV, C, ..].
"""

import triton
import triton.language as tl

from kernels.delta._triton.tree import between, chunk_rows, level_rows, n_chunks, running_sums, stack, wide


@triton.jit
def level_scores(
    q, k, b, sums, rest, P, T, scale, rows, h: tl.constexpr, S_Q: tl.constexpr, S_K: tl.constexpr, S_B: tl.constexpr, B: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and T between the halves of the blocks of 2h rows (README.md, 3.3): the rows of q and e stacked, so that both are one product.

    Rows past the end read the last one; nobody reads what comes of them (`solve.py`).
    """
    c = tl.arange(0, BK)
    dtype = k.dtype.element_ty
    lower, upper, anchor, block = level_rows(h, C)
    low, up = tl.minimum(lower, rows - 1), tl.minimum(upper, rows - 1)
    scores = tl.zeros([C if B else C // 2, C // 2], tl.float32)
    for kb in range(K // BK):
        at = kb * BK
        x_u = tl.exp2(between(sums + at, rest + at, upper, anchor, c, rows, S, EXACT))
        x_l = tl.exp2(between(sums + at, rest + at, anchor, lower, c, rows, S, EXACT))
        k_l = tl.load(k + at + (low[:, None] * S_K + c[None, :])).to(tl.float32) * x_l
        left = (tl.load(q + at + (up[:, None] * S_Q + c[None, :])).to(tl.float32) * x_u).to(dtype)
        if B:
            e = tl.load(k + at + (up[:, None] * S_K + c[None, :])).to(tl.float32)
            if B == 1:
                e *= tl.load(b + up * S_B).to(tl.float32)[:, None]
            else:
                e *= tl.load(b + at + (up[:, None] * S_B + c[None, :])).to(tl.float32)
            left = stack(left, (e * x_u).to(dtype))
        scores = tl.dot(left, tl.trans(k_l.to(dtype)), scores, input_precision=PRECISION)
    # rows of the result: the upper rows for P, then once more for T
    j = tl.arange(0, C if B else C // 2)
    i = j % (C // 2)
    to = ((i // h) * (2 * h) + i % h + h)[:, None] * C + lower[None, :]
    same = (i // h)[:, None] == block[None, :]
    tl.store(P + to, (scores * scale).to(P.dtype.element_ty), mask=same & (j < C // 2)[:, None])
    if B:
        tl.store(T + to, scores.to(T.dtype.element_ty), mask=same & (j >= C // 2)[:, None])


@triton.jit(do_not_specialize=["tokens", "per_sequence", "sequences"])
def scores_kernel(
    q, k, b, g, first_chunk, starts, lengths, sums, rest, P, T, scale, tokens, per_sequence, sequences,
    S_Q: tl.constexpr, S_K: tl.constexpr, S_B: tl.constexpr, S_G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, HB: tl.constexpr, HG: tl.constexpr,
    B: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program a chunk and head: G of every channel to `sums`, then q's scores to P and e's to T, both below the diagonal only."""
    work = tl.program_id(0)
    chunk, head = work // HV, work % HV
    if chunk >= n_chunks(first_chunk, per_sequence, sequences, PACKED):
        return
    start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
    sums += (start * HV + head) * K
    rest += (start * HV + head) * K
    running_sums(g + start * S_G + (head // (HV // HG)) * K, sums, rest, rows, S_G, HV * K, K, C, EXACT)
    q += start * S_Q + (head // (HV // H)) * K
    k += start * S_K + (head // (HV // H)) * K
    b += start * S_B + (head // (HV // HB)) * (K if B == 2 else 1)
    for level in tl.static_range(6):
        level_scores(
            q, k, b, sums, rest, P + wide(work) * C * C, T + wide(work) * C * C, scale, rows, 2**level,
            S_Q, S_K, S_B, B, HV * K, K, C, BK, EXACT, PRECISION,
        )  # fmt: skip
