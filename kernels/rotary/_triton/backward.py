"""Gradients of B, C and the biases, and of the angles as far as a chunk tells: from its last token to its first.

With x the key (or query) before rotation, dx = rotate^-1(dk), and the gradient of the angle of a pair is x_1 dx_2 - x_2 dx_1, as it is on either
side of a rotation. S is its sum over the later tokens of the document; those of later chunks are added behind (`carries.py`).

Shapes: as in `forward.py`; NB = blocks of heads a group; by heads: dB, dC [NB, M, R, G, K]; by chunks: dB_bias, dC_bias [B L, R, H, K],
chunk_sums [R, B L, H, A]; by ranks: ddelta [R, M, H], dfirst [R, N, H, A]; by both: dtanh [R, G NB, M, A].
"""

import triton
import triton.language as tl

from kernels.rotary._triton.forward import head_block
from kernels.rotary._triton.pairs import load_pairs, store_pairs
from kernels.rotary._triton.turns import cos_sin, turn


@triton.jit
def store_sum(y, at, first, second, P0: tl.constexpr, P1: tl.constexpr, BP: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """The sums over the heads."""
    one = tl.arange(0, 1)
    store_pairs(y + at, one, one == 0, tl.sum(first, 0)[None, :], tl.sum(second, 0)[None, :], P0, P1, BP, K, NEIGHBOURS)


@triton.jit
def turned_back(
    dy, x, bias, x_row, bias_row, dy_row, inside, cos, sin, A: tl.constexpr, BP: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Both channels of dx, and the gradient of the angle."""
    y1, y2 = load_pairs(dy, dy_row, inside, 0, A, BP, K, NEIGHBOURS, VECTOR)
    x1, x2 = load_pairs(x, x_row, inside, 0, A, BP, K, NEIGHBOURS, VECTOR)
    b1, b2 = load_pairs(bias, bias_row, inside, 0, A, BP, K, NEIGHBOURS, VECTOR)
    d1, d2 = y1 * cos + y2 * sin, y2 * cos - y1 * sin
    return d1, d2, (x1 + b1) * d2 - (x2 + b2) * d1


@triton.jit(do_not_specialize=["M", "T", "L", "N"])
def rotary_backward(
    dq, dk, dlast, B, C, B_bias, C_bias, tanh, delta, cu, document, starts, last_fixed,
    dB, dC, dB_bias, dC_bias, dtanh, ddelta, chunk_sums, dfirst, M, T, L, N, B_M, C_M,
    R: tl.constexpr, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr, HB: tl.constexpr,
    BP: tl.constexpr, BX: tl.constexpr, VECTOR: tl.constexpr, NEIGHBOURS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    chunk, r = tl.program_id(0), tl.program_id(2)
    begin = chunk % L * CHUNK
    stop = tl.minimum(begin + CHUNK, T)
    heads, inside, group = head_block(H, G, HB)
    cols = tl.arange(0, BP)
    turned = inside[:, None] & (cols < A)[None, :]
    at = heads[:, None] * A + cols[None, :]
    angles = tl.broadcast_to(cols[None, :], (HB, BP))
    row = heads * 0 + (r * G + group) * K
    bias = heads * (R * K) + r * K
    out = (r * H + heads) * K
    token = (chunk // L).to(tl.int64) * T + (stop - 1)
    block = tl.program_id(1) % (tl.num_programs(1) // G)
    dtanh += (r * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * M * A
    ddelta += r.to(tl.int64) * M * H
    sum_row = (block.to(tl.int64) * M * R + r) * (G * K) + group * K
    angle = tl.load(starts + (chunk + chunk // L + 1).to(tl.int64) * (H * A) + at, mask=turned, other=0)  # behind the chunk
    db1, db2 = tl.zeros([HB, BP], tl.float32), tl.zeros([HB, BP], tl.float32)
    dc1, dc2 = tl.zeros([HB, BP], tl.float32), tl.zeros([HB, BP], tl.float32)
    if BX > 0:  # channels that do not turn
        db3, db4 = tl.zeros([HB, BX], tl.float32), tl.zeros([HB, BX], tl.float32)
        dc3, dc4 = tl.zeros([HB, BX], tl.float32), tl.zeros([HB, BX], tl.float32)
    n = chunk // L
    start = 0
    if PACKED:
        n = tl.load(document + chunk)
        while tl.load(cu + n + 1) < stop:  # the document of the last token
            n += 1
        start = tl.load(cu + n)
        ends = tl.load(cu + n + 1) == stop
    else:
        ends = stop == T
    # what reaches the last angle, once
    S = tl.load(dlast + n.to(tl.int64) * (H * A) + at, mask=turned & ends & (r == 0), other=0.0)
    for t in range(stop - begin):
        half = 0.5 * tl.load(delta + token * H + heads, mask=inside, other=0.0)
        turns = tl.load(tanh + token * A + angles, mask=turned, other=0.0)
        cos, sin = cos_sin(angle)
        y_row, to = token * (R * H * K), sum_row + token * (R * G * K)
        d1, d2, dangle = turned_back(dk + y_row, B + token * B_M, B_bias, row, bias, out, inside, cos, sin, A, BP, K, NEIGHBOURS, VECTOR)
        S += dangle
        db1, db2 = db1 + d1, db2 + d2
        store_sum(dB, to, d1, d2, 0, A, BP, K, NEIGHBOURS)
        d1, d2, dangle = turned_back(dq + y_row, C + token * C_M, C_bias, row, bias, out, inside, cos, sin, A, BP, K, NEIGHBOURS, VECTOR)
        S += dangle
        dc1, dc2 = dc1 + d1, dc2 + d2
        store_sum(dC, to, d1, d2, 0, A, BP, K, NEIGHBOURS)
        if BX > 0:
            d1, d2 = load_pairs(dk + y_row, out, inside, A, K // 2, BX, K, NEIGHBOURS, VECTOR)
            db3, db4 = db3 + d1, db4 + d2
            store_sum(dB, to, d1, d2, A, K // 2, BX, K, NEIGHBOURS)
            d1, d2 = load_pairs(dq + y_row, out, inside, A, K // 2, BX, K, NEIGHBOURS, VECTOR)
            dc3, dc4 = dc3 + d1, dc4 + d2
            store_sum(dC, to, d1, d2, A, K // 2, BX, K, NEIGHBOURS)
        tl.store(dtanh + token * A + cols, tl.sum(S * half[:, None], 0), mask=cols < A)
        tl.store(ddelta + token * H + heads, tl.sum(S * turns, 1), mask=inside)
        angle -= turn(turns, half[:, None])
        if PACKED and stop - 1 - t == start:
            tl.store(dfirst + (r.to(tl.int64) * N + n) * (H * A) + at, S, mask=turned)
            if t + 1 < stop - begin:  # the document before
                n -= 1
                start = tl.load(cu + n)
                angle = tl.load(last_fixed + n.to(tl.int64) * (H * A) + at, mask=turned, other=0)
                S = tl.load(dlast + n.to(tl.int64) * (H * A) + at, mask=turned & (r == 0), other=0.0)
        token -= 1
    tl.store(chunk_sums + (r * tl.num_programs(0) + chunk).to(tl.int64) * (H * A) + at, S, mask=turned)
    biases = chunk.to(tl.int64) * (R * H * K)
    store_pairs(dB_bias + biases, out, inside, db1, db2, 0, A, BP, K, NEIGHBOURS)
    store_pairs(dC_bias + biases, out, inside, dc1, dc2, 0, A, BP, K, NEIGHBOURS)
    if BX > 0:
        store_pairs(dB_bias + biases, out, inside, db3, db4, A, K // 2, BX, K, NEIGHBOURS)
        store_pairs(dC_bias + biases, out, inside, dc3, dc4, A, K // 2, BX, K, NEIGHBOURS)
