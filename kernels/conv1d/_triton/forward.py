"""y and the new state, in one launch: every input is read once.

Shapes: x [B, T, D] with batch `b` at row b * batch_rows, rows x_token apart; y [B, T, D], in up to three tensors divided at the channels
E1 and E2; state, new_state [N, W-1, D]. A program walks the tokens of one segment for a tile of [G, P] channels and keeps the last W - 1 inputs in
registers.
"""

import triton
import triton.language as tl

from kernels.conv1d._triton.common import channels, convolve, document_end, epilogue, find_document, load_bias, load_taps, part_of, past


@triton.jit(do_not_specialize=["tokens", "documents", "segment", "segments", "batch_rows"])
def conv_forward(
    x,
    weight,
    bias,
    state,
    cu_seqlens,
    y0,
    y1,
    y2,
    new_state,
    tokens,  # T
    documents,  # N
    segment,  # tokens of a program
    segments,  # programs along T
    batch_rows,
    x_token,
    D: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    NORM_GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    UNROLL: tl.constexpr,
):
    BLOCKS: tl.constexpr = (D + G * SIZE - 1) // (G * SIZE)
    block = tl.program_id(0) % BLOCKS
    piece = (tl.program_id(0) // BLOCKS).to(tl.int64)
    batch = piece // segments
    first = (piece % segments) * segment
    last = tl.minimum(first + segment, tokens)
    x += batch * batch_rows * x_token
    y, y_token = part_of(block * (G * SIZE), y0, y1, y2, E1, E2 - E1, D - E2, D, E1, E2)
    y += batch * tokens * y_token

    group, channel, valid = channels(block, D, SIZE, P, G)
    taps = load_taps(weight, channel, valid, W)
    offset = load_bias(bias, channel, valid, HAS_BIAS)
    if PACKED:
        n = find_document(cu_seqlens, documents, first)
        start = tl.load(cu_seqlens + n).to(tl.int64)
        end = document_end(cu_seqlens, documents, n)
    else:
        n = batch
        start = first * 0
        end = start + tokens
    window = past(x, state, n, start, first, x_token, channel, valid, D, W, HAS_STATE)

    for t0 in range(first, last, UNROLL):
        rows = ()
        for k in tl.static_range(UNROLL):
            rows += (tl.load(x + (t0 + k) * x_token + channel, mask=valid & (t0 + k < last), other=0.0),)
        if (t0 + UNROLL <= last) & (t0 + UNROLL < end):  # no sequence ends here
            for k in tl.static_range(UNROLL):
                window += (rows[k].to(tl.float32),)
                z = epilogue(convolve(window, taps, offset, W), group, block * G, SILU, NORM_GROUPS)
                tl.store(y + (t0 + k) * y_token + channel, z.to(y.dtype.element_ty), mask=valid)
                window = window[1:]
        else:
            for t in range(t0, tl.minimum(t0 + UNROLL, last)):
                row = tl.load(x + t * x_token + channel, mask=valid, other=0.0)  # from the cache: it was just read
                window += (row.to(tl.float32),)
                z = epilogue(convolve(window, taps, offset, W), group, block * G, SILU, NORM_GROUPS)
                tl.store(y + t * y_token + channel, z.to(y.dtype.element_ty), mask=valid)
                window = window[1:]
                if t + 1 == end:
                    for j in tl.static_range(W - 1):
                        tl.store(new_state + (n * (W - 1) + j) * D + channel, window[j].to(new_state.dtype.element_ty), mask=valid)
                    n += 1
                    if PACKED:
                        end = document_end(cu_seqlens, documents, n)
                        window = past(x, state, n, t + 1, t + 1, x_token, channel, valid & (n < documents), D, W, HAS_STATE)
