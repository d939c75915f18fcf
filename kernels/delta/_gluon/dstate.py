"""The serial pass backwards (README.md, 4.1 and 4.3) on Hopper, where programs of up to 64 columns run all at once, and for packed documents.

Shapes: C rows a chunk, HV value heads, K key size (64 or 128), V value size, BV value columns a program. Inputs are those of `_triton/solve.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from kernels.delta._gluon.shared import (
    barrier,
    chunk_rows,
    fetch,
    fetch_decay,
    offsets,
    sequence_chunks,
    shared_rows,
    shared_tile,
    shared_tiles,
    tile,
)


@gluon.jit
def fetch_chunk(
    i, Y_s, do_s, P_s, Q_s, K_s, gamma_s, Y, do, P, Qg, Ktail, gamma, chunk, head, starts, lengths, tokens, per_sequence, S_O: gl.constexpr,
    HV: gl.constexpr, G: gl.constexpr, B: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Begins to copy what a chunk needs to buffer i."""
    C: gl.constexpr = P_s.shape[1]
    K: gl.constexpr = K_s.shape[2]
    start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
    at = chunk.to(gl.int64) * HV + head
    fetch(do_s.index(i), do + start * S_O, S_O, rows)
    fetch(P_s.index(i), P + at * C * C, C)
    fetch(K_s.index(i), Ktail + at * C * K, K)
    fetch(Q_s.index(i), Qg + at * C * K, K)
    if B:
        fetch(Y_s.index(i), Y + at * C * K, K)
    fetch_decay(gamma_s.index(i), gamma, at, True, G)


@gluon.jit(do_not_specialize=["tokens", "per_sequence"])
def dstate_kernel(
    Y, P, Qg, Ktail, gamma, do, dfinal, first_chunk, starts, lengths, dR, dS_all, dinitial, scale, tokens, per_sequence,
    S_O: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, G: gl.constexpr, B: gl.constexpr,
    PACKED: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program a sequence, head and block of value columns. dS_all holds the gradients of the states behind the chunks."""
    pid = gl.program_id(0)
    block, head, sequence = pid % (V // BV), pid // (V // BV) % HV, pid // (V // BV * HV)
    dtype: gl.constexpr = dR.dtype.element_ty
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [4, 1], [1, 0])
    first, end = sequence_chunks(first_chunk, sequence, per_sequence, PACKED)
    do += head * V + block * BV
    dR += block * BV
    dS_all += block * BV
    whole = (sequence.to(gl.int64) * HV + head) * K * V + block * BV
    Y_s, Q_s, K_s = shared_tiles(dtype, C, K, STAGES), shared_tiles(dtype, C, K, STAGES), shared_tiles(dtype, C, K, STAGES)
    P_s, do_s, gamma_s = shared_tiles(dtype, C, C, STAGES), shared_tiles(dtype, C, BV, STAGES), shared_rows(K, STAGES)
    dS_s, dR_s = shared_tile(dtype, K, BV), shared_tile(dtype, C, BV)
    for ahead in gl.static_range(STAGES - 1):
        if first + ahead < end:
            fetch_chunk(
                ahead, Y_s, do_s, P_s, Q_s, K_s, gamma_s, Y, do, P, Qg, Ktail, gamma, end - 1 - ahead, head, starts, lengths, tokens,
                per_sequence, S_O, HV, G, B, PACKED,
            )  # fmt: skip
        async_copy.commit_group()
    dS = tile(dfinal + whole, K, V, K, BV, M)
    zero, zero_K = gl.zeros([C, BV], gl.float32, layout=M), gl.zeros([K, BV], gl.float32, layout=M)
    for back in range(0, end - first):
        i, chunk = back % STAGES, end - 1 - back
        at = chunk.to(gl.int64) * HV + head
        dS_s.store(dS.to(dtype))
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()  # this chunk has come; every warp has left the one before
        dR_c = warpgroup_mma(P_s.index(i).permute((1, 0)), do_s.index(i), zero, use_acc=False, is_async=True)
        dR_c = warpgroup_mma(K_s.index(i), dS_s, dR_c, is_async=True)
        dS_q = warpgroup_mma(Q_s.index(i).permute((1, 0)), do_s.index(i), zero_K, use_acc=False, is_async=True)
        if back + (STAGES - 1) < end - first:
            then = (back + (STAGES - 1)) % STAGES
            fetch_chunk(
                then, Y_s, do_s, P_s, Q_s, K_s, gamma_s, Y, do, P, Qg, Ktail, gamma, chunk - (STAGES - 1), head, starts, lengths, tokens,
                per_sequence, S_O, HV, G, B, PACKED,
            )  # fmt: skip
        async_copy.commit_group()
        gl.store(dS_all + at * K * V + offsets(K, BV, V, COPY), dS_s.load(COPY))
        dR_c = warpgroup_mma_wait(1, deps=(dR_c,))
        dR_s.store((-dR_c).to(dtype))  # of which dS gets Y^T (-dR): a product only adds
        fence_async_shared()
        dS_q = warpgroup_mma_wait(0, deps=(dS_q,))
        if G:  # dS is what a product gave: before a wait the assembler would have this use of it wait for all products
            dS = dS * gl.expand_dims(gamma_s.index(i).load(gl.SliceLayout(1, M)), 1)
        dS += scale * dS_q
        barrier()
        if B:
            dS = warpgroup_mma(Y_s.index(i).permute((1, 0)), dR_s, dS, is_async=True)
        gl.store(dR + at * C * V + offsets(C, BV, V, COPY), -dR_s.load(COPY))
        if B:
            dS = warpgroup_mma_wait(0, deps=(dS,))
    gl.store(dinitial + whole + offsets(K, BV, V, M), dS)
