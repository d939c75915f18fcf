"""Tables for packed sequences: documents laid end to end on one token axis, their ends given by `cu_seqlens` [N+1]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def is_readable(x: Tensor) -> bool:
    """Whether values of `x` can be looked at without waiting for a device or breaking a trace."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, *, op: str) -> None:
    """Raises ValueError or TypeError unless `cu_seqlens` is an integer vector 0 = c_0 < c_1 < ... < c_N = tokens.

    Values are read only where that costs no wait (tensors on the CPU).
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{op}: cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{op}: cu_seqlens must have shape [N+1] with N >= 1, got {list(cu_seqlens.shape)}")
    if not is_readable(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens:
        raise ValueError(f"{op}: cu_seqlens must start at 0 and end at T = {tokens}, got {int(cu_seqlens[0])} and {int(cu_seqlens[-1])}")
    if not bool((cu_seqlens.diff() > 0).all()):
        raise ValueError(f"{op}: cu_seqlens must be strictly increasing (no empty sequence)")


def sequence_lengths(batch: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Lengths [N] of the sequences in row-major token order: the B rows, or the packed documents."""
    if cu_seqlens is None:
        return torch.full((batch,), tokens, device=device)
    return cu_seqlens.to(device=device, dtype=torch.int64).diff()


def positions(tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Where each of T tokens stands in its document [T], counted from 0; nothing is read on the host."""
    index = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return index
    ends = cu_seqlens.to(device=device, dtype=torch.int64)
    return index - ends[torch.searchsorted(ends[1:], index, right=True)]


class TokenTable(NamedTuple):
    """Where each of the M tokens of a flattened [B*T] axis stands."""

    sequence: Tensor  # [M] index of its sequence
    position: Tensor  # [M] 0-based position inside it


def token_table(lengths: Tensor) -> TokenTable:
    """The table for sequences of `lengths` [N] laid end to end."""
    sequence = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
    starts = lengths.cumsum(0) - lengths
    return TokenTable(sequence, torch.arange(sequence.numel(), device=lengths.device) - starts[sequence])


class ChunkTable(NamedTuple):
    """Sequences cut into chunks of C rows, ordered by chunk index first.

    The chunks with index c of all sequences that are long enough lie side by side, the longest sequences first: a loop over c then works on
    leading slices that only shrink.
    """

    slot: Tensor  # [M] row of each token in the padded [n_chunks * C] layout
    order: Tensor  # [N] sequences by falling number of chunks
    active: list[int]  # for each c: how many sequences have a chunk c
    n_chunks: int


def chunk_table(lengths: Tensor, chunk: int) -> ChunkTable:
    """The table for sequences of `lengths` [N] laid end to end. Reads `lengths` on the host."""
    per_sequence = (lengths + chunk - 1) // chunk
    order = torch.argsort(per_sequence, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    # active[c] = number of sequences with more than c chunks
    active = torch.bincount(per_sequence - 1).flip(0).cumsum(0).flip(0)
    offset = active.cumsum(0) - active
    sequence, position = token_table(lengths)
    slot = (offset[position // chunk] + rank[sequence]) * chunk + position % chunk
    counts: list[int] = active.tolist()
    return ChunkTable(slot, order, counts, sum(counts))


class _Gather(torch.autograd.Function):
    """Rows of `x` at `index`, all different. The backward pass is then a copy; index_select's own would add row by row."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` along the first axis, for an `index` without repeats."""
    out: Tensor = _Gather.apply(x, index)  # type: ignore[no-untyped-call]
    return out


def scatter_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """A zero tensor of `rows` rows with row `index[i]` = `x[i]`, for an `index` without repeats."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy(0, index, x)


class DeviceChunks(NamedTuple):
    """Sequences cut into chunks of C rows, in their own order, for kernels: made without a word from the device to the host.

    The number of chunks is known on the device only (`first[-1]`); `start` and `rows` have room for the most there can be.
    """

    first: Tensor  # [N+1] int32, first chunk of each sequence
    start: Tensor  # [bound] int32, first token of each chunk
    rows: Tensor  # [bound] int32, its rows; 0 behind the last chunk


def most_chunks(tokens: int, sequences: int, chunk: int) -> int:
    """The most chunks that `sequences` sequences of `tokens` tokens in all can have."""
    return (tokens + sequences * (chunk - 1)) // chunk


def device_chunks(cu_seqlens: Tensor, tokens: int, chunk: int) -> DeviceChunks:
    """The table for packed sequences."""
    ends = cu_seqlens.to(torch.int32)
    last = ends.numel() - 2
    first = torch.nn.functional.pad(((ends.diff() + (chunk - 1)) // chunk).cumsum(0, dtype=torch.int32), (1, 0))
    index = torch.arange(most_chunks(tokens, last + 1, chunk), device=ends.device, dtype=torch.int32)
    sequence = torch.searchsorted(first[1:], index, right=True).clamp_(max=last)
    before = torch.sub(ends, first, alpha=chunk)  # tokens before a sequence that its chunks, counted from the first of all, leave out
    start = torch.add(before.index_select(0, sequence), index, alpha=chunk)
    rows = ends[1:].index_select(0, sequence).sub_(start).clamp_(0, chunk)  # spare chunks start at or behind the end of the last sequence
    return DeviceChunks(first, start, rows)
