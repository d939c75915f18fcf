"""The angle before every chunk: sums of a chunk's turns, and their sums over the chunks of a row.

Shapes: B rows (1 if documents are packed), T tokens a row, M = B T; N documents; C tokens a chunk, L chunks a row; H heads, A angles.
tanh [M, A] of theta; delta [M, H]; first [N, H, A] radians; cu [N+1]; document [L], of each chunk's first token; sums [B, L, H, A] and
starts [B, L+1, H, A] in fixed point, the last of a row being the angle behind its last token.
"""

import triton
import triton.language as tl

from kernels.rotary._triton.turns import from_radians, turn


@triton.jit
def angle_at(first, n, at, inside, HAS_FIRST: tl.constexpr):
    """What a document starts from, in fixed point; n: where its row of `first` begins."""
    if HAS_FIRST:
        return from_radians(tl.load(first + n + at, mask=inside, other=0.0))
    else:
        return tl.zeros(at.shape, tl.int32)


@triton.jit(do_not_specialize=["T", "L"])
def turn_sums(
    tanh, delta, first, cu, document, sums, T, L,
    H: tl.constexpr, A: tl.constexpr, C: tl.constexpr, HB: tl.constexpr, BA: tl.constexpr, HAS_FIRST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A chunk's turns behind the last start of a document in it, with what that document starts from."""
    chunk = tl.program_id(0)
    begin = chunk % L * C
    heads, cols = tl.program_id(1) * HB + tl.arange(0, HB), tl.arange(0, BA)
    inside = (heads < H)[:, None] & (cols < A)[None, :]
    at = heads[:, None] * A + cols[None, :]
    angles = tl.broadcast_to(cols[None, :], (HB, BA))
    token = (chunk // L).to(tl.int64) * T + begin
    if PACKED:
        n = tl.load(document + chunk)  # the next that starts
        n += (tl.load(cu + n) < begin).to(tl.int32)
        end = tl.load(cu + n)
    total = tl.zeros([HB, BA], tl.int32)
    for t in range(begin, tl.minimum(begin + C, T)):
        if PACKED and t == end:  # document n starts
            total = angle_at(first, n.to(tl.int64) * (H * A), at, inside, HAS_FIRST)
            n += 1
            end = tl.load(cu + n)
        half = 0.5 * tl.load(delta + token * H + heads, mask=heads < H, other=0.0)
        total += turn(tl.load(tanh + token * A + angles, mask=inside, other=0.0), half[:, None])
        token += 1
    tl.store(sums + chunk.to(tl.int64) * (H * A) + at, total, mask=inside)


@triton.jit(do_not_specialize=["L", "T"])
def chunk_starts(
    sums, first, cu, document, starts, T, L,
    HA: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < HA
    angle = tl.zeros([BLOCK], tl.int32)
    if not PACKED:
        angle = angle_at(first, row * HA, at, inside, HAS_FIRST)
    sums += row * L * HA
    starts += row * (L + 1) * HA
    tl.store(starts + at, angle, mask=inside)
    for c in range(L):
        total = tl.load(sums + at, mask=inside, other=0)
        if PACKED:
            n = tl.load(document + c)
            starting = (tl.load(cu + n) == c * C) | (tl.load(cu + n + 1) < tl.minimum((c + 1) * C, T))  # a document starts in the chunk
            angle = tl.where(starting, total, angle + total)
        else:
            angle += total
        sums += HA
        starts += HA
        tl.store(starts + at, angle, mask=inside)
