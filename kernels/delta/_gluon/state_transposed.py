"""The serial pass over the chunks of a sequence (README.md, 2.3 to 2.5) on Hopper, for many sequences and heads: with the state transposed,
[value columns, K], it is the left operand of its products. That and what they give may lie in registers, so from state to state nothing goes through
shared memory, and 64 columns a program read what all columns share half as often as 32. `state.py` has more programs where there would be too few.

Shapes: C rows a chunk, HV value heads, K key size (64 or 128), V value size, BV = 64 value columns a program. Inputs are those of
`_triton/solve.py`.
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
    within,
)


@gluon.jit
def fetch_chunk(
    i, Y_s, U_s, P_s, Q_s, K_s, gamma_s, Y, U, P, Qg, Ktail, gamma, chunk, end, HV: gl.constexpr, head, V: gl.constexpr, G: gl.constexpr,
    B: gl.constexpr,
):  # fmt: skip
    """Begins to copy what a chunk needs to buffer i, as one group: nothing behind the last. By masks, since at a branch between them the assembler
    has products wait for each other."""
    C: gl.constexpr = P_s.shape[1]
    K: gl.constexpr = K_s.shape[2]
    at = chunk.to(gl.int64) * HV + head
    rows = gl.where(chunk < end, C, 0)
    if B:
        fetch(Y_s.index(i), Y + at * C * K, K, rows)
    fetch(U_s.index(i), U + at * C * V, V, rows)
    fetch(Q_s.index(i), Qg + at * C * K, K, rows)
    fetch(P_s.index(i), P + at * C * C, C, rows)
    fetch(K_s.index(i), Ktail + at * C * K, K, rows)
    fetch_decay(gamma_s.index(i), gamma, at, chunk < end, G)
    async_copy.commit_group()


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
    MC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])  # of products [BV, C]
    MK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, K, 16])  # of those [BV, K]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [gl.num_warps(), 1], [1, 0])
    first, end = sequence_chunks(first_chunk, sequence, per_sequence, PACKED)
    U += block * BV
    o += head * V + block * BV
    S_all += block * BV
    columns, keys = gl.arange(0, BV, layout=gl.SliceLayout(1, MK)), gl.arange(0, K, layout=gl.SliceLayout(0, MK))
    whole = (sequence.to(gl.int64) * HV + head) * K * V + block * BV + gl.expand_dims(columns, 1) + V * gl.expand_dims(keys, 0)
    Y_s, Q_s, K_s = shared_tiles(dtype, C, K, STAGES), shared_tiles(dtype, C, K, STAGES), shared_tiles(dtype, C, K, STAGES)
    P_s, U_s, gamma_s = shared_tiles(dtype, C, C, STAGES), shared_tiles(dtype, C, BV, STAGES), shared_rows(K, STAGES)
    S_s, R_s, o_s = shared_tile(dtype, K, BV), shared_tile(dtype, C, BV), shared_tile(dtype, C, BV)  # on the way to memory
    for ahead in gl.static_range(STAGES - 1):
        fetch_chunk(ahead, Y_s, U_s, P_s, Q_s, K_s, gamma_s, Y, U, P, Qg, Ktail, gamma, first + ahead, end, HV, head, V, G, B)
    S = gl.zeros([BV, K], gl.float32, layout=MK)
    if INITIAL:
        S = gl.load(initial + whole)
    zero = gl.zeros([BV, C], gl.float32, layout=MC)
    S_d = gl.convert_layout(S.to(dtype), gl.DotOperandLayout(0, MC, 2))
    i, then = first * 0, first * 0 + (STAGES - 1)  # the buffers of this chunk and of the one that is fetched
    for chunk in range(first, end):
        start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
        at = chunk.to(gl.int64) * HV + head
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()  # this chunk has come; every warp has left the one before
        if B:
            R = warpgroup_mma(S_d, Y_s.index(i).permute((1, 0)), zero, use_acc=False, is_async=True)
        o_c = warpgroup_mma(S_d, Q_s.index(i).permute((1, 0)), zero, use_acc=False, is_async=True)
        if SAVE:
            S_s.permute((1, 0)).store(gl.convert_layout(S_d, MK))
        R_d = U_s.index(i).permute((1, 0)).load(MC)
        if SAVE:
            gl.store(S_all + at * K * V + offsets(K, BV, V, COPY), S_s.load(COPY))
        if B:
            R = warpgroup_mma_wait(1, deps=(R,))
            R_d = (R_d.to(gl.float32) - R).to(dtype)
        # S is what a product gave: before that wait the assembler would have its use wait for all products
        if G:
            S = S * gl.expand_dims(gamma_s.index(i).load(gl.SliceLayout(0, MK)), 0)
        R_K, R_C = gl.convert_layout(R_d, gl.DotOperandLayout(0, MK, 2)), gl.convert_layout(R_d, gl.DotOperandLayout(0, MC, 2))
        S = warpgroup_mma(R_K, K_s.index(i), S, is_async=True)
        o_c, S_d = warpgroup_mma_wait(1, deps=(o_c, S_d))  # operands in registers are kept until their product is done
        o_c = warpgroup_mma(R_C, P_s.index(i).permute((1, 0)), o_c * scale, is_async=True)
        fetch_chunk(then, Y_s, U_s, P_s, Q_s, K_s, gamma_s, Y, U, P, Qg, Ktail, gamma, chunk + (STAGES - 1), end, HV, head, V, G, B)
        if SAVE and B:
            R_s.permute((1, 0)).store(R_d)
            gl.store(U + at * C * V + offsets(C, BV, V, COPY), R_s.load(COPY))
        S, R_K = warpgroup_mma_wait(1, deps=(S, R_K))
        S_d = gl.convert_layout(S.to(dtype), gl.DotOperandLayout(0, MC, 2))
        o_c, R_C = warpgroup_mma_wait(0, deps=(o_c, R_C))
        o_s.permute((1, 0)).store(o_c.to(dtype))
        gl.store(o + start * S_O + offsets(C, BV, S_O, COPY), o_s.load(COPY), mask=within(rows, C, BV, COPY))
        then = i
        i = gl.where(i == STAGES - 1, 0, i + 1)
    gl.store(final + whole, S)
