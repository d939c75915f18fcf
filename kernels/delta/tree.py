"""Scores under a channel-wise decay, by a binary tree over the rows of a chunk (README.md, section 3).

    M_rs = sum_c left_rc k_sc exp(g_{s+1,c} + ... + g_{r,c})   for s < r, zero elsewhere

Rows r and s are met at the level h = 1, 2, 4, ... where they lie in the two halves of one block of 2h rows. With a the last row of the lower half,
exp(G_r - G_s) = exp(G_r - G_a) exp(G_a - G_s): two factors, one for each row, whose exponents are sums of g and hence <= 0. A level is then a plain
product of matrices, and the factors of a level are products of those below: no difference of sums, which would lose a small decay beside a large
one, and one exp per entry of g.

Shapes: C rows (a power of two), K channels, L row sets on the left that share k and g.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.autograd import first_order


def _levels(g: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each h: the factors exp(G_r - G_a) of the upper rows and exp(G_a - G_s) of the lower rows, both [.., C/2h, h, K]."""
    prefix, suffix = g.exp(), torch.ones_like(g)  # decay inside blocks of h rows: up to and including a row; behind a row
    h = 1
    while h < g.shape[-2]:
        lower_prefix, upper_prefix = prefix.unflatten(-2, (-1, 2, h)).unbind(-3)
        lower_suffix = suffix.unflatten(-2, (-1, 2, h)).select(-3, 0)
        yield h, upper_prefix, lower_suffix
        lower_suffix *= upper_prefix[..., -1:, :]
        upper_prefix *= lower_prefix[..., -1:, :]
        h *= 2


def _corners(scores: Tensor, h: int) -> Tensor:
    """The view [.., L, h, h, C/2h] of scores [.., C, L, C] where upper rows meet lower columns of the same block of 2h."""
    blocks = scores.unflatten(-1, (-1, 2, h)).unflatten(-5, (-1, 2, h))  # [.., R, 2, h, L, S, 2, h]
    corner = blocks.select(-6, 1).select(-2, 0)  # [.., R, h, L, S, h]
    view: Tensor = corner.diagonal(dim1=-5, dim2=-2).movedim(-1, -4)  # [.., R, h, L, h]
    return view


class _TreeScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left: Tensor, k: Tensor, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(left, k, g)
        scores = left.new_zeros(*left.shape[:-1], left.shape[-3])
        for h, upper, lower in _levels(g):
            rows = left.unflatten(-3, (-1, 2, h)).select(-4, 1) * upper.unsqueeze(-2)  # [.., C/2h, h, L, K]
            columns = k.unflatten(-2, (-1, 2, h)).select(-3, 0) * lower  # [.., C/2h, h, K]
            product = rows.flatten(-3, -2) @ columns.transpose(-1, -2)
            _corners(scores, h).copy_(product.unflatten(-2, (h, -1)))
        return scores

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        left, k, g = ctx.saved_tensors
        d_left, d_k = torch.zeros_like(left), torch.zeros_like(k)
        for h, upper, lower in _levels(g):
            pick_rows = left.unflatten(-3, (-1, 2, h)).select(-4, 1)
            pick_columns = k.unflatten(-2, (-1, 2, h)).select(-3, 0)
            d_product = _corners(grad, h).flatten(-3, -2)  # [.., C/2h, hL, h]
            d_rows = (d_product @ (pick_columns * lower)).unflatten(-2, (h, -1))
            d_columns = d_product.transpose(-1, -2) @ (pick_rows * upper.unsqueeze(-2)).flatten(-3, -2)
            d_left.unflatten(-3, (-1, 2, h)).select(-4, 1).add_(d_rows * upper.unsqueeze(-2))
            d_k.unflatten(-2, (-1, 2, h)).select(-3, 0).add_(d_columns * lower)
        # g_i lies between s and r for the pairs s < i <= r: the rows from i on, less the columns from i on
        d_sum = (left * d_left).sum(-2) - k * d_k
        return d_left, d_k, d_sum.flip(-2).cumsum(-2).flip(-2)


def tree_scores(left: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """M [.., C, L, C] for left [.., C, L, K], k [.., C, K], g [.., C, K]; leading axes broadcast."""
    lead = torch.broadcast_shapes(left.shape[:-3], k.shape[:-2], g.shape[:-2])
    inputs = (left.expand(*lead, *left.shape[-3:]), k.expand(*lead, *k.shape[-2:]), g.expand(*lead, *g.shape[-2:]))
    out: Tensor = _TreeScores.apply(*inputs)  # type: ignore[no-untyped-call]
    return out
