"""What a mixer carries from token to token: NamedTuples of tensors, N sequences on the first axis. A call never changes the state it is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def zero_state(like: Tensor, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """What a recurrence has before the first token: zeros in at least float32; device and dtype are `like`'s where they are None."""
    return torch.zeros(shape, device=device or like.device, dtype=torch.promote_types(dtype or like.dtype, torch.float32))


class DeltaState(NamedTuple):
    """State of the delta family with a short convolution."""

    S: Tensor  # [N, HV, K, V] at least float32
    conv: Tensor  # [N, W-1, D] the last inputs of the convolution, oldest first


class RecurrentState(NamedTuple):
    """State of a recurrence without a convolution."""

    S: Tensor  # [N, HV, K, V] at least float32


class AttentionState(NamedTuple):
    """Rotated keys and values of the tokens seen; with a window a ring, in which position p stands at p modulo the capacity."""

    k: Tensor  # [N, capacity, H_kv, D]
    v: Tensor  # [N, capacity, H_kv, D]
    length: Tensor  # [N] int64: tokens seen so far
