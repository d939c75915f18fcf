"""What the Gluon kernels share: where a chunk lies, tiles in shared memory, running sums of the log-decay.

Shapes: C = 64 rows a chunk, BK channels, BV value columns a block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
LOG2E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-160.0)  # as in `_triton/tree.py`


@gluon.jit
def chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED: gl.constexpr, C: gl.constexpr):
    """First token (int64) and number of rows of a chunk."""
    if PACKED:
        start = gl.load(starts + chunk).to(gl.int64)
        rows = gl.load(lengths + chunk)
    else:
        first = (chunk % per_sequence) * C
        start = (chunk // per_sequence).to(gl.int64) * tokens + first
        rows = gl.minimum(tokens - first, C)
    return start, rows


@gluon.jit
def sequence_chunks(first_chunk, sequence, per_sequence, PACKED: gl.constexpr):
    """The first chunk of a sequence and the one behind its last."""
    if PACKED:
        first, end = gl.load(first_chunk + sequence), gl.load(first_chunk + sequence + 1)
    else:
        first, end = sequence * per_sequence, (sequence + 1) * per_sequence
    return first, end


@gluon.jit
def n_chunks(first_chunk, per_sequence, sequences, PACKED: gl.constexpr):
    """The number of chunks; of packed sequences it is known on the device only."""
    if PACKED:  # noqa: SIM108 (a conditional expression would load in both cases)
        n = gl.load(first_chunk + sequences)
    else:
        n = per_sequence * sequences
    return n


@gluon.jit
def offsets(R: gl.constexpr, X: gl.constexpr, S, layout: gl.constexpr):
    """Offsets of a tile [R, X] whose rows are S numbers apart."""
    r, c = gl.arange(0, R, layout=gl.SliceLayout(1, layout)), gl.arange(0, X, layout=gl.SliceLayout(0, layout))
    return gl.expand_dims(r, 1) * S + gl.expand_dims(c, 0)


@gluon.jit
def within(rows, R: gl.constexpr, X: gl.constexpr, layout: gl.constexpr):
    """Which entries of a tile [R, X] lie in its first rows."""
    r = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(1, layout)), 1)
    return r + gl.zeros([R, X], gl.int32, layout=layout) < rows


@gluon.jit
def tile(x, rows, S, R: gl.constexpr, X: gl.constexpr, layout: gl.constexpr):
    """A tile [R, X] from memory, zero from row `rows` on."""
    return gl.load(x + offsets(R, X, S, layout), mask=within(rows, R, X, layout), other=0.0)


@gluon.jit
def rows_of(x, rows, S, R: gl.constexpr, layout: gl.constexpr):
    """One number of each of R rows, zero from row `rows` on."""
    r = gl.arange(0, R, layout=layout)
    return gl.load(x + r * S, mask=r < rows, other=0.0)


@gluon.jit
def shared_tile(dtype: gl.constexpr, R: gl.constexpr, X: gl.constexpr):
    """Room in shared memory for an operand [R, X] of a product, of 16 bits a number."""
    return gl.allocate_shared_memory(dtype, [R, X], gl.NVMMASharedLayout(128 if X >= 64 else 2 * X, 16, 2))


@gluon.jit
def shared_tiles(dtype: gl.constexpr, R: gl.constexpr, X: gl.constexpr, N: gl.constexpr):
    """N of them."""
    return gl.allocate_shared_memory(dtype, [N, R, X], gl.NVMMASharedLayout(128 if X >= 64 else 2 * X, 16, 2))


@gluon.jit
def fetch(to, x, S, rows=None):
    """Begins to copy a tile of 16-bit numbers to shared memory: all of it, or `rows` rows and zeros behind them."""
    R: gl.constexpr = to.shape[0]
    X: gl.constexpr = to.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // X, X // 8], [gl.num_warps(), 1], [1, 0])
    if rows is None:
        async_copy.async_copy_global_to_shared(to, x + offsets(R, X, S, layout))
    else:
        async_copy.async_copy_global_to_shared(to, x + offsets(R, X, S, layout), mask=within(rows, R, X, layout))


@gluon.constexpr_function
def whole_pieces(dtype, X, warps):
    """How threads hold rows of X numbers in pieces of 16 bytes."""
    N = 128 // dtype.primitive_bitwidth
    return gl.BlockedLayout([1, N], [32 * N // X, X // N], [warps, 1], [1, 0])


@gluon.jit
def result_tile(to, R: gl.constexpr, X: gl.constexpr):
    """Room in shared memory for a tile [R, X] on its way to memory, of 16 or 32 bits a number."""
    dtype: gl.constexpr = to.dtype.element_ty
    return shared_tile(dtype, R, X) if dtype.primitive_bitwidth == 16 else shared_sums(R, X)


@gluon.jit
def put_tile(to, x, rows, S):
    """The first rows of a tile in shared memory to memory, S numbers a row."""
    R: gl.constexpr = x.shape[0]
    X: gl.constexpr = x.shape[1]
    layout: gl.constexpr = whole_pieces(x.dtype, X, gl.num_warps())
    gl.store(to + offsets(R, X, S, layout), x.load(layout), mask=within(rows, R, X, layout))


@gluon.jit
def mbarriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N barriers in shared memory, each for COUNT arrivals a phase."""
    all_of_them = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(all_of_them.index(i), count=COUNT)
    return all_of_them


