"""The gates in plain torch against their formulas, and what `delta_gates` refuses.

Shapes: H heads, C channels a head.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import delta_gates

pytestmark = pytest.mark.usefixtures("poison")

H, C = 2, 3


def make(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments of a call; a and delta in at least float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"f": (2, 4, H * C), "a": (H,), "delta": (H * C,), "b": (2, 4, 5), "w": (2, 4, 1)}
    drawn = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: x.to(torch.promote_types(dtype, torch.float32) if name in ("a", "delta") else dtype) for name, x in drawn.items()}


def test_values_are_those_of_the_formulas() -> None:
    x = make()
    g, b, w = delta_gates(**x, b_scale=2.0)
    assert b is not None
    assert w is not None
    assert (g.shape, b.shape, w.shape) == ((2, 4, H, C), x["b"].shape, x["w"].shape)
    for i in range(4):
        for j in range(H * C):
            step = math.log1p(math.exp(x["f"][1, i, j] + x["delta"][j]))
            assert g[1, i, j // C, j % C].item() == pytest.approx(-math.exp(x["a"][j // C]) * step, rel=1e-12)
        assert b[1, i].tolist() == pytest.approx([2 / (1 + math.exp(-logit)) for logit in x["b"][1, i]], rel=1e-12)
        assert w[1, i].item() == pytest.approx(1 / (1 + math.exp(-x["w"][1, i])), rel=1e-12)


def test_gradients() -> None:
    x = {name: leaf.requires_grad_() for name, leaf in make().items()}
    torch.autograd.gradcheck(lambda *leaves: delta_gates(*leaves, b_scale=2.0), tuple(x.values()))


def test_absent_gates_stay_absent() -> None:
    x = make()
    full = delta_gates(**x)
    assert full[1] is not None
    assert delta_gates(x["f"], x["a"], x["delta"])[1:] == (None, None)
    _, b, w = delta_gates(x["f"], x["a"], x["delta"], x["b"])
    assert w is None
    assert torch.equal(full[1], b)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_one_rounding(dtype: torch.dtype) -> None:
    x = make(dtype)
    outs = delta_gates(**x, b_scale=0.7)
    wide = delta_gates(**{name: t.double() for name, t in x.items()}, b_scale=0.7)
    assert [out.dtype for out in outs if out is not None] == [torch.float32, dtype, dtype]
    for out, exact in zip(outs, wide, strict=True):
        assert out is not None
        assert exact is not None
        torch.testing.assert_close(out, exact.to(out.dtype), rtol=1e-6 if out.dtype == torch.float32 else torch.finfo(dtype).eps / 2, atol=0)


def test_autocast_changes_nothing() -> None:
    x = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = delta_gates(**x)
    for got, expected in zip(inside, delta_gates(**x), strict=True):
        assert torch.equal(got, expected)  # type: ignore[arg-type]


def test_extremes_are_finite() -> None:
    x = torch.tensor([[-1e4, -100.0, 0.0, 20.0, 100.0, 1e4]], requires_grad=True)
    g, b, w = delta_gates(x, torch.zeros(H), torch.zeros(6), x, x)
    assert b is not None
    assert w is not None
    assert (g <= 0).all()
    (gradient,) = torch.autograd.grad(g.sum() + b.sum() + w.sum(), x)
    assert all(t.isfinite().all() for t in (g, b, w, gradient))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "f without channels": ({"f": torch.zeros(2, 0)}, ValueError, "f must have axes"),
    "f without axes": ({"f": torch.zeros(())}, ValueError, "f must have axes"),
    "heads do not divide": ({"a": torch.zeros(4)}, ValueError, r"a must have shape \[H\] with H a divisor of f's 6 channels, got \[4\]"),
    "a with two axes": ({"a": torch.zeros(1, 2)}, ValueError, "a must have shape"),
    "delta of another width": ({"delta": torch.zeros(5)}, ValueError, r"delta must have shape \[H \* C = 6\], got \[5\]"),
    "b of other tokens": ({"b": torch.zeros(2, 3, 5)}, ValueError, r"b must have f's leading axes \[2, 4\]"),
    "w without channels": ({"w": torch.zeros(2, 4, 0)}, ValueError, "w must have f's leading axes"),
    "w with an axis less": ({"w": torch.zeros(2, 4)}, ValueError, "w must have f's leading axes"),
    "integer f": ({"f": torch.zeros(2, 4, 6, dtype=torch.int64)}, TypeError, "f must be one of"),
    "integer b": ({"b": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, "b must be one of"),
    "a in half precision": ({"a": torch.zeros(2, dtype=torch.bfloat16)}, TypeError, "a must be torch.float32 for torch.float32 f"),
    "delta too wide": ({"delta": torch.zeros(6, dtype=torch.float64)}, TypeError, "delta must be torch.float32"),
    "b elsewhere": ({"b": torch.zeros(2, 4, 5, device="meta")}, ValueError, "b is on meta, f on cpu"),
    "no such backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "no kernel here": ({"f": torch.zeros(2, 4, 6, device="meta"), "a": torch.zeros(2, device="meta"), "delta": torch.zeros(6, device="meta"),
                        "b": None, "w": None, "backend": "triton"}, NotImplementedError, "tensors are on meta"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^delta_gates: .*{message}"):
        delta_gates(**{**make(torch.float32), **change})
