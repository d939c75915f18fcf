"""What a mixer carries from token to token: NamedTuples of tensors, N sequences on the first axis. A call never changes the state it is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CACHES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what the ops compute with


def zero_state(like: Tensor, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """What a recurrence has before the first token: zeros in at least float32; device and dtype are `like`'s where they are None."""
    return zero_cache(like, shape, device, torch.promote_types(cache_dtype(like, dtype), torch.float32))


def zero_cache(like: Tensor, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """An empty cache of shape [N, ..]; device and dtype are `like`'s where they are None.

    Raises:
        ValueError: N is below 1.
        TypeError: as `cache_dtype`.
    """
    if not isinstance(shape[0], int) or shape[0] < 1:
        raise ValueError(f"init_state: batch_size must be an integer >= 1, got {shape[0]!r}")
    return torch.zeros(shape, device=device or like.device, dtype=cache_dtype(like, dtype))


def cache_dtype(like: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, or `like`'s; TypeError for one that holds no fractions, in which a cache would be wrong without a word."""
    if dtype is not None and dtype not in CACHES:
        raise TypeError(f"init_state: dtype must be one of {', '.join(map(str, CACHES))}, got {dtype!r}")
    return dtype or like.dtype


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
