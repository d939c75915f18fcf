"""The kernels that turn keys and queries against plain torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from delta_cases import assert_same, random_cotangent
from gpu_cases import DEVICE, DTYPES, ON_GPU
from torch import Tensor

from kernels import backend, rotary_keys
from kernels.rotary import backward, forward, op
from kernels.rotary.reference import wrapped

pytestmark = pytest.mark.usefixtures("poison")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest entry
NARROW = ("B", "C", "theta")


class Case(NamedTuple):
    lead: tuple[int, ...]  # batch, tokens; or the lengths of packed documents
    sizes: tuple[int, int, int, int, int]  # R, G, H, K, A
    neighbours: bool = True
    packed: bool = False
    first: bool = False

    @property
    def cu_seqlens(self) -> Tensor | None:
        return torch.tensor([0, *self.lead], device=DEVICE).cumsum(0) if self.packed else None


CASES = [
    Case((2, 1), (4, 2, 4, 8, 4), first=True),
    Case((1, 16), (1, 1, 3, 8, 2)),
    Case((1, 36), (1, 1, 3, 8, 2), first=True),
    Case((1, 18), (2, 2, 4, 12, 3), neighbours=False),
    Case((1, 3, 28, 16, 1, 4, 1), (1, 1, 3, 12, 3), packed=True),
    Case((1, 3, 28, 16, 1, 4, 1), (2, 1, 3, 8, 4), neighbours=False, packed=True, first=True),
    Case((53,), (1, 1, 2, 4, 1), packed=True, first=True),
]
if ON_GPU:
    CASES += [
        Case((2, 300), (r, 1, 20, size, angles), r == 1) for r in (1, 4) for size, angles in ((32, 8), (64, 16), (64, 32), (128, 32), (256, 64))
    ]
    CASES += [Case((1, 63, 64, 65, 200, 1), (r, 2, 20, 64, 16), r == 1, packed=True, first=True) for r in (1, 2, 4)]


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for every token."""
    if not ON_GPU:
        for module in (op, forward, backward):
            monkeypatch.setattr(module, "CHUNK", 16)


