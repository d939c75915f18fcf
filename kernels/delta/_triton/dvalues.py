"""Gradients of the values and of the scores (README.md, 4.2 and 4.5), all chunks at once.

Shapes: C = 64 rows a chunk, HV value heads, K key size, V value size, BV value columns a block. Gates: 0 absent, 1 scalar, 2 channel.
Inputs are [tokens, heads, channels] with token strides S_x or [chunks, HV, C, ..]; results [tokens, HV, V] and [chunks, HV, C, ..].
"""

import triton
import triton.language as tl

from kernels.delta._triton.tree import chunk_rows, decay_tile, n_chunks, running_sums, wide


@triton.jit
def value_gradients(
    A, dZ, v, w, dv, dw, rows, S_V: tl.constexpr, S_W: tl.constexpr, S_DV: tl.constexpr, S_DW: tl.constexpr, W: tl.constexpr, B: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dZ = A^T dR, which takes dR's place, and from it dv and dw."""
    r, cv = tl.arange(0, C), tl.arange(0, BV)
    inside = (r < rows)[:, None]
    if B:
        A_t = tl.trans(tl.load(A + (r[:, None] * C + r[None, :])))
    if W == 1:
        w_r = tl.load(w + r * S_W, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        dw_r = tl.zeros([C], tl.float32)
    for vb in range(V // BV):
        at = vb * BV
        dZ_c = tl.load(dZ + at + (r[:, None] * V + cv[None, :]))
        if B:
            dZ_c = tl.dot(A_t, dZ_c, input_precision=PRECISION)
            tl.store(dZ + at + (r[:, None] * V + cv[None, :]), dZ_c.to(dZ.dtype.element_ty))
        dv_c = dZ_c.to(tl.float32)
        if W:
            v_c = tl.load(v + at + (r[:, None] * S_V + cv[None, :]), mask=inside, other=0.0).to(tl.float32)
            if W == 1:
                dw_r += tl.sum(dv_c * v_c, 1)
                dv_c *= w_r
            else:
                tl.store(dw + at + (r[:, None] * S_DW + cv[None, :]), (dv_c * v_c).to(dw.dtype.element_ty), mask=inside)
                dv_c *= tl.load(w + at + (r[:, None] * S_W + cv[None, :]), mask=inside, other=0.0).to(tl.float32)
        tl.store(dv + at + (r[:, None] * S_DV + cv[None, :]), dv_c.to(dv.dtype.element_ty), mask=inside)
    if W == 1:
        tl.store(dw + r * S_DW, dw_r.to(dw.dtype.element_ty), mask=r < rows)
    tl.debug_barrier()


@triton.jit
def score_gradients(
    do, dZ, R, g, scale, rows, S_O: tl.constexpr, S_G: tl.constexpr, G: tl.constexpr, B: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP, times scale, and dT [C, C] (4.5); both times the decay between row and column where it is one number a head."""
    r, cv = tl.arange(0, C), tl.arange(0, BV)
    below = r[:, None] > r[None, :]
    dtype = R.dtype.element_ty
    dP = tl.zeros([C, C], tl.float32)
    dT = tl.zeros([C, C], tl.float32)
    for vb in range(V // BV):
        at = vb * BV
        R_t = tl.trans(tl.load(R + at + (r[:, None] * V + cv[None, :])))
        do_c = tl.load(do + at + (r[:, None] * S_O + cv[None, :]), mask=(r < rows)[:, None], other=0.0)
        dP = tl.dot(do_c, R_t, dP, input_precision=PRECISION)
        if B:
            dT = tl.dot(-tl.load(dZ + at + (r[:, None] * V + cv[None, :])), R_t, dT, input_precision=PRECISION)
    if G == 1:
        x = decay_tile(g, rows, S_G, C)
        dP, dT = dP * x, dT * x
    dP = tl.where(below | (r[:, None] == r[None, :]), dP * scale, 0.0)
    return dP.to(dtype), tl.where(below, dT, 0.0).to(dtype)


@triton.jit(do_not_specialize=["tokens", "per_sequence", "sequences"])
def dvalues_kernel(
    v, g, w, first_chunk, starts, lengths, A, R, do, dZ, dP, dT, sums, rest, dv, dw, scale, tokens, per_sequence, sequences,
    S_V: tl.constexpr, S_G: tl.constexpr, S_W: tl.constexpr, S_O: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, B: tl.constexpr, W: tl.constexpr, PACKED: tl.constexpr, SCORES: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a chunk and head. dZ holds dR and is overwritten; SCORES: for the next launch dP, dT and, to `sums`, G of every channel."""
    work = tl.program_id(0)
    chunk, head = work // HV, work % HV
    if chunk >= n_chunks(first_chunk, per_sequence, sequences, PACKED):
        return
    start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
    at, token = wide(work) * C, start * HV + head
    do += start * S_O + head * V
    g += start * S_G + (head // (HV // HG)) * (K if G == 2 else 1)
    VW: tl.constexpr = V if W == 2 else 1
    value_gradients(
        A + at * C, dZ + at * V, v + start * S_V + head * V, w + start * S_W + head * VW, dv + token * V, dw + token * VW, rows,
        S_V, S_W, HV * V, HV * VW, W, B, V, C, BV, PRECISION,
    )  # fmt: skip
    if SCORES:
        dP_c, dT_c = score_gradients(do, dZ + at * V, R + at * V, g, scale, rows, S_O, S_G, G, B, V, C, BV, PRECISION)
        square = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
        tl.store(dP + at * C + square, dP_c)
        if B:
            tl.store(dT + at * C + square, dT_c)
        if G == 2:
            running_sums(g, sums + token * K, rest + token * K, rows, S_G, HV * K, K, C, EXACT)
