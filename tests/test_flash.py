"""Attention's call of torch's variable-length kernel, which CPUs do not have: a stand-in of its signature and documented meaning is called."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.attention.varlen as varlen
from torch import Tensor

from mixers import flash
from mixers.attention import Attention

LENGTHS = {"documents of 1 to 3 tokens": [1, 3, 2, 1, 1, 2], "long and short": [11, 1, 20, 2], "one": [13]}
CALLS: list[tuple[int, tuple[int, int]]] = []


def stand_in(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What the documentation of `varlen_attn` says, one query at a time."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    CALLS.append((cu_seq_q.numel() - 1, window_size))
    left, right = window_size
    group = query.shape[1] // key.shape[1]
    rows = []
    for first, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        for t in range(first, end):
            low = first if left < 0 else max(first, t - left)
            high = end if right < 0 else min(end, t + right + 1)
            k, v = (x[low:high].repeat_interleave(group, 1) for x in (key, value))
            weights = (torch.einsum("hd,shd->hs", query[t], k) / math.sqrt(query.shape[-1])).softmax(-1)
            rows.append(torch.einsum("hs,shd->hd", weights, v))
    return torch.stack(rows)


@pytest.fixture
def on_flash(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Attention takes the kernel."""
    CALLS.clear()
    monkeypatch.setattr(flash, "refusal", lambda *_: None)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    return monkeypatch


def both(mixer: Attention, x: Tensor, cu_seqlens: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients, by the kernel and without it."""
    found = []
    for reason in (None, "no"):
        monkeypatch.setattr(flash, "refusal", lambda *_, reason=reason: reason)
        y, _ = mixer(x, cu_seqlens=cu_seqlens)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    return found[0], found[1]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to the rounding of the largest of all: with a window of 1 the gradients of queries and keys are 0."""
    largest = max(float(x.abs().max()) for x in expected)
    assert max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)) < 1e-13 * largest


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_documents(kv_heads: int, window: int | None, lengths: list[int], on_flash: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = Attention(16, num_heads=4, num_kv_heads=kv_heads, head_dim=8, window=window, init_std=0.5).double()
    x = torch.randn(1, sum(lengths), 16, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    by_kernel, without = both(mixer, x, cu_seqlens, on_flash)
    assert [documents for documents, _ in CALLS] == [len(lengths)]
    assert_same(by_kernel, without)


@pytest.mark.parametrize("window", [None, 1, 3, 9, 10])
def test_rows_of_a_batch(window: int | None, on_flash: pytest.MonkeyPatch) -> None:
    """The kernel where a window cuts something off; causal attention alone is scaled_dot_product_attention's."""
    torch.manual_seed(0)
    mixer = Attention(16, num_heads=2, head_dim=8, window=window, init_std=0.5).double()
    x = torch.randn(3, 10, 16, dtype=torch.float64, requires_grad=True)
    by_kernel, without = both(mixer, x, None, on_flash)
    assert [(rows, size) for rows, size in CALLS] == ([(3, (window - 1, 0))] if window is not None and window < 10 else [])
    assert_same(by_kernel, without)


def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(flash, "_available", lambda _: True)
    assert flash.refusal(gpu, half, 128) is None
    assert flash.refusal(torch.device("cpu"), half, 128) == "no kernel for cpu"
    assert flash.refusal(gpu, torch.float32, 128) == "no kernel for float32"
    assert flash.refusal(gpu, half, 20) == flash.refusal(gpu, half, 264).replace("264", "20")  # type: ignore[union-attr]
    monkeypatch.setattr(flash, "_available", lambda _: False)
    assert flash.refusal(gpu, half, 128) == "no flash attention for this GPU"
    assert Attention(256, num_heads=2).runs_on(gpu, half) == (
        "torch's scaled_dot_product_attention, one document at a time (no flash attention for this GPU)"
    )
