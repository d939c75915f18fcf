"""The package mamba-ssm in tests: where it is looked for, and its two functions that our adapter calls, written out in plain torch as their
documentation has them, for machines without a GPU."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mixers import mamba_ssm

# A folder that holds the packages mamba_ssm and einops, where they are not installed: an unpacked wheel is enough for the plain-torch references
FOLDER = os.environ.get("MAMBA_SSM_FOLDER")
if FOLDER:
    sys.path.append(os.path.abspath(FOLDER))  # tests change the current folder
WHY_NOT = mamba_ssm.missing()
needs_package = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}; or MAMBA_SSM_FOLDER=<a folder with both>")


def take_one_configuration() -> None:
    """Leaves one configuration to every autotuned kernel of the package: compiling all of them takes minutes, and what they compute is the same."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mamba_ssm.ops.triton"):
            for kernel in vars(module).values():
                if hasattr(kernel, "configs") and hasattr(kernel, "prune_configs"):
                    kernel.configs = [min(kernel.configs, key=_effort)]


def _effort(config: Any) -> tuple[bool, int, int, int]:
    """Small for a configuration that runs everywhere: no limit on registers, small blocks, four warps, few stages."""
    return config.maxnreg is not None, math.prod(config.kwargs.values()), abs(config.num_warps - 4), config.num_stages


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    return_final_states: bool,
) -> Any:
    """`mamba_chunk_scan_combined`: x [B, T, H, P], dt [B, T, H], A [H], B, C [B, T, G, N], states [B, H, P, N], seq_idx [B, T]."""
    assert chunk_size & (chunk_size - 1) == 0
    assert not torch.is_autocast_enabled(x.device.type)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.shape == x.shape[:2] and initial_states is None and not return_final_states)
    heads, dtype = x.shape[2], x.dtype
    x, B, C = (t.to(dt.dtype) for t in (x, B, C))
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    h = torch.zeros(*x[:, 0].shape, B.shape[-1], dtype=x.dtype) if initial_states is None else initial_states
    assert h.shape == (*x[:, 0].shape, B.shape[-1])
    rows = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t and seq_idx[0, t] != seq_idx[0, t - 1]:
            h = torch.zeros_like(h)
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        rows.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    out = torch.stack(rows, 1).to(dtype)
    return (out, h) if return_final_states else out


def siso_combined(
    *,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    ADT: Tensor,
    DT: Tensor,
    Trap: Tensor,
    Q_bias: Tensor,
    K_bias: Tensor,
    Angles: Tensor,
    Input_States: tuple[Tensor, ...] | None,
    chunk_size: int,
    return_final_states: bool,
    cu_seqlens: Tensor | None,
) -> Any:
    """`mamba3_siso_combined` without D and Z: Q, K [B, T, G, N], V [B, T, H, P], ADT, DT, Trap [B, H, T], Angles [B, T, H, A];
    states: angle [S, H, A], SSM [S, H, P, N], K [S, H, N], V [S, H, P]."""
    assert chunk_size == 64
    assert not torch.is_autocast_enabled(V.device.type)
    assert cu_seqlens is None or (cu_seqlens.dtype == torch.int32 and len(Q) == 1)
    heads = V.shape[2]
    spans = [(0, V.shape[1])] * len(V) if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    Q, K, V = (t.to(DT.dtype) for t in (Q, K, V))
    outputs, ends = [], []
    for n, (start, end) in enumerate(spans):
        b = n if cu_seqlens is None else 0
        q, k = (t[b].repeat_interleave(heads // t.shape[2], 1) + bias for t, bias in ((Q, Q_bias), (K, K_bias)))
        angle, h, k_before, v_before = _start(Q, V, Angles, heads) if Input_States is None else tuple(s[n] for s in Input_States)
        rows = []
        for t in range(start, end):
            dt, a, lam = DT[b, :, t], ADT[b, :, t].exp(), Trap[b, :, t].sigmoid()
            angle = angle + math.pi * Angles[b, t].tanh() * dt.unsqueeze(-1)
            key, query = _turned(k[t], angle), _turned(q[t], angle)
            before = ((1 - lam) * dt * a)[:, None, None] * v_before.unsqueeze(-1) * k_before.unsqueeze(-2)
            now = (lam * dt)[:, None, None] * V[b, t].unsqueeze(-1) * key.unsqueeze(-2)
            h, k_before, v_before = a[:, None, None] * h + before + now, key, V[b, t]
            rows.append((h * query.unsqueeze(-2)).sum(-1))
        outputs.append(torch.stack(rows))
        ends.append((angle, h, k_before, v_before))
    out = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs).unsqueeze(0)
    return (out, *(torch.stack(part) for part in zip(*ends, strict=True))) if return_final_states else out


def _start(Q: Tensor, V: Tensor, angles: Tensor, heads: int) -> tuple[Tensor, ...]:
    sizes = [(angles.shape[-1],), (V.shape[-1], Q.shape[-1]), (Q.shape[-1],), (V.shape[-1],)]
    return tuple(torch.zeros(heads, *size, dtype=V.dtype) for size in sizes)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """x [H, N], pairs (2i, 2i+1) turned by angle [H, A], the others as they are."""
    turned, rest = x[:, : 2 * angle.shape[-1]].unflatten(-1, (-1, 2)), x[:, 2 * angle.shape[-1] :]
    first, second = turned.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2), rest], -1)


FUNCTIONS: dict[str, Callable[..., Any]] = {"mamba_chunk_scan_combined": scan, "mamba3_siso_combined": siso_combined}


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The package seems installed, a GPU there, and every tensor fit for it. Returns the names of the functions that get called."""
    called: list[str] = []

    def kernel(module: str, name: str) -> Callable[..., Any]:
        called.append(f"{module}:{name}")
        return FUNCTIONS[name]

    monkeypatch.setattr(mamba_ssm, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_ssm, "kernel", kernel)
    monkeypatch.setattr(mamba_ssm.Choice, "resolve", lambda self, *_: "mamba_ssm" if self.requested == "mamba_ssm" else "delta")
    return called
