"""What forward and backward share: where a chunk lies, running sums of the log-decay, and the tree of README.md, section 3.

Shapes: C = 64 rows a chunk, K key size, BK channels a block. Pointers of a chunk and head point at its row 0.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-160.0)  # below 2^-149, the smallest float32 above 0: a stronger decay leaves nothing either way
GRID = tl.constexpr(512.0)  # 64 * 160 < 2^14, so sums of multiples of 2^-9 need 23 bits: exact in float32


@triton.jit
def wide(index):
    """A loop index as int64."""
    return tl.full((), index, tl.int64)


@triton.jit
def chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED: tl.constexpr, C: tl.constexpr):
    """First token (int64) and number of rows of a chunk."""
    if PACKED:
        start = tl.load(starts + chunk).to(tl.int64)
        rows = tl.load(lengths + chunk)
    else:
        first = (chunk % per_sequence) * C
        start = wide(chunk // per_sequence) * tokens + first
        rows = tl.minimum(tokens - first, C)
    return start, rows


@triton.jit
def n_chunks(first_chunk, per_sequence, sequences, PACKED: tl.constexpr):
    """The number of chunks; of packed sequences it is known on the device only."""
    if PACKED:  # noqa: SIM108 (a conditional expression would load in both cases)
        n = tl.load(first_chunk + sequences)
    else:
        n = per_sequence * sequences
    return n


@triton.jit
def log2_decay(g):
    """g in units of log 2, not below what float32 can hold as a factor; NaN stays NaN."""
    return tl.maximum(g.to(tl.float32) * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def running_sums(g, sums, rest, rows, S_G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """G of every channel, in log 2, to `sums`: row by row, S numbers apart, a column a thread.

    EXACT: in two parts, the first a sum of multiples of 1 / GRID: after a decay of -1000 its differences still hold one of -1e-6.
    """
    c = tl.arange(0, K)
    total = tl.zeros([K], tl.float32)
    left = tl.zeros([K], tl.float32)
    for r in range(C):
        inside = (c < K) & (r < rows)
        g2 = log2_decay(tl.load(g + r * S_G + c, mask=inside, other=0.0))
        if EXACT:
            coarse = tl.floor(g2 * GRID + 0.5) / GRID
            left += g2 - coarse
            tl.store(rest + r * S + c, left, mask=inside)
            g2 = coarse
        total += g2
        tl.store(sums + r * S + c, total, mask=inside)
    tl.debug_barrier()


@triton.jit
def between(sums, rest, r, a, c, rows, S: tl.constexpr, EXACT: tl.constexpr):
    """log2 of x(r, a), from the running sums of a chunk: rows r and a [R], channels c [BK] -> [R, BK]. Positive where r is before a.

    Nothing decays past the end of a sequence: those rows are its last one.
    """
    r, a = tl.minimum(r, rows - 1), tl.minimum(a, rows - 1)
    to, since = r[:, None] * S + c[None, :], a[:, None] * S + c[None, :]
    x = tl.load(sums + to) - tl.load(sums + since)
    if EXACT:
        x += tl.load(rest + to) - tl.load(rest + since)
    return x


@triton.jit
def decay_tile(g, rows, S_G: tl.constexpr, C: tl.constexpr):
    """x(r, s) [C, C] for a decay per head, 1 on and above the diagonal: running sums, each of one sign, down the rows."""
    r = tl.arange(0, C)
    g2 = log2_decay(tl.load(g + r * S_G, mask=r < rows, other=0.0))
    return tl.exp2(tl.cumsum(tl.where(r[:, None] > r[None, :], g2[:, None], 0.0), 0))


@triton.jit
def decay_ends(g, rows, S_G: tl.constexpr, C: tl.constexpr):
    """x(r, start) and x(C, r) [C] and the decay of the whole chunk, for a decay per head."""
    r = tl.arange(0, C)
    g2 = log2_decay(tl.load(g + r * S_G, mask=r < rows, other=0.0))
    behind = tl.sum(tl.where(r[:, None] > r[None, :], g2[:, None], 0.0), 0)
    return tl.exp2(tl.cumsum(g2, 0)), tl.exp2(behind), tl.exp2(tl.sum(g2, 0))


@triton.jit
def channel_ends(sums, rest, at, rows, S: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr):
    """The same for a decay per channel: [C, BK], [C, BK], [BK]."""
    r, c = tl.minimum(tl.arange(0, C), rows - 1), tl.arange(0, BK)
    here, last = at + (r[:, None] * S + c[None, :]), at + ((rows - 1) * S + c)
    start, total = tl.load(sums + here), tl.load(sums + last)
    end = total[None, :] - start
    if EXACT:
        fine, fine_total = tl.load(rest + here), tl.load(rest + last)
        end += fine_total[None, :] - fine
        start, total = start + fine, total + fine_total
    return tl.exp2(start), tl.exp2(end), tl.exp2(total)


@triton.jit
def level_rows(h: tl.constexpr, C: tl.constexpr):
    """The rows of a level, half of them each: lower halves, upper halves of the blocks of 2h rows, the lower halves' last rows, and the blocks."""
    i = tl.arange(0, C // 2)
    block = i // h
    lower = block * (2 * h) + i % h
    return lower, lower + h, block * (2 * h) + h - 1, block


@triton.jit
def stack(x, y):
    """[R, X], [R, X] -> [2R, X], y below x."""
    return tl.reshape(tl.permute(tl.join(x, y), (2, 0, 1)), (2 * x.shape[0], x.shape[1]))


@triton.jit
def head_sums(g, rows, S_G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr):
    """Running sums G [C] of a decay per head and their total, in log 2, each in two parts as in `running_sums`; without EXACT the second is 0.

    Of the R rows of a token the first decays.
    """
    r = tl.arange(0, C)
    g2 = log2_decay(tl.load(g + (r // R) * S_G, mask=(r < rows) & (r % R == 0), other=0.0))
    rest = tl.zeros([C], tl.float32)
    if EXACT:
        coarse = tl.floor(g2 * GRID + 0.5) / GRID
        rest = g2 - coarse
        g2 = coarse
    return tl.cumsum(g2, 0), tl.cumsum(rest, 0), tl.sum(g2, 0), tl.sum(rest, 0)


@triton.jit
def decayed(to, to_rest, since, since_rest, EXACT: tl.constexpr):
    """x(to, since) from running sums; 1 where `to` is before `since`."""
    x = to - since
    if EXACT:
        x += to_rest - since_rest
    return tl.exp2(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
