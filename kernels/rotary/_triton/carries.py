"""The gradients of the turns of a chunk's tokens hold the gradients of all later angles of their document, those of later chunks as well.

Shapes: as in `backward.py`; carries [B L, H, A], what reaches a chunk's last token from behind; dfirst [N, H, A].
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "L"])
def carry_back(
    chunk_sums, carries, dfirst, cu, document, T, L,
    HA: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """carries; and the gradients of the first angles, to which packed documents that end in a later chunk than they start in add their carry."""
    row = tl.program_id(0).to(tl.int64)
    by_rank = tl.num_programs(0).to(tl.int64) * L * HA
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < HA
    carry = tl.zeros([BLOCK], tl.float32)
    for back in range(L):
        c = L - 1 - back
        place = (row * L + c) * HA + at
        tl.store(carries + place, carry, mask=inside)
        total = tl.zeros([BLOCK], tl.float32)
        for r in tl.static_range(R):
            total += tl.load(chunk_sums + r * by_rank + place, mask=inside, other=0.0)
        if PACKED:
            n = tl.load(document + c)
            whole = tl.load(cu + n + 1) >= tl.minimum((c + 1) * CHUNK, T)  # one document from the first token to the last
            if HAS_FIRST:
                last = tl.load(document + tl.minimum(c + 1, L - 1))  # of the next chunk; this one's too if there is a carry
                if (c + 1 < L) & (tl.load(cu + last) >= c * CHUNK) & (tl.load(cu + last) < (c + 1) * CHUNK):
                    to = dfirst + last.to(tl.int64) * HA + at
                    tl.store(to, tl.load(to, mask=inside, other=0.0) + carry, mask=inside)
            carry = tl.where(whole, total + carry, total)
            carry = tl.where(tl.load(cu + n) < c * CHUNK, carry, 0.0)  # it reaches the chunk before
        else:
            carry += total
    if HAS_FIRST and not PACKED:
        tl.store(dfirst + row * HA + at, carry, mask=inside)


@triton.jit(do_not_specialize=["M", "T", "L"])
def turn_gradients(
    dtanh, ddelta, carries, tanh, delta, cu, document, theta_gradient, delta_gradient, M, T, L,
    H: tl.constexpr, A: tl.constexpr, CHUNK: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, HB: tl.constexpr, BA: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The gradients of theta and delta: the shares of ranks and head blocks, and the carry of the chunk.

    dtheta = pi (1 - tanh^2) sum_h delta S,   ddelta = pi sum_a tanh S
    """
    PI: tl.constexpr = 3.141592653589793
    chunk = tl.program_id(0)
    begin = chunk % L * CHUNK
    tokens, cols = begin + tl.arange(0, CHUNK), tl.arange(0, BA)
    there = tokens < T
    carried = there
    if PACKED:
        last = tl.load(document + tl.minimum(chunk + 1, L - 1))  # without a carry it does not matter
        carried = there & (tokens >= tl.load(cu + last))
    rows = (chunk // L).to(tl.int64) * T + tokens
    in_theta = there[:, None] & (cols < A)[None, :]
    turns = tl.load(tanh + rows[:, None] * A + cols[None, :], mask=in_theta, other=0.0)
    reached = tl.where(carried[:, None], turns, 0.0)
    total = tl.zeros([CHUNK, BA], tl.float32)
    for block in range(0, H, HB):
        heads = block + tl.arange(0, HB)
        in_delta = there[:, None] & (heads < H)[None, :]
        in_carry = (heads < H)[:, None] & (cols < A)[None, :]
        carry = tl.load(carries + chunk.to(tl.int64) * (H * A) + heads[:, None] * A + cols[None, :], mask=in_carry, other=0.0)
        at = rows[:, None] * H + heads[None, :]
        steps = tl.load(delta + at, mask=in_delta & carried[:, None], other=0.0)
        total += tl.dot(steps, carry, input_precision="ieee")
        sums = tl.dot(reached, tl.trans(carry), input_precision="ieee")
        for r in tl.static_range(R):
            sums += tl.load(ddelta + r * (M.to(tl.int64) * H) + at, mask=in_delta, other=0.0)
        tl.store(delta_gradient + at, PI * sums, mask=in_delta)
    half = tl.zeros([CHUNK, BA], tl.float32)
    for part in range(PARTS):
        half += tl.load(dtanh + part * (M.to(tl.int64) * A) + rows[:, None] * A + cols[None, :], mask=in_theta, other=0.0)
    total += 2.0 * half  # they hold delta / 2
    out = theta_gradient + rows[:, None] * A + cols[None, :]
    tl.store(out, (PI * (1.0 - turns * turns) * total).to(out.dtype.element_ty), mask=in_theta)
