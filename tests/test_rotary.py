"""Keys and queries that turn, in plain torch, against their formula token by token; and what `rotary_keys` refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import rotary_keys
from kernels.rotary.reference import running_sum, wrapped

pytestmark = pytest.mark.usefixtures("poison")
F64 = torch.float64


def make(rank: int = 1, lengths: tuple[int, ...] = (), first: bool = False, angles: int = 2, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Two groups of two heads with 6 channels."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens, groups, heads, size = 1 if lengths else 2, sum(lengths) or 7, 2, 4, 6
    shapes = {
        "B": (batch, tokens, rank, groups, size),
        "C": (batch, tokens, rank, groups, size),
        "B_bias": (heads, rank, size),
        "C_bias": (heads, rank, size),
        "theta": (batch, tokens, angles),
        "delta": (batch, tokens, heads),
    }
    if first:
        shapes["first"] = (len(lengths) or batch, heads, angles)
    drawn = {name: 2 * torch.randn(*shape, generator=generator, dtype=F64) for name, shape in shapes.items()}
    drawn["delta"].abs_()
    narrow = ("B", "C", "theta")
    return {name: x.to(dtype if name in narrow else torch.promote_types(dtype, torch.float32)) for name, x in drawn.items()}


def packed(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    return {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)} if lengths else {}


def by_token(B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, theta: Tensor, delta: Tensor, first: Tensor, pairs: bool) -> list[Tensor]:
    """q, k [T, R, H, K] and the last angle [H, A] of one sequence."""
    (tokens, ranks, groups, size), (heads, angles) = B.shape, first.shape
    q, k, angle = torch.empty(tokens, ranks, heads, size, dtype=F64), torch.empty(tokens, ranks, heads, size, dtype=F64), first
    for t in range(tokens):
        angle = angle + math.pi * theta[t].tanh() * delta[t].unsqueeze(1)
        for r in range(ranks):
            for h in range(heads):
                for out, x, bias in ((q, C, C_bias), (k, B, B_bias)):
                    row = x[t, r, h // (heads // groups)] + bias[h, r]
                    out[t, r, h] = row
                    for a in range(angles):
                        i, j = (2 * a, 2 * a + 1) if pairs else (a, a + size // 2)
                        z = torch.complex(row[i], row[j]) * torch.polar(torch.ones((), dtype=F64), angle[h, a])
                        out[t, r, h, i], out[t, r, h, j] = z.real, z.imag
    return [q, k, wrapped(angle)]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("lengths", [(), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize("angles", [2, 3])
def test_values_are_those_of_the_formula(rank: int, lengths: tuple[int, ...], first: bool, neighbours: bool, angles: int) -> None:
    x = make(rank, lengths, first, angles)
    q, k, last = rotary_keys(**x, **packed(lengths), neighbours=neighbours)
    spans = [(0, slice(end - n, end)) for n, end in zip(lengths, torch.tensor(lengths).cumsum(0).tolist(), strict=True)] or [
        (0, slice(7)),
        (1, slice(7)),
    ]
    for n, (row, span) in enumerate(spans):
        start = x["first"][n] if first else torch.zeros(4, angles, dtype=F64)
        of_tokens = [x[name][row, span] for name in ("B", "C", "theta", "delta")]
        expected = by_token(*of_tokens[:2], x["B_bias"], x["C_bias"], *of_tokens[2:], start, neighbours)
        for found, value in zip((q[row, span], k[row, span], last[n]), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=1e-12)
    assert last.abs().max() <= math.pi + 1e-12


@pytest.mark.parametrize("lengths", [(), (1, 3)], ids=str)
def test_gradients(lengths: tuple[int, ...]) -> None:
    x = {name: t.requires_grad_() for name, t in make(2, lengths, first=True).items()}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return rotary_keys(**dict(zip(x, tensors, strict=True)), **packed(lengths), neighbours=False)

    torch.autograd.gradcheck(run, tuple(x.values()))


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("factor", [1e12, math.nan])
def test_documents_are_to_the_bit_what_they_are_alone(rank: int, dtype: torch.dtype, first: bool, factor: float) -> None:
    """Beside documents of huge numbers and of NaN, before and behind: values, and gradients of a loss of all three."""
    lengths, span = (70, 9, 5), slice(70, 79)
    x = make(rank, lengths, first, dtype=dtype)
    of_tokens = ("B", "C", "theta", "delta")
    for name in of_tokens:
        x[name][:, : span.start] *= factor
        x[name][:, span.stop :] *= factor
    alone = {name: t[:, span] if name in of_tokens else t[1:2] if name == "first" else t for name, t in x.items()}

    def results(x: dict[str, Tensor], lengths: tuple[int, ...], wanted: slice, document: int) -> list[Tensor]:
        x = {name: t.clone().requires_grad_() for name, t in x.items()}
        q, k, last = rotary_keys(**x, **packed(lengths))
        (q.square().sum() + (q * k.flip(-1)).sum() + last.sin().sum()).backward()
        mine = [x["first"].grad[document]] if first else []
        return [q[:, wanted], k[:, wanted], last[document], *(x[name].grad[:, wanted] for name in of_tokens), *mine]

    for found, expected in zip(results(x, lengths, span, 1), results(alone, (9,), slice(None), 0), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(found, expected)


def test_sums_of_many_short_documents() -> None:
    """1,000 documents of 1 to 3 tokens: values, gradients and second derivatives."""
    lengths = torch.randint(1, 4, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    x, ends = torch.randn(1, sum(lengths), 2, generator=torch.Generator().manual_seed(1), dtype=F64), packed(tuple(lengths))["cu_seqlens"].int()
    x.requires_grad_()
    sums = torch.cat([part.cumsum(1) for part in x.split(lengths, 1)], 1)
    found, expected = running_sum(x, None, ends), wrapped(sums)
    for _ in range(2):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        found, expected = (torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0] for y in (found, expected))


@pytest.mark.parametrize("ends", [None, torch.tensor([0, 2, 7])], ids=["one", "packed"])
def test_a_turn_of_many_circles_takes_no_digits_of_later_ones(ends: Tensor | None) -> None:
    turn = torch.linspace(-3, 3, 14, dtype=F64).view(1, 7, 2)
    turn[:, 3] = 1e12
    angle = running_sum(turn, torch.full((1 if ends is None else 2, 2), 1e12, dtype=F64), ends)
    torch.testing.assert_close(wrapped(angle[:, 4:] - angle[:, 3:-1] - turn[:, 4:]), torch.zeros(1, 3, 2, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_of_the_results_and_one_rounding(dtype: torch.dtype, wanted: torch.dtype | None, autocast: bool) -> None:
    x = make(dtype=dtype, first=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        q, k, last = rotary_keys(**x, dtype=wanted)
    out = dtype if wanted is None else wanted
    assert (q.dtype, k.dtype, last.dtype) == (out, out, torch.float32)
    for found, exact in zip((q, k), rotary_keys(**{name: t.double() for name, t in x.items()}), strict=False):
        torch.testing.assert_close(
            found.double(), exact, rtol=0, atol=float(exact.abs().max()) * (3e-5 if out == torch.float32 else torch.finfo(out).eps)
        )


def test_tokens_of_a_rank_follow_each_other_as_rows() -> None:
    q, k, _ = rotary_keys(**make(3))
    assert q.is_contiguous()
    assert k.is_contiguous()


X = make(2, first=True)
META = {name: x.to("meta") for name, x in X.items()}
SINGLE = make(2, first=True, dtype=torch.float32)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "B without ranks": ({"B": X["B"][:, :, 0]}, ValueError, r"B must have axes \[batch, T, R, G, K\]"),
    "odd K": ({"B": X["B"][..., :5]}, ValueError, "with an even K"),
    "no tokens": ({"B": X["B"][:, :0]}, ValueError, "of at least 1 each"),
    "heads and groups": ({"B_bias": X["B_bias"][:3]}, ValueError, r"H a multiple of G = 2, got \[3, 2, 6\]"),
    "bias of another rank": ({"B_bias": X["B_bias"][:, :1]}, ValueError, r"B_bias must have shape \[H, 2, 6\]"),
    "too many angles": ({"theta": torch.zeros(2, 7, 4, dtype=F64)}, ValueError, r"theta must have 1 to K / 2 = 3 angles, got shape \[2, 7, 4\]"),
    "theta without axes": ({"theta": torch.zeros((), dtype=F64)}, ValueError, "theta must have 1 to"),
    "C of another shape": ({"C": X["C"][:1]}, ValueError, r"C must have shape \[2, 7, 2, 2, 6\], got \[1, 7, 2, 2, 6\]"),
    "delta by group": ({"delta": X["delta"][..., :2]}, ValueError, r"delta must have shape \[2, 7, 4\], got \[2, 7, 2\]"),
    "first of one sequence": ({"first": X["first"][:1]}, ValueError, r"first must have shape \[2, 4, 2\], got \[1, 4, 2\]"),
    "packed rows": ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, "need a batch of 1, got 2"),
    "empty document": ({**make(2, (7,)), "first": None, "cu_seqlens": torch.tensor([0, 3, 3, 7])}, ValueError, "strictly increasing"),
    "integer B": ({"B": X["B"].long()}, TypeError, "B must be one of"),
    "integers wanted": ({"dtype": torch.int64}, TypeError, "dtype must be one of"),
    "narrow bias": ({"C_bias": X["C_bias"].float()}, TypeError, "C_bias must be torch.float64"),
    "wide step": ({**SINGLE, "delta": X["delta"]}, TypeError, "delta must be torch.float32"),
    "theta elsewhere": ({"theta": META["theta"]}, ValueError, "theta is on meta, B on cpu"),
    "no such backend": ({"backend": "cuda"}, ValueError, "backend must be one of"),
    "no kernel here": ({**META, "backend": "triton"}, NotImplementedError, "tensors are on meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^rotary_keys: .*{message}"):
        rotary_keys(**{**X, **change})
