"""A kernel of the tests' own, for the tests of how kernels are compiled without a GPU."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def toy(a, b, c, tokens, N: tl.constexpr):
    """c = a @ b; how much shared memory it takes depends on N and on the stages."""
    rows, cols = tl.arange(0, N), tl.arange(0, N)
    at = rows[:, None] * N + cols[None, :]
    total = tl.zeros([N, N], tl.float32)
    for _ in range(tokens):
        total += tl.dot(tl.load(a + at), tl.load(b + at))
        a += N * N
        b += N * N
    tl.store(c + at, total)
