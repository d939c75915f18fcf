"""One token of every sequence, for decoding.

Shapes: x [B, D], rows x_row apart; state, new_state [B, W-1, D]; y [B, D]. A program takes a tile of [G, P] channels of one sequence.
"""

import triton
import triton.language as tl

from kernels.conv1d._triton.common import channels, convolve, epilogue, load_bias, load_taps


@triton.jit
def conv_step(
    x,
    weight,
    bias,
    state,
    y,
    new_state,
    x_row,
    D: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    NORM_GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
):
    BLOCKS: tl.constexpr = (D + G * SIZE - 1) // (G * SIZE)
    block = tl.program_id(0) % BLOCKS
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    group, channel, valid = channels(block, D, SIZE, P, G)
    row = tl.load(x + n * x_row + channel, mask=valid, other=0.0)
    window = ()
    for j in tl.static_range(W - 1):
        before = tl.load(state + (n * (W - 1) + j) * D + channel, mask=valid, other=0.0)
        window += (before.to(row.dtype).to(tl.float32),)
    window += (row.to(tl.float32),)
    z = convolve(window, load_taps(weight, channel, valid, W), load_bias(bias, channel, valid, HAS_BIAS), W)
    tl.store(y + n * D + channel, epilogue(z, group, block * G, SILU, NORM_GROUPS).to(y.dtype.element_ty), mask=valid)
    for j in tl.static_range(W - 1):
        tl.store(new_state + (n * (W - 1) + j) * D + channel, window[j + 1].to(new_state.dtype.element_ty), mask=valid)
