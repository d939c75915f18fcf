"""The division by the length in plain torch against its formula, and what `l2_norm` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import causal_conv1d, l2_norm

pytestmark = pytest.mark.usefixtures("poison")


def make(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (scale * torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64) for _ in "qk")
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 the epsilon shows
def test_values_are_those_of_the_formula(scale: float) -> None:
    for x, y in zip(make(scale=scale), l2_norm(*make(scale=scale)), strict=True):
        torch.testing.assert_close(y, x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), rtol=1e-12, atol=0)


def test_the_convolution_divides_by_the_same_length() -> None:
    q = make(scale=1e-3)[0].flatten(2)
    weight = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(10, 2)  # of one token: the identity
    torch.testing.assert_close(l2_norm(q.unflatten(-1, (2, 5)), q.unflatten(-1, (2, 5)))[1].flatten(2), causal_conv1d(q, weight, norm_size=5)[0])


def test_gradients() -> None:
    torch.autograd.gradcheck(l2_norm, tuple(x.requires_grad_() for x in make()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_results_have_the_dtypes_of_the_inputs_and_one_rounding(dtype: torch.dtype, k_dtype: torch.dtype, autocast: bool) -> None:
    q, k = make()
    inputs = q.to(dtype), k.to(k_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = l2_norm(*inputs)
    for x, y, exact in zip(inputs, found, l2_norm(*(x.double() for x in inputs)), strict=True):
        assert y.dtype == x.dtype
        torch.testing.assert_close(y, exact.to(x.dtype), rtol=1e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_extremes_are_finite(scale: float) -> None:
    leaves = [x.requires_grad_() for x in make(torch.float32, scale)]
    q, k = l2_norm(*leaves)
    assert all(x.isfinite().all() for x in (q, k, *torch.autograd.grad((q + k).sum(), leaves)))


X = torch.zeros(2, 3)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q without channels": ({"q": torch.zeros(2, 0)}, ValueError, "q must have axes"),
    "q without axes": ({"q": torch.zeros(())}, ValueError, "q must have axes"),
    "k of another shape": ({"k": torch.zeros(2, 1)}, ValueError, r"k must have q's shape \[2, 3\], got \[2, 1\]"),
    "integer k": ({"k": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "k must be one of"),
    "k elsewhere": ({"k": X.to("meta")}, ValueError, "k is on meta, q on cpu"),
    "no such backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "no kernel here": ({"q": X.to("meta"), "k": X.to("meta"), "backend": "triton"}, NotImplementedError, "tensors are on meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^l2_norm: .*{message}"):
        l2_norm(**{"q": X, "k": X, **change})
