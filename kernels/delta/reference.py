"""The delta rule in plain torch: `recurrent` is the specification, `chunkwise` the algorithm. Any device; exact in float64.

Shapes: N sequences, H key heads, G value heads per key head (HV = H * G), K key size, V value size, C rows a chunk, M tokens, n chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta.tree import tree_scores
from kernels.varlen import chunk_table, gather_rows, scatter_rows, sequence_lengths

CHUNK = 64  # rows a chunk; a power of two (the scores are a tree over its halves)


def accumulator_dtype(v: Tensor) -> torch.dtype:
    """State, decay and accumulators: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    b: Tensor | None,
    w: Tensor | None,
    *,
    scale: float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence.

        S' = Diag(exp g) S;   S <- S' + k (w * v - S'^T (b * k))^T;   o = S^T (scale * q)

    q, k, g, b [N, HV, K|1], v, w [N, HV, V|1], state [N, HV, K, V], all in the accumulator's dtype. Returns o [N, HV, V] and the new state.
    """
    decayed = state if g is None else g.exp().unsqueeze(-1) * state
    write = v if w is None else w * v
    if b is not None:
        write = write - torch.einsum("nhk,nhkv->nhv", b * k, decayed)
    state = decayed + k.unsqueeze(-1) * write.unsqueeze(-2)
    return torch.einsum("nhk,nhkv->nhv", scale * q, state), state


def ranked_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, w: Tensor | None, own: Tensor | None, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token with R keys, values and queries, and no erase, that reads what it writes itself with another weight than later tokens.

        S' = exp(g) S;   X = sum_r k_r v_r^T;   S <- S' + w X;   o_r = (S' + own X)^T (scale * q_r)

    q, k [N, R, HV, K], v [N, R, HV, V], g, w, own [N, HV, 1] (own None: w), state [N, HV, K, V]. Returns o [N, R, HV, V] and the new state.
    """
    decayed = state if g is None else g.exp().unsqueeze(-1) * state
    written = torch.einsum("nrhk,nrhv->nhkv", k, v)
    state = decayed + (written if w is None else w.unsqueeze(-1) * written)
    read = state if own is None else decayed + own.unsqueeze(-1) * written
    return torch.einsum("nrhk,nhkv->nrhv", scale * q, read), state


def expand_heads(x: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Repeat the heads axis (second to last) to `heads`: value head j reads key head j // (HV // H)."""
    return None if x is None else x.to(dtype).repeat_interleave(heads // x.shape[-2], dim=-2)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    b: Tensor | None = None,
    w: Tensor | None = None,
    *,
    own: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T,   o_t = S_t^T (scale * q_t), token by token.

    Arguments and results as `kernels.delta_rule`.
    """
    if cu_seqlens is not None:
        outputs, states = [], []
        for n, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
            qkv, document = [x[:, start:end] for x in (q, k, v)], [None if x is None else x[:, start:end] for x in (g, b, w, own)]
            carried = None if state is None else state[n : n + 1]
            o, s = recurrent(*qkv, *document[:3], own=document[3], scale=scale, state=carried)
            outputs.append(o)
            states.append(s)
        return torch.cat(outputs, 1), torch.cat(states)
    heads, v_dim = v.shape[-2:]
    dtype = accumulator_dtype(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ranked, one_rank = is_ranked(q, own), q.ndim == 4
    if ranked and one_rank:
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
    inputs = [expand_heads(x, heads, dtype) for x in (q, k, v, g, *((w, own) if ranked else (b, w)))]
    S = v.new_zeros(v.shape[0], heads, k.shape[-1], v_dim, dtype=dtype) if state is None else state
    outputs = []
    for t in range(v.shape[1]):
        token: Any = [None if x is None else x[:, t] for x in inputs]
        o, S = (ranked_step if ranked else step)(*token, scale=scale, state=S)
        outputs.append(o.squeeze(1) if ranked and one_rank else o)
    return torch.stack(outputs, 1).to(v.dtype), S


def is_ranked(q: Tensor, own: Tensor | None) -> bool:
    """Whether a call has what only tokens without an erase gate can have: several keys, values and queries, or a weight of their own."""
    return own is not None or q.ndim == 5


class Chunks(NamedTuple):
    """What the serial pass over chunks needs; it no longer knows the gates. Leading axes [n, H, G or 1]."""

    Y: Tensor | None  # [.., C, K]  A Ebar; None without an erase gate
    U: Tensor  # [.., C, V]  A Z
    P: Tensor | None  # [.., C, C]  scores of the queries, diagonal included; None where somebody else adds their products
    Qg: Tensor  # [.., C, K]  gamma * scale * q
    Ktail: Tensor  # [.., C, K]  (gamma_C / gamma) * k
    gamma_C: Tensor | None  # [.., K or 1, 1]  decay over the whole chunk; None without decay


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    b: Tensor | None = None,
    w: Tensor | None = None,
    *,
    own: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `recurrent`, by chunks of 64 rows (README.md, section 2). No exponent is ever positive.

    Arguments and results as `kernels.delta_rule`.
    """
    (batch, tokens), (v_heads, v_dim), (heads, k_dim) = v.shape[:2], v.shape[-2:], k.shape[-2:]
    groups, dtype, ranked = v_heads // heads, accumulator_dtype(v), is_ranked(q, own)
    table = chunk_table(sequence_lengths(batch, tokens, cu_seqlens, v.device), CHUNK)

    def to_chunks(x: Tensor | None) -> Tensor | None:
        """[B, T, H or HV, X] -> [n, H, 1 or G, C, X]; rows past the end of a sequence are zero and change nothing. Ranks lie side by side in X."""
        if x is None:
            return None
        if x.ndim == 5:
            x = x.transpose(2, 3).flatten(-2)
        rows = scatter_rows(x.to(dtype).flatten(0, 1), table.slot, table.n_chunks * CHUNK)
        return rows.view(table.n_chunks, CHUNK, heads, -1, x.shape[-1]).permute(0, 2, 3, 1, 4).contiguous()

    q_c, k_c, v_c, g_c, b_c, w_c = (to_chunks(x) for x in (q, k, v, g, b, w))
    assert q_c is not None and k_c is not None and v_c is not None  # noqa: PT018
    q_c = q_c * (k_dim**-0.5 if scale is None else scale)
    inside = None
    if ranked:
        q_c, k_c, v_c = (x.unflatten(-1, (q.shape[2] if q.ndim == 5 else 1, -1)) for x in (q_c, k_c, v_c))
        chunks, inside = ranked_chunk(q_c, k_c, v_c, g_c, w_c, to_chunks(own))
    else:
        chunks = intra_chunk(q_c, k_c, v_c if w_c is None else w_c * v_c, g_c, None if b_c is None else b_c * k_c)
    if state is None:
        state = v.new_zeros(len(table.order), v_heads, k_dim, v_dim, dtype=dtype)
    o_c, S = inter_chunk(chunks, state[table.order].unflatten(1, (heads, groups)), table.active)
    o_c = (o_c if inside is None else o_c + inside).unflatten(3, (CHUNK, -1)).permute(0, 3, 4, 1, 2, 5)  # [n, C, R, H, G, V]
    o = gather_rows(o_c.reshape(table.n_chunks * CHUNK, -1), table.slot)
    final = gather_rows(S.flatten(1, 2), torch.argsort(table.order))
    return o.view(v.shape).to(v.dtype), final


def intra_chunk(q: Tensor, k: Tensor, Z: Tensor, g: Tensor | None, e: Tensor | None) -> Chunks:
    """Everything inside a chunk that needs no state: scores, the solve with I + T, the decayed queries and keys."""
    left = q.unsqueeze(-2) if e is None else torch.stack(torch.broadcast_tensors(q, e), -2)
    strict, prefix, suffix = decay_scores(left, k, g)
    decay = None if prefix is None else prefix.exp()
    P, *rest = strict.unbind(-3)
    Y, U = None, Z
    if e is not None:
        T = rest[0].contiguous()  # of I + T: the unit diagonal is implied by `unitriangular`; the solver copies other layouts slowly
        Y = torch.linalg.solve_triangular(T, e if decay is None else decay * e, upper=False, unitriangular=True)
        U = torch.linalg.solve_triangular(T, Z, upper=False, unitriangular=True)
    return Chunks(
        Y=Y,
        U=U,
        P=P + torch.diag_embed((q * k).sum(-1)),
        Qg=q if decay is None else decay * q,
        Ktail=k if suffix is None else suffix.exp() * k,
        gamma_C=None if decay is None else decay[..., -1, :].unsqueeze(-1),
    )


def decay_scores(left: Tensor, k: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """sum_c left_rc k_sc exp(g_{s+1,c} + ... + g_{r,c}) for s < r, zero elsewhere.

    left [.., C, L, K] (L row sets that share k and g), k [.., C, K], g [.., C, K], [.., C, 1] or None. Returns the scores [.., L, C, C] and the
    sums of g from the chunk's start up to and including each row, and from behind each row to the chunk's end (None without decay).
    """
    if g is None:
        return _plain_scores(left, k).tril(-1), None, None
    prefix, suffix = decay_sums(g)
    if g.shape[-1] > 1:
        return tree_scores(left, k, g).transpose(-3, -2), prefix, suffix
    below = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).tril(-1)
    # between[r, s] = g_{s+1} + ... + g_r: a running sum down the rows of a matrix that holds g_r below the diagonal
    between = (g * below).cumsum(-2)
    return _plain_scores(left, k) * torch.where(below, between.exp(), 0.0).unsqueeze(-3), prefix, suffix


def decay_sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of g [.., C, X] up to and including each row, and behind it. Each runs over entries of one sign; a difference of longer sums would lose a
    small decay beside a large one."""
    return g.cumsum(-2), F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _plain_scores(left: Tensor, k: Tensor) -> Tensor:
    """left k^T [.., L, C, C], all row sets in one product."""
    scores: Tensor = (left.flatten(-3, -2) @ k.transpose(-1, -2)).unflatten(-2, left.shape[-3:-1])
    return scores.transpose(-3, -2)


def ranked_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, w: Tensor | None, own: Tensor | None) -> tuple[Chunks, Tensor]:
    """What `intra_chunk` makes, for tokens of R rows without erase, and what the rows of a chunk read of each other (README.md, 7.8).

    q, k [n, H, G or 1, C, R, K], v [.., C, R, V], gates [.., C, 1]. Rows of the results: [.., C * R, X].
    """
    lead = torch.ones_like(v[..., :1, 0])  # [n, H, G, C, 1]
    write = lead if w is None else w * lead
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril(-1)
    # row i, column j: the decay between, a sum down the rows of what lies behind j
    between = torch.zeros_like(earlier, dtype=q.dtype) if g is None else torch.where(earlier, g, 0.0).cumsum(-2)
    weight = torch.where(earlier, write.transpose(-2, -1), 0.0) + torch.diag_embed((write if own is None else own * lead).squeeze(-1))
    P = torch.einsum("...irk,...jsk->...irjs", q, k) * (between.exp() * weight)[..., :, None, :, None]
    inside = torch.einsum("...irjs,...jsv->...irv", P, v)
    U, gamma = write.unsqueeze(-1) * v, None
    if g is not None:
        prefix, suffix = decay_sums(g)
        q, k, gamma = prefix.exp().unsqueeze(-1) * q, suffix.exp().unsqueeze(-1) * k, prefix[..., -1, :].exp().unsqueeze(-1)
    U, q, k, inside = (x.flatten(-3, -2) for x in (U, q, k, inside))
    return Chunks(Y=None, U=U, P=None, Qg=q, Ktail=k, gamma_C=gamma), inside


def inter_chunk(chunks: Chunks, state: Tensor, active: list[int]) -> tuple[Tensor, Tensor]:
    """The serial pass: R = U - Y S, O = Qg S + P R, S <- gamma_C S + Ktail^T R.

    `state` [N, H, G, K, V] in the chunk table's order of sequences, `active` its counts. Returns O [n, H, G, C, V] and the final states.
    """
    # split, not slices: the backward pass of a slice writes a whole zero tensor each time
    Us, Ktails = chunks.U.split(active), chunks.Ktail.split(active)
    Ys = None if chunks.Y is None else chunks.Y.split(active)
    gammas = None if chunks.gamma_C is None else chunks.gamma_C.split(active)
    S = state
    carried, residuals, finished = [], [], []
    for c, count in enumerate(active):
        if count < S.shape[0]:  # the shortest of the remaining sequences have ended
            S, ended = S.split([count, S.shape[0] - count])
            finished.append(ended)
        carried.append(S)
        R = Us[c] if Ys is None else Us[c] - Ys[c] @ S
        residuals.append(R)
        S = (S if gammas is None else gammas[c] * S) + Ktails[c].transpose(-1, -2) @ R
    finished.append(S)
    o = chunks.Qg @ torch.cat(carried)
    return o if chunks.P is None else o + chunks.P @ torch.cat(residuals), torch.cat(finished[::-1])
