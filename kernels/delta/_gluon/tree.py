"""The tree of README.md, section 3, with a column of the chunk a thread: operands of its levels, and where the results go.

Shapes: C = 64 rows a chunk, R = C / 2 rows of a half tile, N = R / 2, X channels. A group holds of every 16 rows the first or the last 8.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.delta._gluon.shared import LOG2E


@gluon.jit
def halves(x, h: gl.constexpr):
    """x [C, X] as the lower and the upper halves of its blocks of 2h rows, each [C / 2h, h, X]."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0] // (2 * h), 2, h, x.shape[1]]), [0, 2, 3, 1]))


@gluon.jit
def whole(lower, upper, h: gl.constexpr):
    """The inverse of `halves`; lower and upper [C / 2, X] or [C / 2h, h, X]."""
    R: gl.constexpr = lower.numel // lower.shape[len(lower.shape) - 1]
    X: gl.constexpr = lower.shape[len(lower.shape) - 1]
    x = gl.join(gl.reshape(lower, [R // h, h, X]), gl.reshape(upper, [R // h, h, X]))
    return gl.reshape(gl.permute(x, [0, 3, 1, 2]), [2 * R, X])


@gluon.jit
def flat(x, dtype: gl.constexpr):
    """Half tiles [C / 2h, h, X] as [R, X], rounded."""
    return gl.reshape(x, [x.shape[0] * x.shape[1], x.shape[2]]).to(dtype)


@gluon.jit
def over(x, like):
    """One row a block x [C / 2h, X] for all h rows of it, in the layout of `like`."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True), 1)


@gluon.jit
def interleave(q, e):
    """[N, X], [N, X] -> [2N, X]: 8 rows of q, 8 of e and so on. Of a product with these rows every thread holds as many of q as of e."""
    N: gl.constexpr = q.shape[0]
    X: gl.constexpr = q.shape[1]
    return gl.reshape(gl.permute(gl.reshape(gl.join(q, e), [N // 8, 8, X, 2]), [0, 3, 1, 2]), [2 * N, X])


@gluon.jit
def half_rows(i, h: gl.constexpr, C: gl.constexpr):
    """Lower row of the chunk of row i of a half tile at the level of h rows; its upper row is h further. Rows i lie by groups below h = 8."""
    if h < 8:
        t = i % 4
        row = ((i // 4) % 4) * 16 + (i // (C // 4)) * 8 + (t // h) * (2 * h) + t % h
    else:
        row = (i // h) * (2 * h) + i % h
    return row


@gluon.jit
def near_level(Q, E, K, decay, left, right, h: gl.constexpr):
    """The operands of (3.3) for the blocks of 2h rows, whose rows a thread holds: upper rows of q and e to `left`, lower ones of k to `right`.

    Q, E [.., X] are q and e times x(r, a), a the row before the block of h rows that r is in; K is k times x(a, s), a the last row of that block, and
    decay [blocks, X] is that of a whole block. Returned are the same of blocks of 2h rows.
    """
    q_l, q_u = halves(Q, h)
    e_l, e_u = halves(E, h)
    k_l, k_u = halves(K, h)
    left.store(interleave(flat(q_u, left.dtype), flat(e_u, left.dtype)))
    right.store(flat(k_l, right.dtype))
    d_l, d_u = gl.split(gl.permute(gl.reshape(decay, [decay.shape[0] // 2, 2, decay.shape[1]]), [0, 2, 1]))
    since, until = over(d_l, q_u), over(d_u, k_l)
    layout: gl.constexpr = Q.type.layout
    Q = gl.convert_layout(whole(q_l, q_u * since, h), layout, assert_trivial=True)
    E = gl.convert_layout(whole(e_l, e_u * since, h), layout, assert_trivial=True)
    K = gl.convert_layout(whole(k_l * until, k_u, h), layout, assert_trivial=True)
    return Q, E, K, d_l * d_u


@gluon.jit
def near_levels(q, k, b, g, operands_0, operands_1, operands_2, group: gl.constexpr, B: gl.constexpr):
    """The levels h = 1, 2, 4 of a group of rows [R, X]. Without e its place is taken by q."""
    R: gl.constexpr = q.shape[0]
    N: gl.constexpr = R // 2
    decay = gl.exp2(g.to(gl.float32) * LOG2E)
    K = k.to(gl.float32)
    Q = q.to(gl.float32) * decay
    E = Q
    if B:
        E = (K * b.to(gl.float32)) * decay
    Q, E, K, decay = near_level(Q, E, K, decay, operands_0[0].slice(group * R, R), operands_0[1].slice(group * N, N), 1)
    Q, E, K, decay = near_level(Q, E, K, decay, operands_1[0].slice(group * R, R), operands_1[1].slice(group * N, N), 2)
    Q, E, K, decay = near_level(Q, E, K, decay, operands_2[0].slice(group * R, R), operands_2[1].slice(group * N, N), 4)
    return Q, E, K, decay


@gluon.jit
def far_keys(K, right, h: gl.constexpr):
    """The operand k for h >= 16, where a row is one of a lower or of an upper half by its warp: of all rows, the lower ones first."""
    C: gl.constexpr = K.shape[0]
    X: gl.constexpr = K.shape[1]
    k = gl.permute(gl.reshape(K.to(right.dtype), [C // (2 * h), 2, h, X]), [1, 0, 2, 3])
    right.store(gl.reshape(k, [C, X]))


@gluon.jit
def far_queries(Q, E, left, h: gl.constexpr):
    """The operands q and e of the same."""
    C: gl.constexpr = Q.shape[0]
    X: gl.constexpr = Q.shape[1]
    x = gl.reshape(gl.join(Q.to(left.dtype), E.to(left.dtype)), [C // (2 * h), 2, h // 8, 8, X, 2])
    left.store(gl.reshape(gl.permute(x, [1, 0, 2, 5, 3, 4]), [2 * C, X]))


@gluon.jit
def parted(acc, scale, dtype: gl.constexpr):
    """The results of a level, rounded: the rows of q, scaled, and those of e, both [R, R]."""
    C: gl.constexpr = acc.shape[0]
    R: gl.constexpr = acc.shape[1]
    of_q, of_e = gl.split(gl.permute(gl.reshape(acc, [C // 16, 2, 8, R]), [0, 2, 3, 1]))
    return gl.reshape(of_q * scale, [R, R]).to(dtype), gl.reshape(of_e, [R, R]).to(gl.float16)


@gluon.jit
def keep(acc, kept, scale, B: gl.constexpr):
    """The results of a level to shared memory: where they go takes registers to work out."""
    of_q, of_e = parted(acc, scale, kept[0].dtype)
    kept[0].store(of_q)
    if B:
        kept[1].store(of_e)


@gluon.jit
def put(of_q, of_e, P, T, h: gl.constexpr, B: gl.constexpr):
    """The results of a level: rows of q to P, rows of e to T."""
    R: gl.constexpr = of_q.shape[0]
    C: gl.constexpr = 2 * R
    layout: gl.constexpr = of_q.type.layout
    i = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(1, layout)), 1)
    j = gl.expand_dims(gl.arange(0, R, layout=gl.SliceLayout(0, layout)), 0)
    to = (half_rows(i, h, C) + h) * C + half_rows(j, h, C)
    same = i // h == j // h
    gl.store(P + to, of_q, mask=same)
    if B:
        gl.store(T + to, of_e, mask=same)


@gluon.jit
def put_kept(kept, P, T, h: gl.constexpr, B: gl.constexpr):
    """What `keep` has kept, four numbers a thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    of_q = kept[0].load(layout)
    of_e = of_q
    if B:
        of_e = kept[1].load(layout)
    put(of_q, of_e, P, T, h, B)


@gluon.jit
def put_diagonal(P, x):
    """The diagonal of x [C, C] to P, and zeros above it."""
    C: gl.constexpr = x.shape[0]
    r = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(1, x.type.layout)), 1)
    s = gl.expand_dims(gl.arange(0, C, layout=gl.SliceLayout(0, x.type.layout)), 0)
    gl.store(P + r * C + s, gl.where(r == s, x, 0.0).to(P.dtype.element_ty), mask=r <= s)


@gluon.jit
def group_tile(x, rows, S, group: gl.constexpr, C: gl.constexpr, X: gl.constexpr, layout: gl.constexpr):
    """Of every 16 rows the first or the last 8, [R, X], from memory, zero from row `rows` on."""
    n = gl.arange(0, C // 2, layout=gl.SliceLayout(1, layout))
    r = gl.expand_dims((n // 8) * 16 + n % 8 + 8 * group, 1)
    c = gl.expand_dims(gl.arange(0, X, layout=gl.SliceLayout(0, layout)), 0)
    return gl.load(x + (r * S + c), mask=(r < rows) & (c >= 0), other=0.0)


@gluon.jit
def group_gate(b, rows, S, group: gl.constexpr, B: gl.constexpr, C: gl.constexpr, X: gl.constexpr, layout: gl.constexpr):
    """The erase gate of a group of rows, [R, X] or [R, 1]."""
    if B == 2:
        gate = group_tile(b, rows, S, group, C, X, layout)
    else:
        n = gl.arange(0, C // 2, layout=gl.SliceLayout(1, layout))
        r = (n // 8) * 16 + n % 8 + 8 * group
        gate = gl.expand_dims(gl.load(b + r * S, mask=(r < rows) & (B > 0), other=0.0), 1)
    return gate
