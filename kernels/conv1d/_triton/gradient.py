"""One token's part of the backward pass.

Shapes: tiles [G, P] of G groups of channels; W taps; a window is a tuple of W tiles, the oldest first.
"""

import triton
import triton.language as tl

from kernels.conv1d._triton.common import convolve, norm_factor, sigmoid


@triton.jit
def epilogue_gradient(z, dy, group, first_group, SILU: tl.constexpr, NORM_GROUPS: tl.constexpr):
    """The gradient of z from that of epilogue(z).

    With y = s r and r = 1 / sqrt(sum s^2 + eps):  ds = r (dy - y sum(y dy)).  With s = z sigmoid(z):  ds/dz = sigmoid + s (1 - sigmoid).
    """
    s = z
    if SILU:
        gate = sigmoid(z)
        s = z * gate
    if NORM_GROUPS > 0:  # noqa: SIM102 (outer: when compiled)
        if first_group < NORM_GROUPS:
            r = norm_factor(s, group, NORM_GROUPS)
            along = tl.where(group < NORM_GROUPS, r * r * tl.sum(s * dy, 1)[:, None], 0.0)
            dy = r * (dy - s * along)
    if SILU:
        dy = dy * (gate + s * (1.0 - gate))
    return dy


@triton.jit
def gradient_step(row, d_row, window, unfinished, taps, offset, group, first_group, W: tl.constexpr, SILU: tl.constexpr, NORM_GROUPS: tl.constexpr):
    """One token: the window with its input, dz, the unfinished gradients with its share, and the one that this finishes."""
    window += (row.to(tl.float32),)
    dz = epilogue_gradient(convolve(window, taps, offset, W), d_row.to(tl.float32), group, first_group, SILU, NORM_GROUPS)
    shifted = ()
    for j in tl.static_range(W - 2):
        shifted += (unfinished[j + 1] + taps[j + 1] * dz,)
    shifted += (taps[W - 1] * dz,)
    return window, dz, shifted, unfinished[0] + taps[0] * dz


@triton.jit
def accumulate(d_taps, dz, window, W: tl.constexpr):
    """The weight's gradient with one token's share."""
    sums = ()
    for j in tl.static_range(W):
        sums += (d_taps[j] + dz * window[j],)
    return sums


@triton.jit
def store_finished(dx, d_state, value, u, n, start, first, last, channel, valid, D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """The gradient of input `u` of sequence `n`. Before `start` it is a row of the state, which belongs to the segment where the sequence starts."""
    tl.store(dx + u * D + channel, value.to(dx.dtype.element_ty), mask=valid & (u >= start) & (u >= first) & (u < last))
    if HAS_STATE:  # noqa: SIM102 (outer: when compiled)
        if (u < start) & (start >= first) & (start < last):
            tl.store(d_state + (n * (W - 1) + u - start + W - 1) * D + channel, value.to(d_state.dtype.element_ty), mask=valid)
