"""The serial pass over the chunks of a sequence (README.md, 2.3 to 2.5) on Hopper, for few sequences and heads: what one step waits for is two
products, Y S and Ktail^T R; the other two, copies of the next chunks and the writing of results run beside them.

Shapes: C rows a chunk, HV value heads, K key size (64 or 128), V value size, BV value columns a program. Inputs are those of `_triton/solve.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.delta._gluon.shared import barrier, chunk_rows, fetch, offsets, sequence_chunks, shared_tile, shared_tiles, tile, within


@gluon.jit
def fetch_chunk(i, Y_s, U_s, P_s, Q_s, K_s, Y, U, P, Qg, Ktail, at, V: gl.constexpr, B: gl.constexpr):
    """Begins to copy what a chunk needs to buffer i."""
    C: gl.constexpr = P_s.shape[1]
    K: gl.constexpr = K_s.shape[2]
    if B:
        fetch(Y_s.index(i), Y + at * C * K, K)
    fetch(U_s.index(i), U + at * C * V, V)
    fetch(Q_s.index(i), Qg + at * C * K, K)
    fetch(P_s.index(i), P + at * C * C, C)
    fetch(K_s.index(i), Ktail + at * C * K, K)


@gluon.jit
def load_decay(gamma, at, G: gl.constexpr, K: gl.constexpr, M: gl.constexpr):
    """The decay of a chunk: a number, or one a row of a state in layout M."""
    if G == 2:  # noqa: SIM108 (a conditional expression would compile both)
        decay = gl.expand_dims(gl.load(gamma + at * K + gl.arange(0, K, layout=gl.SliceLayout(1, M))), 1)
    else:
        decay = gl.load(gamma + at)
    return decay


@gluon.jit(do_not_specialize=["tokens", "per_sequence"])
def state_kernel(
    Y, U, P, Qg, Ktail, gamma, initial, first_chunk, starts, lengths, o, S_all, final, scale, tokens, per_sequence,
    S_O: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, G: gl.constexpr, B: gl.constexpr,
    INITIAL: gl.constexpr, SAVE: gl.constexpr, PACKED: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program a sequence, head and block of value columns. SAVE keeps the states before the chunks, and R in U's place."""
    pid = gl.program_id(0)
    block, head, sequence = pid % (V // BV), pid // (V // BV) % HV, pid // (V // BV * HV)
    dtype: gl.constexpr = U.dtype.element_ty
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [4, 1], [1, 0])
    first, end = sequence_chunks(first_chunk, sequence, per_sequence, PACKED)
    U += block * BV
    o += head * V + block * BV
    S_all += block * BV
    whole = (sequence.to(gl.int64) * HV + head) * K * V + block * BV
    Y_s, Q_s, K_s = shared_tiles(dtype, C, K, STAGES), shared_tiles(dtype, C, K, STAGES), shared_tiles(dtype, C, K, STAGES)
    P_s, U_s = shared_tiles(dtype, C, C, STAGES), shared_tiles(dtype, C, BV, STAGES)
    S_2, R_s = shared_tiles(dtype, K, BV, 2), shared_tile(dtype, C, BV)  # a warp may store a state while another still multiplies by the one before
    for ahead in gl.static_range(STAGES - 1):
        if first + ahead < end:
            fetch_chunk(ahead, Y_s, U_s, P_s, Q_s, K_s, Y, U, P, Qg, Ktail, (first + ahead).to(gl.int64) * HV + head, V, B)
        async_copy.commit_group()
    S = gl.zeros([K, BV], gl.float32, layout=M)
    if INITIAL:
        S = tile(initial + whole, K, V, K, BV, M)
    zero = gl.zeros([C, BV], gl.float32, layout=M)
    S_2.index(0).store(S.to(dtype))
    last = gl.maximum(end - 1, 0)
    if G:
        next_decay = load_decay(gamma, gl.minimum(first, last).to(gl.int64) * HV + head, G, K, M)
    for chunk in range(first, end):
        n = chunk - first
        i, S_s = n % STAGES, S_2.index(n % 2)
        start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
        at = chunk.to(gl.int64) * HV + head
        if G:
            decay = next_decay
            next_decay = load_decay(gamma, gl.minimum(chunk + 1, last).to(gl.int64) * HV + head, G, K, M)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()  # this chunk has come; every warp has left the one before
        if B:
            R = warpgroup_mma(Y_s.index(i), S_s, zero, use_acc=False, is_async=True)
        o_S = warpgroup_mma(Q_s.index(i), S_s, zero, use_acc=False, is_async=True)
        if chunk + (STAGES - 1) < end:
            then = (n + (STAGES - 1)) % STAGES
            fetch_chunk(then, Y_s, U_s, P_s, Q_s, K_s, Y, U, P, Qg, Ktail, (chunk + (STAGES - 1)).to(gl.int64) * HV + head, V, B)
        async_copy.commit_group()
        if SAVE:
            gl.store(S_all + at * K * V + offsets(K, BV, V, COPY), S_s.load(COPY))
        R_d = U_s.index(i).load(M)
        if B:
            R = warpgroup_mma_wait(1, deps=(R,))
            R_d = (R_d.to(gl.float32) - R).to(dtype)
        R_s.store(R_d)
        fence_async_shared()
        barrier()
        if G:
            S = S * decay
        S = warpgroup_mma(K_s.index(i).permute((1, 0)), R_s, S, is_async=True)
        o_R = warpgroup_mma(P_s.index(i), R_s, zero, use_acc=False, is_async=True)
        if SAVE and B:
            gl.store(U + at * C * V + offsets(C, BV, V, COPY), R_s.load(COPY))
        S, o_S = warpgroup_mma_wait(1, deps=(S, o_S))
        S_2.index((n + 1) % 2).store(S.to(dtype))
        o_R = warpgroup_mma_wait(0, deps=(o_R,))
        o_c = o_S * scale + o_R
        gl.store(o + start * S_O + offsets(C, BV, S_O, M), o_c.to(dtype), mask=within(rows, C, BV, M))
    gl.store(final + whole + offsets(K, BV, V, M), S)