def make(case: Case, dtype: torch.dtype, step: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rank, groups, heads, size, angles = case.sizes
    lead = (1, sum(case.lead)) if case.packed else case.lead
    shapes = {
        "B": (*lead, rank, groups, size),
        "C": (*lead, rank, groups, size),
        "B_bias": (heads, rank, size),
        "C_bias": (heads, rank, size),
        "theta": (*lead, angles),
        "delta": (*lead, heads),
    }
    if case.first:
        shapes["first"] = (len(case.lead) if case.packed else lead[0], heads, angles)
    drawn = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["delta"] = step * drawn["delta"].abs()
    return {name: x.to(DEVICE, dtype if name in NARROW else torch.float32) for name, x in drawn.items()}


def run(case: Case, tensors: dict[str, Tensor], backend: str, function: Callable[..., Any] = rotary_keys, **options: Any) -> dict[str, Tensor]:
    """The outputs and every gradient under a fixed random cotangent of each."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs = function(**leaves, cu_seqlens=case.cu_seqlens, neighbours=case.neighbours, backend=backend, **options)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [random_cotangent(x, i) for i, x in enumerate(outputs)])
    results = {name: x.detach() for name, x in zip(("q", "k", "last"), outputs, strict=True)}
    return results | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def check(case: Case, tensors: dict[str, Tensor], tolerance: float, **options: Any) -> None:
    got = run(case, tensors, "triton", **options)
    expected = run(case, {name: x.double() for name, x in tensors.items()}, "reference", **options and {"dtype": torch.float64})
    assert all(got[f"d{name}"].dtype == x.dtype for name, x in tensors.items())
    assert all(x.is_contiguous() for x in got.values())
    for name, exact in expected.items():
        difference = got[name].double() - exact
        difference = wrapped(difference) if name == "last" else difference
        assert difference.isfinite().all(), name
        assert float(difference.abs().max()) <= tolerance * float(exact.abs().max()), name
    assert got["last"].abs().max() <= math.pi + 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    check(case, make(case, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", CASES if ON_GPU else CASES[2:4], ids=str)
def test_16_bits(case: Case, dtype: torch.dtype) -> None:
    check(case, make(case, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_q_and_k_may_be_narrower_than_their_inputs(dtype: torch.dtype) -> None:
    case = CASES[2]
    tensors = make(case, torch.float32)
    check(case, tensors, TOLERANCE[dtype], dtype=dtype)
    assert run(case, tensors, "triton", dtype=dtype)["q"].dtype == dtype


def test_large_and_small_turns() -> None:
    """Of many whole turns they are right to float32 of the turn itself."""
    case = CASES[1]
    for step, tolerance in ((1e-3, 1e-5), (20.0, 2e-4)):  # a turn of 40 is off by 40 pi 2^-22
        check(case, make(case, torch.float32, step), tolerance)


def test_sums_are_exact() -> None:
    """In fixed point: cut anywhere and carried on, to the rounding of the angle carried."""
    case = Case((1, 50), (1, 1, 2, 4, 2))
    x = make(case, torch.float32)
    fixed = torch.ops.lightning_mixers.rotary_keys

    def angles(**changed: Tensor) -> list[Tensor]:
        t = x | changed
        return fixed(t["B"], t["C"], t["B_bias"], t["C_bias"], t["theta"], t["delta"], None, None, True, torch.float32)[4:]  # type: ignore[no-any-return]

    starts, last = angles()
    assert torch.equal(starts[:, -1], last)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(angles(theta=x["theta"][:, order], delta=x["delta"][:, order])[1], last)
    turns = (x["theta"].float().tanh().double().unsqueeze(2) * x["delta"].double().unsqueeze(3) / 2 * 2**32).sum(1)
    off = torch.remainder(last.double() - turns + 2**31, 2**32) - 2**31
    assert off.abs().max() <= 50 * (2**32 * 2**-24)


def test_layouts_that_need_a_copy_and_outputs_without_a_gradient() -> None:
    case = CASES[3]
    x = make(case, torch.float32)
    x["B"] = torch.stack([x["B"], x["C"]], -1)[..., 0]  # every second entry
    x["theta"] = x["theta"].transpose(1, 2).contiguous().transpose(1, 2)
    x["delta"] = x["delta"][..., :1].expand(x["delta"].shape)
    check(case, x, TOLERANCE[torch.float32])
    case = CASES[0]
    leaves = {name: t.detach().requires_grad_() for name, t in make(case, torch.float32).items()}
    for i in range(3):
        got, expected = (
            torch.autograd.grad(rotary_keys(**leaves, neighbours=False, backend=name)[i].sum(), list(leaves.values()), allow_unused=True)
            for name in ("triton", "reference")
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.zeros_like(a) if b is None else b, a, rtol=1e-4, atol=1e-4)


def test_runs_repeat_to_the_bit_and_later_tokens_do_not_matter() -> None:
    case = Case((1, 20), (1, 1, 2, 8, 2), first=True)
    x = make(case, torch.float32)
    first = run(case, x, "triton")
    assert_same(run(case, x, "triton"), first)
    changed = {name: torch.cat([t[:, :9], 3 * t[:, 9:]], 1) if name in ("B", "C", "theta", "delta") else t for name, t in x.items()}
    other = run(case, changed, "triton")
    assert_same({name: other[name][:, :9] for name in "qk"}, {name: first[name][:, :9] for name in "qk"})


def test_documents_do_not_meet() -> None:
    """Each is to the bit what it is alone."""
    case = Case((1, 3, 18, 4), (2, 1, 2, 8, 4), packed=True, first=True, neighbours=False)
    x = make(case, torch.float32)
    whole = run(case, x, "triton")
    end = 0
    for n, length in enumerate(case.lead):
        span = slice(end, end := end + length)
        alone = {name: t[:, span] if name in (*NARROW, "delta") else t[n : n + 1] if name == "first" else t for name, t in x.items()}
        q, k, last = rotary_keys(**alone, neighbours=False, backend="triton")
        assert torch.equal(q, whole["q"][:, span])
        assert torch.equal(k, whole["k"][:, span])
        assert torch.equal(last[0], whole["last"][n])


def test_operators_keep_torchs_rules() -> None:
    for case in (Case((1, 1), (1, 1, 1, 4, 2), first=True), Case((1, 1), (2, 1, 1, 4, 1), packed=True)):
        x = make(case, torch.float32)
        given = [*(t.requires_grad_() for t in x.values()), *([] if case.first else [None])]
        torch.library.opcheck(op.rotary_keys, (*given, case.cu_seqlens, True, torch.float32))
        q, k, last, *kept = op.rotary_keys(*(t if t is None else t.detach() for t in given), case.cu_seqlens, True, torch.float32)
        B, C, B_bias, C_bias, _, delta, *_ = (t if t is None else t.detach() for t in given)
        arguments = (q, k, last, B, C, B_bias, C_bias, delta, case.cu_seqlens, *kept, True, torch.float32)
        torch.library.opcheck(op.rotary_keys_backward, arguments)


def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(backend, "interpreted", lambda: True)  # the question reads an environment variable, which the compiler cannot trace
    case = CASES[0]
    x = make(case, torch.float32)

    def call(**arguments: Any) -> Any:
        return rotary_keys(**arguments)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(run(case, x, "triton", compiled), run(case, x, "triton"))


def test_nothing_is_kept_without_gradients() -> None:
    case = CASES[0]
    with torch.no_grad():
        outputs = rotary_keys(**make(case, torch.float32), backend="triton")
    assert all(t.grad_fn is None for t in outputs)


REFUSED = [
    (Case((1, 1), (1, 1, 1, 4, 1)), torch.float64, "its kernels take no float64"),
    (Case((1, 1), (1, 1, 1, 258, 1)), torch.float32, "K = 258 is above 256"),
    (Case((1, 1), (65_536, 1, 1, 2, 1)), torch.float32, "rank 65536 is above 65535"),
]


@pytest.mark.parametrize(("case", "dtype", "why"), REFUSED, ids=str)
def test_what_the_kernels_cannot_take_runs_on_the_reference(case: Case, dtype: torch.dtype, why: str) -> None:
    x = {name: t.to(dtype) for name, t in make(case, torch.float32).items()}
    assert rotary_keys(**x)[0].dtype == dtype
    with pytest.raises(NotImplementedError, match=f"rotary_keys: backend='triton' cannot run: {why}"):
        rotary_keys(**x, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4])
def test_a_layer(rank: int, dtype: torch.dtype) -> None:
    """As a layer runs it: float32 inputs, steps of an initialised model, 32,768 tokens. Fewer heads with ranks: the float64 reference shares the GPU
    with other processes."""
    case = Case((1, 32_768), (rank, 1, 24 // rank, 64, 16), rank == 1)
    check(case, make(case, torch.float32, 0.05), 10 * TOLERANCE[dtype], dtype=dtype)
