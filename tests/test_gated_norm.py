"""The gated RMSNorm in plain torch against its formula, and what `gated_rms_norm` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import gated_rms_norm

pytestmark = pytest.mark.usefixtures("poison")

EPS = 1e-2  # large enough to show


def make(dtype: torch.dtype = torch.float64, size: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 2, size), "gate": (2, 3, 2, size), "weight": (size,)}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def test_values_are_those_of_the_formula() -> None:
    x, gate, weight = make().values()
    expected = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight * gate / (1 + (-gate).exp())
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, EPS), expected, rtol=1e-12, atol=0)


def test_gradients() -> None:
    leaves = tuple(x.requires_grad_() for x in make().values())
    torch.autograd.gradcheck(lambda *leaves: gated_rms_norm(*leaves, EPS), leaves)
    x, _, weight = leaves
    for scale in (1.0, 1e3):  # entries below and above 1
        torch.autograd.gradcheck(lambda x, weight: gated_rms_norm(x, None, weight, EPS), ((scale * x).detach().requires_grad_(), weight))


def test_without_a_gate() -> None:
    x, _, weight = make().values()
    for scale in (1e-3, 1.0, 1e3):
        expected = scale * x / ((scale * x).square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        torch.testing.assert_close(gated_rms_norm(scale * x, None, weight, EPS), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_result_has_the_dtype_of_x_and_one_rounding(
    dtype: torch.dtype, gate_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> None:
    x, gate, weight = make().values()
    x, gate, weight = x.to(dtype), gate.to(gate_dtype), weight.to(weight_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = gated_rms_norm(x, gate, weight, EPS)
    exact = gated_rms_norm(x.double(), gate.double(), weight.double(), EPS)
    assert y.dtype == dtype
    torch.testing.assert_close(y, exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps, atol=0)


def test_extremes_are_finite() -> None:
    x, gate, weight = make(torch.float32).values()
    for x_size, gate_size in ((0.0, 1.0), (1e-30, -1e4), (1e15, 1e4)):
        leaves = [(x * x_size).requires_grad_(), (gate * gate_size).requires_grad_(), weight.requires_grad_()]
        y = gated_rms_norm(*leaves, EPS)
        assert all(t.isfinite().all() for t in (y, *torch.autograd.grad(y.sum(), leaves)))
    leaves = [(x * 1e30).requires_grad_(), weight]  # whose squares float32 does not hold
    y = gated_rms_norm(leaves[0], None, weight, EPS)
    torch.testing.assert_close(y, (x / x.square().mean(-1, keepdim=True).sqrt() * weight))
    assert all(t.isfinite().all() for t in torch.autograd.grad(y.sum(), leaves))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x without channels": ({"x": torch.zeros(2, 0)}, ValueError, "x must have axes"),
    "x without axes": ({"x": torch.zeros(())}, ValueError, "x must have axes"),
    "gate of another shape": ({"gate": torch.zeros(2, 3, 1, 5)}, ValueError, r"gate must have x's shape \[2, 3, 2, 5\], got \[2, 3, 1, 5\]"),
    "weight of another size": ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \[size = 5\], got \[4\]"),
    "integer gate": ({"gate": torch.zeros(2, 3, 2, 5, dtype=torch.int64)}, TypeError, "gate must be one of"),
    "weight elsewhere": ({"weight": torch.zeros(5, device="meta")}, ValueError, "weight is on meta, x on cpu"),
    "no such backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "no kernel here": ({**{name: x.to("meta") for name, x in make().items()}, "backend": "triton"}, NotImplementedError, "tensors are on meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^gated_rms_norm: .*{message}"):
        gated_rms_norm(**{**make(torch.float32), "eps": EPS, **change})
