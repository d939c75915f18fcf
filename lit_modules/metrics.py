"""Negative log likelihood and what follows from it: loss, perplexity, bits per byte.

Shapes: B batch rows, T tokens, V vocabulary, N documents packed in one row (B = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lit_modules.data.windows import IGNORED


def token_nll(logits_BTV: Tensor, targets_BT: Tensor, *, reduction: str = "none") -> Tensor:
    """Nats of every target, 0 where it is -100: [B, T], or a scalar for reduction "sum". Computed in at least float32."""
    logits = logits_BTV.flatten(0, 1).to(torch.promote_types(logits_BTV.dtype, torch.float32))
    nll = F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORED, reduction=reduction)
    return nll if reduction == "sum" else nll.view_as(targets_BT)


class StepTotals(NamedTuple):
    """Sums over all micro-batches and data-parallel ranks of an optimizer step."""

    nll: float  # nats
    targets: float  # valid ones
    n_bytes: float
    positions: float  # valid or not: what `max_tokens` counts


class SequenceNLL(NamedTuple):
    """What a prediction says of each sequence: packed documents (pieces of one, where a window cut it), or rows without boundaries."""

    nll: Tensor  # [N] float64, summed nats of the valid targets
    tokens: Tensor  # [N] int64, their number


def sequence_nll(logits_BTV: Tensor, targets_BT: Tensor, cu_seqlens: Tensor | None) -> SequenceNLL:
    """The sums of `token_nll` over each packed document, or over each row if `cu_seqlens` [N+1] is None."""
    nll_BT = token_nll(logits_BTV, targets_BT).double()
    valid_BT = targets_BT != IGNORED
    if cu_seqlens is None:
        return SequenceNLL(nll_BT.sum(1), valid_BT.sum(1))
    lengths = cu_seqlens.diff()
    document_T = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    nll = nll_BT.new_zeros(len(lengths)).index_add_(0, document_T, nll_BT[0])
    return SequenceNLL(nll, torch.zeros_like(lengths, dtype=torch.int64).index_add_(0, document_T, valid_BT[0].long()))


class Scores(NamedTuple):
    """Averages over all tokens that were seen."""

    loss: float  # nats per token
    perplexity: float
    bpb: float  # bits per UTF-8 byte


def scores(nll: float, tokens: float, n_bytes: float) -> Scores:
    """Averages from summed nats, their number of tokens and of UTF-8 bytes. NaN without tokens, infinite where exp overflows."""
    loss = nll / tokens if tokens else math.nan
    perplexity = math.exp(loss) if not loss > 709 else math.inf
    return Scores(loss, perplexity, nll / math.log(2) / n_bytes if n_bytes else math.nan)


@final
class TokenNLL(Metric):
    """Sums over batches and ranks, in float64 whatever the module's precision; `compute` gives `Scores`."""

    full_state_update = False
    nll: Tensor
    tokens: Tensor
    n_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "tokens", "n_bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor, n_bytes: Tensor) -> None:
        """Scalars of one batch: summed nats, valid targets, and their UTF-8 bytes."""
        self.nll = self.nll + nll.double()
        self.tokens = self.tokens + tokens.double()
        self.n_bytes = self.n_bytes + n_bytes.double()

    def compute(self) -> Scores:
        return scores(float(self.nll), float(self.tokens), float(self.n_bytes))

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> TokenNLL:
        # torchmetrics guards its states against .half(), .bfloat16() and .float(), but not against .to(dtype), which is
        # what Lightning's bf16-true calls.
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if t.dtype == torch.float64 else out

        super()._apply(keep, exclude_state)
        return self
