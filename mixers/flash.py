"""Softmax attention of sequences laid end to end, by torch's variable-length flash attention: one call, no mask, nothing read on the host.

Shapes: M tokens of all sequences, N sequences, H query heads, J key/value heads (a divisor of H), D head size.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAX_HEAD = 256


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch's kernel cannot take such queries; None if it can."""
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > MAX_HEAD:
        return f"head_dim {head_dim} is no multiple of 8 up to {MAX_HEAD}"
    if not _available(device.index):
        return "no flash attention for this GPU"
    return None


@cache
def _available(index: int | None) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(index) >= (8, 0)


@cache
def _grouped() -> Any:
    """How fewer key/value heads are asked for: torch 2.11 takes them as they come, later ones by a flag."""
    from torch.nn.attention import varlen  # which loads Triton

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}


def attend(q_MHD: Tensor, k_MJD: Tensor, v_MJD: Tensor, cu_seqlens: Tensor, window: int | None, longest: int) -> Tensor:
    """Causal attention within each sequence: token t reads the last `window` tokens, itself included (None: all of them).

    Args:
        q_MHD, k_MJD, v_MJD: what `refusal` does not refuse; the scale is D ** -0.5.
        cu_seqlens: [N+1], 0 to M.
        longest: no sequence has more tokens. A bound costs little: blocks of rows that a sequence does not have end at once.

    Returns:
        [M, H, D].
    """
    from torch.nn.attention import varlen

    ends = cu_seqlens.to(device=q_MHD.device, dtype=torch.int32)
    behind = -1 if window is None else min(window, longest) - 1
    out = varlen.varlen_attn(q_MHD, k_MJD, v_MJD, ends, ends, longest, longest, window_size=(behind, 0), **_grouped())
    assert isinstance(out, Tensor)  # alone, where nothing else is asked for
    return out
