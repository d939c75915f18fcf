"""The parallel half of the backward pass without erase, for heads that share queries and keys, on Hopper (README.md, section 7): all gradients but
those of the states, which `_triton/dstates.py` has left. dq and dk are summed over the heads in registers.

Shapes: C = 64 rows a chunk, H key heads, HV value heads, K key size, V = C value size. Inputs are [rows, heads, channels] with row strides S_x; the
states before the chunks and the gradients of those behind them [chunks, HV, K, V]; numbers of rows [chunks, HV, 4, C], see `_triton/dstates.py`.
Tiles of pairs are [i, j], row i with row j.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.delta._gluon.shared import (
    barrier,
    chunk_rows,
    fetch,
    n_chunks,
    put_tile,
    result_tile,
    shared_row,
    shared_rows,
    shared_tile,
    shared_tiles,
    sums_from_the_end,
)
from kernels.delta._triton.dstates import GAMMA, NUMBERS, SUMS, TAIL, WRITE


@gluon.jit
def decayed(exponent):
    """2^exponent, 1 where rounding has left that above 0. NaN stays NaN."""
    return gl.exp2(gl.where(exponent > 0, 0.0, exponent))


@gluon.jit
def fetch_head(
    i, v_s, do_s, S_s, dS_s, numbers_s, v, do, S_all, dS_all, numbers, one, rows, S_V: gl.constexpr, S_O: gl.constexpr
):  # fmt: skip
    """Begins to copy what a head needs to buffer i."""
    N: gl.constexpr = numbers_s.shape[1]
    K: gl.constexpr = S_s.shape[1]
    V: gl.constexpr = S_s.shape[2]
    fetch(do_s.index(i), do + one * V, S_O, rows)
    fetch(v_s.index(i), v + one * V, S_V, rows)
    fetch(S_s.index(i), S_all + one * (K * V), V)
    fetch(dS_s.index(i), dS_all + one * (K * V), V)
    at = gl.arange(0, N, layout=gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    async_copy.async_copy_global_to_shared(numbers_s.index(i), numbers + one * N + at)


@gluon.jit
def column(numbers_s, WHICH: gl.constexpr, C: gl.constexpr, layout: gl.constexpr):
    """One of the numbers of all rows as a column of a tile."""
    return gl.expand_dims(numbers_s.slice(WHICH * C, C).load(gl.SliceLayout(1, layout)), 1)


@gluon.jit
def row(numbers_s, WHICH: gl.constexpr, C: gl.constexpr, layout: gl.constexpr):
    """The same as a row of a tile."""
    return gl.expand_dims(numbers_s.slice(WHICH * C, C).load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def pairs(index_s, M: gl.constexpr):
    """i and j of all pairs, from shared memory: what the compiler knows of them it keeps over the loop, truth values of 16 pairs in 16 registers."""
    return gl.expand_dims(index_s.load(gl.SliceLayout(1, M)), 1), gl.expand_dims(index_s.load(gl.SliceLayout(0, M)), 0)


@gluon.jit(do_not_specialize=["tokens", "per_sequence", "sequences", "groups"])
def dchunks_kernel(
    q, k, v, S_all, do, dS_all, numbers, first_chunk, starts, lengths, dq, dk, dv, dg, dw, scale, tokens, per_sequence, sequences, groups,
    S_Q: gl.constexpr, S_K: gl.constexpr, S_V: gl.constexpr, S_O: gl.constexpr, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    C: gl.constexpr, W: gl.constexpr, PACKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program a chunk, key head and one of `groups` of its value heads."""
    EACH: gl.constexpr = HV // H
    pid = gl.program_id(0)
    group, head, chunk = pid % groups, pid // groups % H, pid // (groups * H)
    if chunk >= n_chunks(first_chunk, per_sequence, sequences, PACKED):
        return
    start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
    first, end = head * EACH + group * EACH // groups, head * EACH + (group + 1) * EACH // groups
    at = chunk.to(gl.int64) * HV
    v += start * S_V
    do += start * S_O
    S_all += at * (K * V)
    dS_all += at * (K * V)
    numbers += at * (NUMBERS * C)
    dtype: gl.constexpr = v.dtype.element_ty
    GROUPS: gl.constexpr = gl.num_warps() // 4
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, K // GROUPS, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [gl.num_warps(), 1], [1, 0])
    ROW: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    t = gl.arange(0, C, layout=ROW)

    q_s, k_s = shared_tile(dtype, C, K), shared_tile(dtype, C, K)
    v_s, do_s = shared_tiles(dtype, C, V, STAGES), shared_tiles(dtype, C, V, STAGES)
    S_s, dS_s = shared_tiles(dtype, K, V, STAGES), shared_tiles(dtype, K, V, STAGES)
    dA_s, P_s, E_s, from_l = shared_tile(dtype, C, C), shared_tile(dtype, C, C), shared_tile(dtype, C, C), shared_tile(dtype, C, C)
    dv_s = shared_tile(dtype, C, V)
    numbers_s, index_s = shared_rows(NUMBERS * C, STAGES), shared_row(C)
    before_s, after_s, across_s, write_s = shared_row(C), shared_row(C), shared_row(C), shared_row(C)
    fetch(q_s, q + start * S_Q + head * K, S_Q, rows)
    fetch(k_s, k + start * S_K + head * K, S_K, rows)
    for ahead in gl.static_range(STAGES - 1):
        if first + ahead < end:
            fetch_head(ahead, v_s, do_s, S_s, dS_s, numbers_s, v, do, S_all, dS_all, numbers, first + ahead, rows, S_V, S_O)
        async_copy.commit_group()
    index_s.store(t.to(gl.float32))
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    barrier()
    row_i, row_j = pairs(index_s, M)
    from_l.store(gl.where(row_i <= row_j, 1.0, 0.0).to(dtype))
    zero = gl.zeros([C, C], gl.float32, layout=M)
    zero_K = gl.zeros([C, K], gl.float32, layout=KEYS)
    P = warpgroup_mma(q_s, k_s.permute((1, 0)), zero, use_acc=False, is_async=True)
    P = warpgroup_mma_wait(0, deps=(P,))
    P = gl.where(row_i >= row_j, P * scale, 0.0)
    dq_c, dk_c = zero_K, zero_K
    for n in range(0, end - first):
        i, one = n % STAGES, first + n
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()  # this head has come; every warp has left the one before
        dA = warpgroup_mma(do_s.index(i), v_s.index(i).permute((1, 0)), zero, use_acc=False, is_async=True)
        of_S = warpgroup_mma(do_s.index(i), S_s.index(i).permute((1, 0)), zero_K, use_acc=False, is_async=True)
        dR = warpgroup_mma(k_s, dS_s.index(i), zero, use_acc=False, is_async=True)
        if n + (STAGES - 1) < end - first:
            then = (n + (STAGES - 1)) % STAGES
            fetch_head(then, v_s, do_s, S_s, dS_s, numbers_s, v, do, S_all, dS_all, numbers, one + (STAGES - 1), rows, S_V, S_O)
        async_copy.commit_group()
        numbers_c = numbers_s.index(i)
        x = decayed(column(numbers_c, SUMS, C, M) - row(numbers_c, SUMS, C, M))
        dA = warpgroup_mma_wait(2, deps=(dA,))
        P_s.store((P * x).to(dtype))
        row_i, row_j = pairs(index_s, M)  # masked behind all that it is multiplied by: what is no number stays where it is
        dA = gl.where(row_i >= row_j, dA * x * row(numbers_c, WRITE, C, M), 0.0)
        E_s.store((dA * P).to(dtype))
        dA_s.store((dA * scale).to(dtype))
        of_S, dR = warpgroup_mma_wait(0, deps=(of_S, dR))
        of_dS = warpgroup_mma(v_s.index(i), dS_s.index(i).permute((1, 0)), zero_K, use_acc=False, is_async=True)
        of_S = of_S * (scale * decayed(column(numbers_c, SUMS, C, KEYS)))
        before_s.store(gl.sum(of_S * q_s.load(KEYS).to(gl.float32), 1))
        dq_c += of_S
        dR = dR * column(numbers_c, TAIL, C, M)
        after_s.store(gl.sum(dR * v_s.index(i).load(M).to(gl.float32), 1))
        of_dS = warpgroup_mma_wait(0, deps=(of_dS,))
        dk_c += of_dS * (column(numbers_c, TAIL, C, KEYS) * column(numbers_c, WRITE, C, KEYS))
        fence_async_shared()
        barrier()
        dR = warpgroup_mma(P_s.permute((1, 0)), do_s.index(i), dR, is_async=True)
        across = warpgroup_mma(from_l, E_s, zero, use_acc=False, is_async=True)
        dq_c = warpgroup_mma(dA_s, k_s, dq_c, is_async=True)
        dk_c = warpgroup_mma(dA_s.permute((1, 0)), q_s, dk_c, is_async=True)
        through = gl.sum(gl.sum(S_s.index(i).load(WIDE).to(gl.float32) * dS_s.index(i).load(WIDE).to(gl.float32), 1), 0)
        before = sums_from_the_end(before_s.load(ROW)) + through * numbers_c.slice(GAMMA * C, C).load(ROW)
        after = gl.expand_dims(after_s.load(gl.SliceLayout(0, M)), 0) * row(numbers_c, WRITE, C, M)
        dR, across = warpgroup_mma_wait(2, deps=(dR, across))
        row_i, row_j = pairs(index_s, M)
        across_s.store(gl.sum(gl.where(row_i > row_j, across + after, 0.0), 1))
        if W:
            write_s.store(gl.sum(dR * v_s.index(i).load(M).to(gl.float32), 1))
            dR = dR * column(numbers_c, WRITE, C, M)
        dv_s.store(dR.to(dtype))
        barrier()
        put_tile(dv + (start * HV + one) * V, dv_s, rows, HV * V)
        gl.store(dg + (start + t) * HV + one, across_s.load(ROW) + before, mask=t < rows)
        if W:
            gl.store(dw + (start + t) * HV + one, write_s.load(ROW).to(dw.dtype.element_ty), mask=t < rows)
        dq_c, dk_c = warpgroup_mma_wait(0, deps=(dq_c, dk_c))
    to = (start * H + head) * groups + group
    barrier()
    dq_s, dk_s = result_tile(dq, C, K), result_tile(dk, C, K)
    dq_s.store(dq_c.to(dq_s.dtype))
    dk_s.store(dk_c.to(dk_s.dtype))
    barrier()
    put_tile(dq + to * K, dq_s, rows, H * groups * K)
    put_tile(dk + to * K, dk_s, rows, H * groups * K)
