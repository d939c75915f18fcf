"""Attention on a GPU: torch's variable-length kernel against the same layer in float64, document by document."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_cases import DEVICE
from torch import Tensor

from mixers import flash
from mixers.attention import Attention

pytestmark = pytest.mark.gpu
LENGTHS = {"1 to 3 tokens": [1, 3, 2, 1, 1, 2], "long and short": [300, 1, 1000, 64, 2], "one": [777], "rows": None}
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of the largest entry: four products and a softmax of rounded numbers


def make(window: int | None, kv_heads: int, dtype: torch.dtype) -> Attention:
    torch.manual_seed(0)
    return Attention(256, num_heads=4, num_kv_heads=kv_heads, head_dim=64, window=window, init_std=256**-0.5).to(DEVICE, dtype)


def run(mixer: Attention, x: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y, _ = mixer(x, cu_seqlens=cu_seqlens)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    names = [name for name, _ in mixer.named_parameters()]
    gradients = torch.autograd.grad(y, [x, *mixer.parameters()], cotangent)
    return {"y": y.detach(), "dx": gradients[0], **dict(zip(names, gradients[1:], strict=True))}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("window", "kv_heads"), [(None, 4), (100, 2), (1, 1)])
def test_against_float64(window: int | None, kv_heads: int, lengths: list[int] | None, dtype: torch.dtype) -> None:
    mixer = make(window, kv_heads, dtype)
    assert flash.refusal(DEVICE, dtype, 64) is None
    batch, tokens = (3, 500) if lengths is None else (1, sum(lengths))
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    x = torch.randn(batch, tokens, 256, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(DEVICE, dtype)
    got, expected = run(mixer, x, cu_seqlens), run(copy.deepcopy(mixer).double(), x.double(), cu_seqlens)
    projections = max(float(value.abs().max()) for name, value in expected.items() if "proj" in name)
    for name, value in expected.items():
        # where tokens read themselves alone, gradients of queries and keys are 0, and rounding is all there is
        scale = max(float(value.abs().max()), 1e-2 * projections if name in ("q_proj.weight", "k_proj.weight") else 0.0)
        assert float((got[name] - value).abs().max()) <= TOLERANCE[dtype] * scale, name


def test_later_tokens_and_other_documents_change_nothing() -> None:
    mixer, lengths = make(100, 2, torch.bfloat16), [300, 500, 200]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    x = torch.randn(1, 1000, 256, device=DEVICE, dtype=torch.bfloat16)
    other = x.clone()
    other[:, 600:] = 3.0
    with torch.no_grad():
        before, after = mixer(x, cu_seqlens=cu_seqlens)[0], mixer(other, cu_seqlens=cu_seqlens)[0]
        alone = mixer(x[:, 300:800])[0]
    assert torch.equal(before[:, :600], after[:, :600])
    assert float((before[:, 300:800].float() - alone.float()).abs().max()) <= 4e-2 * float(alone.abs().max())


def test_the_host_is_not_asked() -> None:
    """No value of cu_seqlens is read on the host, forward or backward."""
    mixer = make(100, 4, torch.bfloat16)
    x = torch.randn(1, 1000, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    cu_seqlens = torch.tensor([0, 300, 301, 1000], device=DEVICE)
    mixer(x, cu_seqlens=cu_seqlens)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixer(x, cu_seqlens=cu_seqlens)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
