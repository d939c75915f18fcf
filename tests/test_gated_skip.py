"""Mamba-3's outputs and the values of every rank in plain torch against their formulas, and what `gated_skip` and `rank_values` refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import gated_skip, rank_values

pytestmark = pytest.mark.usefixtures("poison")

HEADS, SIZE = 2, 5
SCALES = ("v_scale", "z_scale", "out_scale")


def make(ranks: int, dtype: torch.dtype = torch.float64, **dtypes: torch.dtype) -> dict[str, Any]:
    """Arguments in `dtype`, parameters in at least float32; without scales for one rank."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"o": (2, 3, ranks, HEADS, SIZE), "v": (2, 3, HEADS, SIZE), "z": (2, 3, HEADS, SIZE), "D": (HEADS,)}
    shapes |= dict.fromkeys(SCALES, (HEADS, ranks, SIZE)) if ranks > 1 else {}
    wide = torch.promote_types(dtype, torch.float32)
    kinds = {name: dtypes.get(name, dtype if name in "ovz" else wide) for name in shapes}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(kinds[name]) for name, shape in shapes.items()}


by_rank = pytest.mark.parametrize("ranks", [1, 2, 3])


@by_rank
def test_values_are_those_of_the_formula(ranks: int) -> None:
    """Token by token, head by head, rank by rank."""
    x = make(ranks)
    one = torch.ones(HEADS, ranks, SIZE, dtype=torch.float64)
    up, gate, down = (x.get(name, one) for name in SCALES)
    y = gated_skip(**x)
    for b, t, h in ((b, t, h) for b in range(2) for t in range(3) for h in range(HEADS)):
        expected = torch.zeros(SIZE, dtype=torch.float64)
        for r in range(ranks):
            a = gate[h, r] * x["z"][b, t, h]
            expected += down[h, r] * (x["o"][b, t, r, h] + x["D"][h] * up[h, r] * x["v"][b, t, h]) * a / (1 + (-a).exp())
        torch.testing.assert_close(y[b, t, h], expected, rtol=1e-12, atol=1e-15)
    values = rank_values(x["v"], up)
    assert values.shape == x["o"].shape
    for h, r in ((h, r) for h in range(HEADS) for r in range(ranks)):
        torch.testing.assert_close(values[:, :, r, h], up[h, r] * x["v"][:, :, h], rtol=1e-12, atol=0)


@by_rank
def test_gradients(ranks: int) -> None:
    leaves = {name: x.requires_grad_() for name, x in make(ranks).items()}
    torch.autograd.gradcheck(lambda *x: gated_skip(**dict(zip(leaves, x, strict=True))), tuple(leaves.values()))
    torch.autograd.gradcheck(rank_values, (leaves["v"], torch.randn(HEADS, ranks, SIZE, dtype=torch.float64, requires_grad=True)))


