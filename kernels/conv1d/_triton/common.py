"""What the convolution's kernels share: tables, taps, the state's rows, SiLU and the norm.

Shapes: a program owns a tile of G groups of SIZE channels, [G, P] with P = SIZE padded to a power of two; W taps.
A window is a tuple of [G, P] tiles, the oldest first.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
NORM_EPS: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def channels(block, D: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, G: tl.constexpr):
    """The tile's groups [G, 1], its channels [G, P], and which of them exist."""
    group = block * G + tl.arange(0, G)[:, None]
    inside = tl.arange(0, P)[None, :]
    channel = group * SIZE + inside
    if SIZE == P and D % (G * SIZE) == 0:
        valid = tl.full([G, P], True, tl.int1)
    elif SIZE == P:
        valid = channel < D
    else:
        valid = (inside < SIZE) & (channel < D)
    return group, channel, valid


@triton.jit
def part_of(channel, part0, part1, part2, stride0, stride1, stride2, D: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr):
    """Of D channels in up to three tensors, divided at E1 and E2, the tensor that holds `channel`, moved so that its first channel has its number
    among all; and how far its rows lie apart."""
    part, stride = part0, stride0 + channel * 0
    if E1 < D:  # noqa: SIM102 (outer: when compiled)
        if channel >= E1:
            part, stride = part1 - E1, stride1 + channel * 0
    if E2 < D:  # noqa: SIM102
        if channel >= E2:
            part, stride = part2 - E2, stride2 + channel * 0
    return part, stride


@triton.jit
def load_taps(weight, channel, valid, W: tl.constexpr):
    """The W taps of every channel, the one that meets the oldest input first."""
    taps = ()
    for j in tl.static_range(W):
        taps += (tl.load(weight + channel * W + j, mask=valid, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_bias(bias, channel, valid, HAS_BIAS: tl.constexpr):
    """The bias, or zero."""
    if HAS_BIAS:
        return tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def find_document(cu_seqlens, documents, token):
    """The packed document that holds `token`: the last one that starts at or before it."""
    low = token * 0
    high = low + documents
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def document_end(cu_seqlens, documents, n):
    """The first token behind document `n`; -1 behind the last document."""
    return tl.load(cu_seqlens + n + 1, mask=n < documents, other=-1).to(tl.int64)


@triton.jit
def past(x, state, n, start, token, x_token, channel, valid, D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """The window before `token` of sequence `n`: W - 1 inputs, oldest first. Those before `start` are the state's, or zero.

    `x` points at the sequence axis' token 0, `state` is contiguous [N, W-1, D]; its values are rounded to x's dtype, as are all inputs.
    """
    window = ()
    for j in tl.static_range(W - 1):
        u = token - (W - 1) + j
        row = tl.load(x + u * x_token + channel, mask=valid & (u >= start), other=0.0)
        if HAS_STATE:
            before = tl.load(state + (n * (W - 1) + u - start + W - 1) * D + channel, mask=valid & (u < start), other=0.0)
            row = tl.where(u >= start, row, before.to(row.dtype))
        window += (row.to(tl.float32),)
    return window


@triton.jit
def convolve(window, taps, bias, W: tl.constexpr):
    """bias + the sum of W taps times a window of W inputs."""
    z = bias
    for j in tl.static_range(W):
        z += taps[j] * window[j]
    return z


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)). The square of a reciprocal root is two instructions, a division ten; exp may overflow, its reciprocal is then 0."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2E))
    return root * root


@triton.jit
def norm_factor(s, group, NORM_GROUPS: tl.constexpr):
    """1 / sqrt(sum s^2 + eps) of every group [G, 1]; 1 for the groups that are not normalised."""
    factor = tl.rsqrt(tl.sum(s * s, 1)[:, None] + NORM_EPS)
    return tl.where(group < NORM_GROUPS, factor, 1.0)


@triton.jit
def epilogue(z, group, first_group, SILU: tl.constexpr, NORM_GROUPS: tl.constexpr):
    """SiLU and the norm."""
    if SILU:
        z = z * sigmoid(z)
    if NORM_GROUPS > 0:  # noqa: SIM102 (outer: when compiled)
        if first_group < NORM_GROUPS:  # one answer for the whole program
            z = z * norm_factor(z, group, NORM_GROUPS)
    return z
