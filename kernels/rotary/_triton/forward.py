"""k = rotate(B + B_bias), q = rotate(C + C_bias) by the running angle, which a program carries from token to token in its registers.

Shapes: as in `starts.py`; R ranks, G groups, K channels; B, C [M, R, G, K] with the strides of tokens; biases [H, R, K]; q, k [M, R, H, K];
last [N, H, A] radians, last_fixed the same in fixed point. A program takes a chunk, HB heads of a group and a rank.
"""

import triton
import triton.language as tl

from kernels.rotary._triton.pairs import load_pairs, store_pairs
from kernels.rotary._triton.starts import angle_at
from kernels.rotary._triton.turns import cos_sin, to_radians, turn


@triton.jit
def store_last(last, last_fixed, angle, n, at, inside):
    tl.store(last + n + at, to_radians(angle), mask=inside)
    tl.store(last_fixed + n + at, angle, mask=inside)


@triton.jit
def head_block(H: tl.constexpr, G: tl.constexpr, HB: tl.constexpr):
    """A program's heads, which of them there are, and their group."""
    heads_a_group: tl.constexpr = H // G
    blocks: tl.constexpr = (heads_a_group + HB - 1) // HB
    group = tl.program_id(1) // blocks
    inner = tl.program_id(1) % blocks * HB + tl.arange(0, HB)
    return group * heads_a_group + inner, inner < heads_a_group, group


@triton.jit(do_not_specialize=["T", "L"])
def rotary_forward(
    B, C, B_bias, C_bias, tanh, delta, first, cu, document, starts, q, k, last, last_fixed, T, L, B_M, C_M,
    R: tl.constexpr, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr, HB: tl.constexpr,
    BP: tl.constexpr, BX: tl.constexpr, VECTOR: tl.constexpr, NEIGHBOURS: tl.constexpr, HAS_FIRST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    chunk, r = tl.program_id(0), tl.program_id(2)
    begin = chunk % L * CHUNK
    token = (chunk // L).to(tl.int64) * T + begin
    heads, inside, group = head_block(H, G, HB)
    cols = tl.arange(0, BP)
    turned = inside[:, None] & (cols < A)[None, :]
    at = heads[:, None] * A + cols[None, :]
    angles = tl.broadcast_to(cols[None, :], (HB, BP))  # every thread reads those it turns by
    angle = tl.load(starts + (chunk + chunk // L).to(tl.int64) * (H * A) + at, mask=turned, other=0)
    row = heads * 0 + (r * G + group) * K
    bias = heads * (R * K) + r * K
    out = (r * H + heads) * K
    b1, b2 = load_pairs(B_bias, bias, inside, 0, A, BP, K, NEIGHBOURS, VECTOR)
    c1, c2 = load_pairs(C_bias, bias, inside, 0, A, BP, K, NEIGHBOURS, VECTOR)
    if BX > 0:  # channels that do not turn
        b3, b4 = load_pairs(B_bias, bias, inside, A, K // 2, BX, K, NEIGHBOURS, VECTOR)
        c3, c4 = load_pairs(C_bias, bias, inside, A, K // 2, BX, K, NEIGHBOURS, VECTOR)
    n = 0
    end = 0
    if PACKED:
        n = tl.load(document + chunk)
        end = tl.load(cu + n)  # of the document before
    for t in range(begin, tl.minimum(begin + CHUNK, T)):
        if PACKED:
            if t == end:
                angle = angle_at(first, n.to(tl.int64) * (H * A), at, turned, HAS_FIRST)
            if t >= end:
                end = tl.load(cu + n + 1)
        half = 0.5 * tl.load(delta + token * H + heads, mask=inside, other=0.0)
        angle += turn(tl.load(tanh + token * A + angles, mask=turned, other=0.0), half[:, None])
        cos, sin = cos_sin(angle)
        x1, x2 = load_pairs(B + token * B_M, row, inside, 0, A, BP, K, NEIGHBOURS, VECTOR)
        x1, x2 = x1 + b1, x2 + b2
        store_pairs(k + token * (R * H * K), out, inside, x1 * cos - x2 * sin, x1 * sin + x2 * cos, 0, A, BP, K, NEIGHBOURS)
        x1, x2 = load_pairs(C + token * C_M, row, inside, 0, A, BP, K, NEIGHBOURS, VECTOR)
        x1, x2 = x1 + c1, x2 + c2
        store_pairs(q + token * (R * H * K), out, inside, x1 * cos - x2 * sin, x1 * sin + x2 * cos, 0, A, BP, K, NEIGHBOURS)
        if BX > 0:
            x1, x2 = load_pairs(B + token * B_M, row, inside, A, K // 2, BX, K, NEIGHBOURS, VECTOR)
            store_pairs(k + token * (R * H * K), out, inside, x1 + b3, x2 + b4, A, K // 2, BX, K, NEIGHBOURS)
            x1, x2 = load_pairs(C + token * C_M, row, inside, A, K // 2, BX, K, NEIGHBOURS, VECTOR)
            store_pairs(q + token * (R * H * K), out, inside, x1 + c3, x2 + c4, A, K // 2, BX, K, NEIGHBOURS)
        if PACKED and t + 1 == end:
            store_last(last, last_fixed, angle, n.to(tl.int64) * (H * A), at, turned & (r == 0))
            n += 1
        token += 1
    if not PACKED and begin + CHUNK >= T:
        store_last(last, last_fixed, angle, (chunk // L).to(tl.int64) * (H * A), at, turned & (r == 0))