@by_rank
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("o_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_result_has_the_dtype_of_v_and_one_rounding(ranks: int, dtype: torch.dtype, o_dtype: torch.dtype, autocast: bool) -> None:
    x = make(ranks, dtype, o=o_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, values = gated_skip(**x), rank_values(x["v"], x.get("v_scale", torch.full((HEADS, 1, SIZE), 0.3)))
    exact = gated_skip(**{name: t.double() for name, t in x.items()})
    assert y.dtype == values.dtype == dtype
    torch.testing.assert_close(y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
    expected = rank_values(x["v"].double(), x.get("v_scale", torch.full((HEADS, 1, SIZE), 0.3)).double())
    torch.testing.assert_close(values, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_extremes_are_finite() -> None:
    for size, gate_size in ((0.0, 1.0), (1e-30, -1e4), (1e15, 1e4)):
        x = make(2, torch.float32)
        leaves = {**x, "o": x["o"] * size, "v": x["v"] * size, "z": x["z"] * gate_size}
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        y = gated_skip(**leaves)
        assert all(t.isfinite().all() for t in (y, *torch.autograd.grad(y.sum(), list(leaves.values()))))


META = {name: x.to("meta") for name, x in make(2, torch.float32).items()}
Wrong = dict[str, tuple[dict[str, Any], type[Exception], str]]
WRONG: Wrong = {
    "v without channels": ({"v": torch.zeros(2, 3, 2, 0)}, ValueError, "v must have axes"),
    "v without heads": ({"v": torch.zeros(5)}, ValueError, "v must have axes"),
    "o without ranks": ({"o": torch.zeros(2, 3, 2, 5)}, ValueError, r"o must have v's axes \[2, 3, 2, 5\] with ranks before the last two, got"),
    "o of no rank": ({"o": torch.zeros(2, 3, 0, 2, 5)}, ValueError, "o must have v's axes"),
    "z of another shape": ({"z": torch.zeros(2, 3, 1, 5)}, ValueError, r"z must have v's shape \[2, 3, 2, 5\], got \[2, 3, 1, 5\]"),
    "two scales": ({"out_scale": None}, ValueError, "v_scale, z_scale, out_scale go together, and only one rank has none; got 2 for 2 ranks"),
    "no scales": (dict.fromkeys(SCALES), ValueError, "only one rank has none; got 0 for 2 ranks"),
    "integer v": ({"v": torch.zeros(2, 3, 2, 5, dtype=torch.int64)}, TypeError, "v must be one of"),
    "integer o": ({"o": torch.zeros(2, 3, 2, 2, 5, dtype=torch.int64)}, TypeError, "o must be one of"),
    "z elsewhere": ({"z": META["z"]}, ValueError, "z is on meta, v on cpu"),
    "D of another size": ({"D": torch.zeros(3)}, ValueError, r"D must have shape \[2\], got \[3\]"),
    "D of another dtype": ({"D": torch.zeros(2, dtype=torch.bfloat16)}, TypeError, "D must be torch.float32 for torch.float32 v, got torch.bfloat16"),
    "D elsewhere": ({"D": META["D"]}, ValueError, "D is on meta, v on cpu"),
    "scale of another shape": ({"z_scale": torch.zeros(2, 1, 5)}, ValueError, r"z_scale must have shape \[2, 2, 5\], got \[2, 1, 5\]"),
    "no such backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "no kernel here": ({**META, "backend": "triton"}, NotImplementedError, "tensors are on meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^gated_skip: .*{message}"):
        gated_skip(**{**make(2, torch.float32), **change})


V, SCALE = torch.zeros(3, 2, 5), torch.zeros(2, 4, 5)
WRONG_RANKS: Wrong = {
    "v without heads": ({"v": torch.zeros(5)}, ValueError, "v must have axes"),
    "integer v": ({"v": V.long()}, TypeError, "v must be one of"),
    "scale without ranks": ({"scale": torch.zeros(2, 5)}, ValueError, r"scale must have shape \[2, 1, 5\], got \[2, 5\]"),
    "scale of no rank": ({"scale": torch.zeros(2, 0, 5)}, ValueError, r"scale must have shape \[2, 1, 5\], got \[2, 0, 5\]"),
    "scale of another size": ({"scale": torch.zeros(2, 4, 1)}, ValueError, r"scale must have shape \[2, 4, 5\], got \[2, 4, 1\]"),
    "scale of another dtype": ({"scale": SCALE.double()}, TypeError, "scale must be torch.float32 for torch.float32 v, got torch.float64"),
    "scale elsewhere": ({"scale": SCALE.to("meta")}, ValueError, "scale is on meta, v on cpu"),
    "no such backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "no kernel here": ({"v": V.to("meta"), "scale": SCALE.to("meta"), "backend": "triton"}, NotImplementedError, "tensors are on meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG_RANKS.values(), ids=WRONG_RANKS.keys())
def test_wrong_arguments_of_rank_values(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^rank_values: .*{message}"):
        rank_values(**{"v": V, "scale": SCALE, **change})
