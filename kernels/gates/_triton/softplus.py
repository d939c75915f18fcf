"""softplus, and its derivative from its value.

With u = exp(-|x|) in (0, 1]:   softplus(x) = max(x, 0) + log(1 + u),   softplus'(x) = sigmoid(x) = 1 - exp(-softplus(x))
"""

import triton
import triton.language as tl


@triton.jit
def log1p_01(u):
    """log(1 + u) for 0 <= u <= 1 with a relative error of at most 3e-7, however small u is: u times a polynomial.

    The polynomial is the one of degree 9 with the smallest relative error on [0, 1], 4.7e-9; its first coefficient rounds to 1. A logarithm of
    1 + u would be off by 2^-22 absolutely, 1e-4 of a decay step of 0.002.
    """
    p = u * -0.0032440251670777798 + 0.01985146291553974
    p = p * u - 0.05695953592658043
    p = p * u + 0.10603655129671097
    p = p * u - 0.15305592119693756
    p = p * u + 0.1967593878507614
    p = p * u - 0.24954134225845337
    p = p * u + 0.3332996368408203
    p = p * u - 0.4999990165233612
    return (p * u + 1.0) * u


@triton.jit
def softplus(x):
    """log(1 + exp(x)); at most (|x| + 8) 2^-23 off, relatively."""
    return tl.maximum(x, 0.0) + log1p_01(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid_of_softplus(dt):
    """1 - exp(-dt) for dt = softplus(x) >= 0 with a relative error of at most 4e-7: the series where the difference would lose digits."""
    p = dt * 0.0001984126984126984 - 0.001388888888888889
    p = p * dt + 0.008333333333333333
    p = p * dt - 0.041666666666666664
    p = p * dt + 0.16666666666666666
    p = p * dt - 0.5
    return tl.where(dt < 0.35, (p * dt + 1.0) * dt, 1.0 - tl.exp(-dt))
