"""Every gradient in one launch; the convolution's output is computed again from x.

Shapes: x, dy [B, T, D] (batch `b` at row b * batch_rows, rows x_token apart; dy likewise, in up to three tensors divided at the channels E1 and E2);
dx [B, T, D]; state, d_new, d_state [N, W-1, D]; partial [programs along tokens, W or W + 1, D] float32, the shares of dweight and behind them of
dbias.

A program walks forwards. dz_t, the gradient before SiLU and norm, reaches the inputs t - W + 1 .. t, so W - 1 unfinished gradients travel along; the
oldest is finished and stored each step. The walk goes W - 1 tokens beyond the segment: what the next one adds to this one's inputs.
"""

import triton
import triton.language as tl

from kernels.conv1d._triton.common import channels, document_end, find_document, load_bias, load_taps, part_of, past
from kernels.conv1d._triton.gradient import accumulate, gradient_step, store_finished


@triton.jit(do_not_specialize=["tokens", "documents", "segment", "segments", "batch_rows", "dy_batch_rows"])
def conv_backward(
    x,
    dy0,
    dy1,
    dy2,
    d_new,
    weight,
    bias,
    state,
    cu_seqlens,
    dx,
    d_state,
    partial,
    tokens,  # T
    documents,  # N
    segment,  # tokens of a program
    segments,  # programs along T
    batch_rows,
    x_token,
    dy_batch_rows,
    dy0_token,
    dy1_token,
    dy2_token,
    D: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    NORM_GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_D_NEW: tl.constexpr,
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
    dy, dy_token = part_of(block * (G * SIZE), dy0, dy1, dy2, dy0_token, dy1_token, dy2_token, D, E1, E2)
    dy += batch * dy_batch_rows * dy_token
    dx += batch * tokens * D

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

    zero = tl.zeros([G, P], tl.float32)
    d_taps = ()
    unfinished = ()  # gradients of the inputs t - W + 1 .. t - 1
    for _ in tl.static_range(W):
        d_taps += (zero,)
    for _ in tl.static_range(W - 1):
        unfinished += (zero,)
    nothing = unfinished
    d_bias = zero
    for t0 in range(first, tl.minimum(last + W - 1, tokens), UNROLL):
        rows = ()
        d_rows = ()
        for k in tl.static_range(UNROLL):
            inside = valid & (t0 + k < tokens)
            rows += (tl.load(x + (t0 + k) * x_token + channel, mask=inside, other=0.0),)
            d_rows += (tl.load(dy + (t0 + k) * dy_token + channel, mask=inside, other=0.0),)
        plain = (t0 + UNROLL <= last) & (t0 + UNROLL < end)  # no sequence ends here
        if HAS_STATE:
            plain = plain & (t0 - (W - 1) >= start)
        if plain:
            for k in tl.static_range(UNROLL):
                u = t0 + k - (W - 1)
                window, dz, unfinished, value = gradient_step(
                    rows[k], d_rows[k], window, unfinished, taps, offset, group, block * G, W, SILU, NORM_GROUPS
                )
                tl.store(dx + u * D + channel, value.to(dx.dtype.element_ty), mask=valid & (u >= start) & (u >= first))
                d_taps = accumulate(d_taps, dz, window, W)
                if HAS_BIAS:
                    d_bias += dz
                window = window[1:]
        else:
            for t in range(t0, tl.minimum(tl.minimum(t0 + UNROLL, last + W - 1), tokens)):
                row = tl.load(x + t * x_token + channel, mask=valid, other=0.0)  # from the cache: both were just read
                d_row = tl.load(dy + t * dy_token + channel, mask=valid, other=0.0)
                window, dz, unfinished, value = gradient_step(row, d_row, window, unfinished, taps, offset, group, block * G, W, SILU, NORM_GROUPS)
                store_finished(dx, d_state, value, t - (W - 1), n, start, first, last, channel, valid, D, W, HAS_STATE)
                dz = tl.where(t < last, dz, 0.0)
                d_taps = accumulate(d_taps, dz, window, W)
                if HAS_BIAS:
                    d_bias += dz
                window = window[1:]
                if t + 1 == end:
                    for j in tl.static_range(W - 1):
                        value = unfinished[j]
                        if HAS_D_NEW:  # the last W - 1 inputs are the new state
                            value += tl.load(d_new + (n * (W - 1) + j) * D + channel, mask=valid, other=0.0).to(tl.float32)
                        store_finished(dx, d_state, value, t - (W - 2) + j, n, start, first, last, channel, valid, D, W, HAS_STATE)
                    unfinished = nothing
                    start = t + 1
                    n += 1
                    if PACKED:
                        end = document_end(cu_seqlens, documents, n)
                        window = past(x, state, n, start, start, x_token, channel, valid & (n < documents), D, W, HAS_STATE)

    ROWS: tl.constexpr = W + HAS_BIAS
    for j in tl.static_range(W):
        tl.store(partial + (piece * ROWS + j) * D + channel, d_taps[j], mask=valid)
    if HAS_BIAS:
        tl.store(partial + (piece * ROWS + W) * D + channel, d_bias, mask=valid)
