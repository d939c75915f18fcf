"""Windows of a token stream, their order, and how they are packed into a batch: pure functions and fixed values.

Legend: B sequences a micro-batch, T tokens a sequence (seq_len), N packed sequences in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kernels.varlen import check_cu_seqlens
from lit_modules.data.stream import Int64Array, Stream, TokenArray, Tokens, TokenStream, keyed_hash
from lit_modules.data.tokenizer import Tokenizer
from lit_modules.data.workers import SharedTokens

IGNORED = -100  # the target that no loss counts (torch's default ignore_index)


class Batch(NamedTuple):
    """A micro-batch. With document boundaries it is one packed row, [1, B*T]; without, [B, T].

    inputs and targets are int64; targets[..., t] is the token after inputs[..., t], or -100 where that token is the
    separator of the next document. cu_seqlens is int32 [N+1], or None without boundaries. n_bytes is an int64 scalar:
    the UTF-8 bytes that the targets stand for.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    n_bytes: Tensor


@lru_cache(maxsize=2)  # a micro-batch may span two epochs
def permutation(seed: int, epoch: int, n: int) -> Int64Array:
    """The order of n windows in one epoch: they are sorted by a hash, the same one in every version of numpy."""
    x = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64, wrapping modulo 2**64
    x += np.uint64(keyed_hash("epoch", seed, epoch.to_bytes(8, "little")))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
    order.setflags(write=False)  # the cache hands out the same array again
    return order


def look_up(seed: int, epoch: int, n: int, position: int) -> int:
    """What stands at `position` of a `permutation`."""
    return int(permutation(seed, epoch, n)[position])


@final
class Windows(Dataset[TokenArray]):
    """The windows of a stream: window k is tokens [k*T, k*T + T + 1), so that neighbours share one token.

    Item i is the window of sample i. With a seed, samples run through one permutation of the windows after another
    (epoch e = i // len); without, through the stream. The last tokens that fill no window are in none.

    Args:
        seq_len: Tokens a window.
        seed: Draws the permutations.
        limit: Use the first windows only.
        drawn: How a permutation is read: `look_up` holds it in memory, `place` computes every element of it.
    """

    def __init__(
        self,
        stream: Stream,
        seq_len: int,
        *,
        seed: int | None = None,
        limit: int | None = None,
        drawn: Callable[[int, int, int, int], int] = look_up,
    ) -> None:
        self.stream = stream
        self.tokens: Tokens = stream.tokens
        self.seq_len = seq_len
        self.seed = seed
        self.drawn = drawn
        count = (len(stream.tokens) - 1) // seq_len
        self.count = count if limit is None else min(count, limit)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, sample: int) -> TokenArray:
        start = self.window_of(sample) * self.seq_len
        return self.tokens[start : start + self.seq_len + 1]

    def window_of(self, sample: int) -> int:
        """The index of the window that sample i holds."""
        epoch, position = divmod(sample, self.count)
        return position if self.seed is None else self.drawn(self.seed, epoch, self.count, position)

    def to_send(self) -> Windows:
        """The same windows for worker processes, which map the tokens and are sent nothing else of the stream.

        Tokens in memory move to where that can be done, once.
        """
        if isinstance(self.stream, TokenStream) and not isinstance(self.tokens, SharedTokens):
            self.tokens = SharedTokens(self.stream.tokens)
            self.stream = self.stream._replace(tokens=self.tokens.array)
        sent = copy(self)
        del sent.stream
        return sent


@final
class Packer:
    """Makes a `Batch` from windows of T + 1 tokens (a DataLoader's `collate_fn`, which workers can be sent)."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, *, document_boundaries: bool) -> None:
        self.bos_id = tokenizer.bos_id
        self.token_bytes = tokenizer.token_bytes
        self.seq_len = seq_len
        self.document_boundaries = document_boundaries

    def __call__(self, windows: Sequence[TokenArray]) -> Batch:
        """Packs B windows. None at all become one sequence without a single target, see `EvaluationLoader`."""
        if windows:
            tokens_BT = np.stack(windows).astype(np.int64)
            inputs_BT, targets_BT = tokens_BT[:, :-1].copy(), tokens_BT[:, 1:].copy()
        else:
            inputs_BT = np.full((1, self.seq_len), int(self.bos_id == 0), dtype=np.int64)  # some token that is not bos
            inputs_BT[0, 0] = self.bos_id
            targets_BT = np.full((1, self.seq_len), IGNORED, dtype=np.int64)
        cu_seqlens = None
        if self.document_boundaries:
            targets_BT[targets_BT == self.bos_id] = IGNORED
            starts_BT = inputs_BT == self.bos_id
            starts_BT[:, 0] = True
            cu_seqlens = torch.from_numpy(np.append(np.flatnonzero(starts_BT), starts_BT.size).astype(np.int32))
            check_cu_seqlens(cu_seqlens, starts_BT.size, op="PackedText")  # here: kernels do not wait for a GPU to look at values
            inputs_BT, targets_BT = inputs_BT.reshape(1, -1), targets_BT.reshape(1, -1)
        n_bytes = self.token_bytes[targets_BT[targets_BT != IGNORED]].sum()
        return Batch(
            torch.from_numpy(inputs_BT),
            torch.from_numpy(targets_BT),
            cu_seqlens,
            torch.tensor(int(n_bytes), dtype=torch.int64),
        )