@gluon.jit
def advance(i, phase, N: gl.constexpr):
    """The next of N barriers, which are used in turn, and the phase that it is waited for in."""
    last = i == N - 1
    return gl.where(last, 0, i + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def fetch_decay(to, gamma, at, live, G: gl.constexpr):
    """Begins to copy the decay of a chunk to shared memory [K]: of every channel the same if it is one number, none unless `live`. A load would be
    waited for by the next fence between what threads and what products see, as long as memory takes."""
    K: gl.constexpr = to.shape[0]
    keys = gl.arange(0, K, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    if G == 2:
        async_copy.async_copy_global_to_shared(to, gamma + at * K + keys, mask=keys < gl.where(live, K, 0))
    if G == 1:
        async_copy.async_copy_global_to_shared(to, gamma + at + keys * 0, mask=keys < gl.where(live, K, 0))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def sums_from_the_start(x):
    """Sums over time from the first row [C, BK]."""
    return gl.associative_scan(x, 0, _add)


@gluon.jit
def sums_from_the_end(x):
    """Sums over time from every row to the last; dear where a thread holds many rows."""
    return gl.associative_scan(x, 0, _add, reverse=True)


@gluon.jit
def log2_decay(g):
    """g in units of log 2, not below what float32 can hold as a factor; NaN stays NaN."""
    g = g.to(gl.float32) * LOG2E
    return gl.where(g < LOWEST, LOWEST, g)


@gluon.jit
def shared_row(BK: gl.constexpr, dtype: gl.constexpr = gl.float32):
    """Room for BK numbers of 32 bits."""
    return gl.allocate_shared_memory(dtype, [BK], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def shared_rows(BK: gl.constexpr, N: gl.constexpr):
    """N times room for BK numbers of float32."""
    return gl.allocate_shared_memory(gl.float32, [N, BK], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def shared_sums(C: gl.constexpr, BK: gl.constexpr):
    """Room for float32 [C, BK] whose rows can be read alone. With 64 channels it is free of bank conflicts by rows and by tiles of 8 rows alike."""
    if BK == 64:
        layout: gl.constexpr = gl.SharedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [1, 8], [2, 16], [0, 32], [4, 0], [8, 0], [16, 0], [32, 0]]
        )
    else:
        layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return gl.allocate_shared_memory(gl.float32, [C, BK], layout)


@gluon.jit
def exponent_to_half(largest, STEP: gl.constexpr, MOST: gl.constexpr):
    """n, within MOST, that brings the largest magnitude of some numbers below 2^15 when times 2^n, and not below 2^(15 - 2^STEP).

    What float16 then loses is less than 2^-24 of the largest, for STEP up to 4. n is the same where the largest are near each other.
    """
    exponent = (largest.to(gl.int32, bitcast=True) >> 23) - 127
    n = ((22 - exponent) >> STEP << STEP) - 8
    return gl.minimum(gl.maximum(n, -MOST), MOST)


@gluon.jit
def power_of_two(n):
    """2^n in float32."""
    return ((n + 127) << 23).to(gl.float32, bitcast=True)
