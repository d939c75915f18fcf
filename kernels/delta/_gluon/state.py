"""The serial pass over the chunks of a sequence (README.md, 2.3 to 2.5) on Hopper, for few sequences and heads, where nothing hides what one step
waits for. Warps share the work: four go from state to state by two products, Y S and Ktail^T R, and do nothing else; four others make the outputs,
and one brings what the next chunks need. Copies, of states and R to memory too, are the tensor memory accelerator's.

Shapes: C rows a chunk, HV value heads, K key size (64 or 128), V value size, BV value columns a program. Inputs are those of `_triton/solve.py`, as
tensor descriptors. States and R pass from hand to hand in slots: R of a chunk lies in the slot of the state before it.
"""

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.delta._gluon.shared import advance, barrier, chunk_rows, mbarriers, offsets, sequence_chunks, shared_rows, shared_tiles, tile, within

SLOTS = gl.constexpr(3)


@cache  # it takes longer to make than all else of a descriptor
def tile_layout(columns: int) -> gl.NVMMASharedLayout:
    """That of a `shared_tile` of so many columns."""
    return gl.NVMMASharedLayout(128 if columns >= 64 else 2 * columns, 16, 2)


def matrix(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A contiguous x [.., X] as a matrix of X columns, copied by tiles [rows, columns]."""
    X = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // X, X], [X, 1], [rows, columns], tile_layout(columns))


def described(
    Y: Tensor, U: Tensor, P: Tensor, Qg: Tensor, Ktail: Tensor, S_all: Tensor, BV: int, *, erase: bool, save: bool
) -> tuple[list[TensorDescriptor], TensorDescriptor]:
    """The kernel's inputs and the states to write. Without `erase` Y is never touched, without `save` S_all; another stands in its place."""
    K, C = Qg.shape[-1], P.shape[-1]
    read = [matrix(Y if erase else Qg, C, K), matrix(U, C, BV), matrix(P, C, C), matrix(Qg, C, K), matrix(Ktail, C, K)]
    return read, matrix(S_all if save else U, K, BV)


@gluon.jit
def load_decay(gamma, chunk, head, HV: gl.constexpr, K: gl.constexpr, G: gl.constexpr):
    """The decay of a chunk [K], of every channel the same if it is one number."""
    keys = gl.arange(0, K, layout=gl.BlockedLayout([K // 32], [32], [1], [0]))
    at = chunk.to(gl.int64) * HV + head
    if G == 2:  # noqa: SIM108 (a conditional expression would compile both)
        decay = gl.load(gamma + at * K + keys)
    else:
        decay = gl.load(gamma + at + keys * 0)
    return decay


@gluon.jit
def copy_chunks(
    Y, U, P, Qg, Ktail, gamma, Y_s, U_s, P_s, Q_s, K_s, gamma_s, full, empty, first, end, head, block, HV: gl.constexpr, G: gl.constexpr,
    B: gl.constexpr,
):  # fmt: skip
    """One warp: brings what chunks need to the buffers, as these become empty."""
    C: gl.constexpr = P_s.shape[1]
    K: gl.constexpr = K_s.shape[2]
    BV: gl.constexpr = U_s.shape[2]
    last = gl.maximum(end - 1, 0)
    if G:  # a chunk ahead: whoever waits for this load waits for memory
        decay = load_decay(gamma, gl.minimum(first, last), head, HV, K, G)
    i, phase = first * 0, first * 0 + 1
    for chunk in range(first, end):
        row, arrived = (chunk * HV + head) * C, full.index(i)
        mbarrier.wait(empty.index(i), phase)
        mbarrier.expect(arrived, 2 * C * ((3 if B else 2) * K + C + BV))  # bytes
        if B:
            tma.async_copy_global_to_shared(Y, [row, 0], arrived, Y_s.index(i))
        tma.async_copy_global_to_shared(U, [row, block * BV], arrived, U_s.index(i))
        tma.async_copy_global_to_shared(Ktail, [row, 0], arrived, K_s.index(i))
        tma.async_copy_global_to_shared(Qg, [row, 0], arrived, Q_s.index(i))
        tma.async_copy_global_to_shared(P, [row, 0], arrived, P_s.index(i))
        if G:
            gamma_s.index(i).store(decay)
            mbarrier.arrive(arrived, count=1)
            decay = load_decay(gamma, gl.minimum(chunk + 1, last), head, HV, K, G)
        i, phase = advance(i, phase, K_s.shape[0])


@gluon.jit
def make_outputs(
    Q_s, P_s, S_s, R_s, full, empty, S_made, R_made, free, U, o, S_all, starts, lengths, tokens, per_sequence, first, end, head, block, scale,
    S_O: gl.constexpr, HV: gl.constexpr, SAVE: gl.constexpr, B: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Four warps: o = scale Qg S + P R of every chunk, and S and R to memory."""
    dtype: gl.constexpr = o.dtype.element_ty
    C: gl.constexpr = R_s.shape[1]
    K: gl.constexpr = S_s.shape[1]
    BV: gl.constexpr = S_s.shape[2]
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    zero = gl.zeros([C, BV], gl.float32, layout=M)
    i, phase = first * 0, first * 0
    slot, slot_phase, before = first * 0, first * 0, first * 0
    for chunk in range(first, end):
        at = chunk * HV + head
        start, rows = chunk_rows(chunk, starts, lengths, tokens, per_sequence, PACKED, C)
        mbarrier.wait(full.index(i), phase)
        mbarrier.wait(S_made.index(slot), slot_phase)
        o_c = warpgroup_mma(Q_s.index(i), S_s.index(slot), zero, use_acc=False, is_async=True)
        if SAVE:
            tma.async_copy_shared_to_global(S_all, [at * K, block * BV], S_s.index(slot))
            tma.store_wait(1)  # all but this one: the slot before has been read
        mbarrier.arrive(free.index(before), count=1, pred=chunk > first)
        o_c = warpgroup_mma_wait(0, deps=(o_c,))
        mbarrier.wait(R_made.index(slot), slot_phase)
        o_c = warpgroup_mma(P_s.index(i), R_s.index(slot), o_c * scale, is_async=True)
        if SAVE and B:
            tma.async_copy_shared_to_global(U, [at * C, block * BV], R_s.index(slot))
        o_c = warpgroup_mma_wait(0, deps=(o_c,))
        mbarrier.arrive(empty.index(i), count=1)
        gl.store(o + start * S_O + offsets(C, BV, S_O, M), o_c.to(dtype), mask=within(rows, C, BV, M))
        before = slot
        i, phase = advance(i, phase, Q_s.shape[0])
        slot, slot_phase = advance(slot, slot_phase, SLOTS)
    if SAVE:
        tma.store_wait(0)


@gluon.jit
def follow_state(
    Y_s, U_s, K_s, gamma_s, S_s, R_s, full, empty, S_made, R_made, free, initial, final, first, end, V: gl.constexpr, G: gl.constexpr,
    B: gl.constexpr, INITIAL: gl.constexpr,
):  # fmt: skip
    """Four warps: R = U - Y S, S <- Diag(gamma) S + Ktail^T R, chunk after chunk."""
    dtype: gl.constexpr = S_s.dtype
    C: gl.constexpr = R_s.shape[1]
    K: gl.constexpr = S_s.shape[1]
    BV: gl.constexpr = S_s.shape[2]
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    S = gl.zeros([K, BV], gl.float32, layout=M)
    if INITIAL:
        S = tile(initial, K, V, K, BV, M)
    zero = gl.zeros([C, BV], gl.float32, layout=M)
    i, phase = first * 0, first * 0
    slot, then, then_phase = first * 0, first * 0 + 1, first * 0 + 1
    S_s.index(0).store(S.to(dtype))
    fence_async_shared()
    barrier()
    mbarrier.arrive(S_made.index(0), count=1)
    for _ in range(first, end):
        mbarrier.wait(full.index(i), phase)
        mbarrier.wait(free.index(then), then_phase)  # here, since between a product and its wait the assembler takes a spin for a reason to wait too
        if B:
            R = warpgroup_mma(Y_s.index(i), S_s.index(slot), zero, use_acc=False, is_async=True)
        R_d = U_s.index(i).load(M)
        if G:
            decay = gl.expand_dims(gamma_s.index(i).load(gl.SliceLayout(1, M)), 1)
        if B:
            R = warpgroup_mma_wait(0, deps=(R,))
            R_d = (R_d.to(gl.float32) - R).to(dtype)
        R_s.index(slot).store(R_d)
        fence_async_shared()
        barrier()
        mbarrier.arrive(R_made.index(slot), count=1)
        if G:
            S = S * decay
        S = warpgroup_mma(K_s.index(i).permute((1, 0)), R_s.index(slot), S, is_async=True)
        S = warpgroup_mma_wait(0, deps=(S,))
        S_s.index(then).store(S.to(dtype))
        fence_async_shared()
        barrier()
        mbarrier.arrive(S_made.index(then), count=1)
        mbarrier.arrive(empty.index(i), count=1)
        slot = then
        i, phase = advance(i, phase, K_s.shape[0])
        then, then_phase = advance(then, then_phase, SLOTS)
    gl.store(final + offsets(K, BV, V, M), S)


@gluon.jit(do_not_specialize=["tokens", "per_sequence"])
def state_kernel(
    Y, U, P, Qg, Ktail, gamma, initial, first_chunk, starts, lengths, o, S_all, final, scale, tokens, per_sequence,
    S_O: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, G: gl.constexpr, B: gl.constexpr,
    INITIAL: gl.constexpr, SAVE: gl.constexpr, PACKED: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program a sequence, head and block of value columns. SAVE keeps the states before the chunks, and R in U's place."""
    pid = gl.program_id(0)
    block, head, sequence = pid % (V // BV), pid // (V // BV) % HV, pid // (V // BV * HV)
    dtype: gl.constexpr = U.dtype
    first, end = sequence_chunks(first_chunk, sequence, per_sequence, PACKED)
    o += head * V + block * BV
    whole = (sequence.to(gl.int64) * HV + head) * K * V + block * BV
    Y_s, Q_s, K_s = shared_tiles(dtype, C, K, STAGES), shared_tiles(dtype, C, K, STAGES), shared_tiles(dtype, C, K, STAGES)
    P_s, U_s, gamma_s = shared_tiles(dtype, C, C, STAGES), shared_tiles(dtype, C, BV, STAGES), shared_rows(K, STAGES)
    S_s, R_s = shared_tiles(dtype, K, BV, SLOTS), shared_tiles(dtype, C, BV, SLOTS)
    full, empty = mbarriers(STAGES, 2 if G else 1), mbarriers(STAGES, 2)  # of the buffers: their bytes, and the decay; both readers
    S_made, R_made, free = mbarriers(SLOTS, 1), mbarriers(SLOTS, 1), mbarriers(SLOTS, 1)
    gl.warp_specialize(
        [
            (follow_state, (
                Y_s, U_s, K_s, gamma_s, S_s, R_s, full, empty, S_made, R_made, free, initial + whole, final + whole, first, end, V, G, B, INITIAL,
            )),
            (make_outputs, (
                Q_s, P_s, S_s, R_s, full, empty, S_made, R_made, free, U, o, S_all, starts, lengths, tokens, per_sequence, first, end, head, block,
                scale, S_O, HV, SAVE, B, PACKED,
            )),
            (copy_chunks, (
                Y, U, P, Qg, Ktail, gamma, Y_s, U_s, P_s, Q_s, K_s, gamma_s, full, empty, first, end, head, block, HV, G, B,
            )),
        ],
        [4, 1],  # warps behind the first four, and how many registers a thread of theirs gets
        [152, 64],
    )  # fmt: skip
