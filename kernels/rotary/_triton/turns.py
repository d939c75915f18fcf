"""Angles in fixed point: a turn of 2 pi is 2^32, so that int32 wraps where angles do, and sums are exact in any order.

Shapes: HB heads, BP pairs of channels.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer, which stands in the sum's low bits
ROUND_BITS = tl.constexpr(0x4B400000)  # its bits
TURN = tl.constexpr(6.283185307179586)

# of the least largest error for |x| <= 1: cos(pi/4 x) = 1 + x^2 (..) to 3.3e-8, sin(pi/4 x) = x (..) to 1.2e-9
COS_2, COS_4, COS_6 = tl.constexpr(-0.3084244886), tl.constexpr(0.01585039782), tl.constexpr(-0.000319160311)
SIN_1, SIN_3, SIN_5, SIN_7 = tl.constexpr(0.7853981525), tl.constexpr(-0.08074536726), tl.constexpr(0.002489871937), tl.constexpr(-3.587723782e-05)


@triton.jit
def fixed(x, y):
    """x y turns, modulo one: to 2^-33 and 2^-25 of what is left of them modulo one. For |x y| < 2^22.

    The upper 16 bits are rounded first, the remainder, which is exact, gives the lower 16. Every step is a multiply-add of its own, so that all
    kernels get the same bits whatever a compiler contracts.
    """
    whole = tl.fma(x, y, ROUND) - ROUND
    part = tl.fma(x, y, -whole)
    upper = tl.fma(part, 65536.0, ROUND)
    rest = tl.fma(part, 65536.0, -(upper - ROUND))
    lower = tl.fma(rest, 65536.0, ROUND)
    return ((upper.to(tl.int32, bitcast=True) - ROUND_BITS) << 16) + (lower.to(tl.int32, bitcast=True) - ROUND_BITS)


@triton.jit
def turn(tanh, half_delta):
    """pi tanh(theta) Delta in fixed point, [HB, BP] from tanh [HB or 1, BP] and Delta / 2 [HB, 1]."""
    return fixed(tanh, half_delta)


@triton.jit
def from_radians(angle):
    return fixed(angle, tl.full(angle.shape, 1.0 / TURN, tl.float32))


@triton.jit
def to_radians(angle):
    return angle.to(tl.float32) * (TURN / 4294967296.0)


@triton.jit
def cos_sin(angle):
    """Both to 1.2e-7: polynomials on an eighth of a turn to both sides of the nearest quarter."""
    shifted = angle + 0x20000000
    x = ((shifted & 0x3FFFFFFF) - 0x20000000).to(tl.float32) * (1.0 / 536870912.0)  # eighths of a turn, in [-1, 1]
    z = x * x
    near = ((COS_6 * z + COS_4) * z + COS_2) * z + 1.0
    far = (((SIN_7 * z + SIN_5) * z + SIN_3) * z + SIN_1) * x
    odd = (shifted & 0x40000000) != 0
    cos = tl.where(odd, far, near).to(tl.int32, bitcast=True) ^ ((shifted + 0x40000000) & -0x80000000)
    sin = tl.where(odd, near, far).to(tl.int32, bitcast=True) ^ (shifted & -0x80000000)
    return cos.to(tl.float32, bitcast=True), sin.to(tl.float32, bitcast=True)
