"""One token of the delta rule (README.md, 1.1 - 1.3).

Shapes: B sequences, H key heads, HV value heads, K key size, V value size. BK: K rounded up to a power of two; BV: value columns a program.
"""

import triton
import triton.language as tl

STRIDES = ("q_B", "q_H", "k_B", "k_H", "v_B", "v_H", "g_B", "g_H", "b_B", "b_H", "w_B", "w_H")


@triton.jit(do_not_specialize=[*STRIDES, "HV", "GROUP", "G_GROUP", "B_GROUP"])
def step_kernel(
    q,
    k,
    v,
    g,
    b,
    w,
    state,
    o,
    new_state,
    scale,
    q_B,
    q_H,
    k_B,
    k_H,
    v_B,
    v_H,
    g_B,
    g_H,
    b_B,
    b_H,
    w_B,
    w_H,
    HV,
    GROUP,  # value heads a head of q and k
    G_GROUP,  # value heads a head of g, of b
    B_GROUP,
    G_C: tl.constexpr,  # stride of the channels: 1, or 0 for a gate with one number a head
    B_C: tl.constexpr,
    W_C: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """q, k [B, H, K], v [B, HV, V], g, b, w as `kernels.delta_rule_step` or None, state, new_state [B, HV, K, V] contiguous, o [B, HV, V] contiguous.

    A program holds BV columns of one state. The columns do not meet in the recurrence, so it reads and writes each of its entries once.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    pair = (program // blocks).to(tl.int64)
    n, head = pair // HV, pair % HV
    rows = tl.arange(0, BK)
    columns = (program % blocks) * BV + tl.arange(0, BV)
    in_K, in_V = rows < K, columns < V
    inside = in_K[:, None] & in_V[None, :]
    tile = pair * (K * V) + rows[:, None] * V + columns[None, :]

    key_head = head // GROUP
    q_K = tl.load(q + n * q_B + key_head * q_H + rows, mask=in_K, other=0.0).to(tl.float32) * scale
    k_K = tl.load(k + n * k_B + key_head * k_H + rows, mask=in_K, other=0.0).to(tl.float32)
    R = tl.load(v + n * v_B + head * v_H + columns, mask=in_V, other=0.0).to(tl.float32)
    if w is not None:
        R *= tl.load(w + n * w_B + head * w_H + columns * W_C, mask=in_V, other=0.0).to(tl.float32)
    decay, e_K = k_K, k_K  # not read without a gate
    if g is not None:
        decay = tl.exp(tl.load(g + n * g_B + (head // G_GROUP) * g_H + rows * G_C, mask=in_K, other=0.0))
    if b is not None:
        e_K = k_K * tl.load(b + n * b_B + (head // B_GROUP) * b_H + rows * B_C, mask=in_K, other=0.0).to(tl.float32)
    # behind the vectors, which would wait with it: 95 % of the copy's bandwidth where 88 were seen
    S = tl.load(state + tile, mask=inside, other=0.0)
    if g is not None:
        S *= decay[:, None]
    if b is not None:
        R -= tl.sum(S * e_K[:, None], 0)
    # S_t^T q with S_t = S + k R^T: the sum over the decayed state does not wait for R
    answer = tl.sum(S * q_K[:, None], 0) + tl.sum(q_K * k_K, 0) * R
    tl.store(new_state + tile, S + k_K[:, None] * R[None, :], mask=inside)
    tl.store(o + pair * V + columns, answer.to(o.dtype.element_ty), mask=in_V)
