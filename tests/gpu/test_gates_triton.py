"""The gates' kernels against the plain-torch gates in float64.

Shapes: M tokens, H heads, C channels a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from delta_cases import TOLERANCE, assert_close, assert_same, random_cotangent
from gpu_cases import DEVICE, DTYPES, ON_GPU
from torch import Tensor

from kernels import backend, delta_gates
from kernels.gates import op, reference
from kernels.gates.forward import as_rows, launch

pytestmark = pytest.mark.usefixtures("poison")


class Case(NamedTuple):
    lead: tuple[int, ...]
    heads: int
    channels: int
    b: int  # widths; 0: absent
    w: int
    b_scale: float = 1.0


CASES = {
    "gdn2": Case((2, 35), 2, 24, 48, 40, 2.0),  # more rows than a program takes, fewer columns than it could
    "kda": Case((1, 9), 3, 12, 6, 0),
    "gdn": Case((70,), 4, 1, 4, 4),
    "one": Case((1,), 1, 1, 0, 1),
    "column blocks": Case((3,), 5, 210, 1030, 1024, 2.0),
    "no gate": Case((2, 3, 4), 1, 32, 0, 0),
}
LARGE = Case((2, 8192), 16, 128, 2048, 2048)


def make(case: Case, seed: int = 0, sliced: bool = False) -> dict[str, Tensor]:
    """Arguments in float64; `sliced`: f, b and w are column slices of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    width = case.heads * case.channels
    wide = torch.randn(*case.lead, width + case.b + case.w, generator=generator, dtype=torch.float64) * 3
    pieces = wide.split([width, case.b, case.w], -1)
    f, b, w = pieces if sliced else (x.contiguous() for x in pieces)
    a = torch.randn(case.heads, generator=generator, dtype=torch.float64)
    delta = torch.randn(width, generator=generator, dtype=torch.float64) - 3
    gates = {name: x for name, x in (("b", b), ("w", w)) if x.shape[-1]}
    return {"f": f, "a": a, "delta": delta, **gates}


def rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """On the device, in `dtype` (a and delta in float32); layouts stay."""
    return {name: x.to(DEVICE, torch.float32 if name in ("a", "delta") else dtype) for name, x in tensors.items()}


def run(function: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and every gradient under fixed random cotangents."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outs = {name: out for name, out in zip("gbw", function(**leaves, **options), strict=True) if out is not None}
    cotangents = [random_cotangent(out, seed) for seed, out in enumerate(outs.values())]
    gradients = torch.autograd.grad(list(outs.values()), list(leaves.values()), cotangents)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {**{name: out.detach() for name, out in outs.items()}, **named}


def check(case: Case, dtype: torch.dtype, sliced: bool) -> None:
    tensors = rounded(make(case, sliced=sliced), dtype)
    got = run(delta_gates, tensors, b_scale=case.b_scale, backend="triton")
    expected = run(delta_gates, {name: x.double() for name, x in tensors.items()}, b_scale=case.b_scale, backend="reference")
    wide = {"g", "da", "ddelta"}
    assert {name: x.dtype for name, x in got.items()} == {name: torch.float32 if name in wide else dtype for name in expected}
    assert_close({name: got[name] for name in wide}, {name: expected[name] for name in wide}, TOLERANCE[torch.float32])
    assert_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_float64(case: Case, sliced: bool, dtype: torch.dtype) -> None:
    check(case, dtype, sliced)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [LARGE, LARGE._replace(channels=1, b=16, w=0), LARGE._replace(b=16, w=0)], ids=["gdn2", "gdn", "kda"])
def test_large(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, sliced=True)


def test_small_decays_keep_their_digits() -> None:
    """softplus of very negative arguments, entry by entry: a logarithm of 1 + exp(x) would lose all digits below exp(-16)."""
    f = torch.linspace(-80, 30, 2048, device=DEVICE).view(8, 256)
    a, delta = torch.zeros(2, device=DEVICE), torch.zeros(256, device=DEVICE)
    g = delta_gates(f, a, delta, backend="triton")[0].flatten(1).double()
    exact = reference.gates(f.double(), a.double(), delta.double(), None, None, 1.0)[0].flatten(1)
    assert ((g - exact).abs() <= (f.abs() + 8) * 2**-23 * exact.abs()).all()


def test_small_gradients_keep_their_digits() -> None:
    """The derivative comes from g alone: no entry of df loses more digits than g has, from exp(-80) to 1."""
    f = torch.linspace(-80, 30, 2048, device=DEVICE).view(8, 256).requires_grad_()
    a, delta = torch.tensor([0.0, 2.7], device=DEVICE), torch.zeros(256, device=DEVICE)
    (df,) = torch.autograd.grad(delta_gates(f, a, delta, backend="triton")[0].sum(), f)
    exact = -f.detach().double().sigmoid() * a.double().exp().repeat_interleave(128)
    assert ((df.double() - exact).abs() <= (f.detach().abs() + 8) * 2**-22 * exact.abs()).all()


@pytest.mark.parametrize("rate", [-200.0, -100.0, -87.0, 60.0])
def test_any_rate_has_finite_gradients(rate: float) -> None:
    f = torch.tensor([[-100.0, -3.0, 0.0, 9.0]], device=DEVICE).requires_grad_()
    a, delta = torch.tensor([rate], device=DEVICE).requires_grad_(), torch.zeros(4, device=DEVICE)
    for name in ("triton", "reference"):
        df, da = torch.autograd.grad(delta_gates(f, a, delta, backend=name)[0].sum(), (f, a))
        scale = a.detach().double().exp()
        assert ((df.double() + f.detach().double().sigmoid() * scale).abs() <= 1e-5 * scale + 1e-37).all()
        assert da.isfinite().all()


def test_extremes_are_finite() -> None:
    x = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 20.0, 88.0, 100.0, 1e4]], device=DEVICE)
    got = run(delta_gates, {"f": x, "a": x.new_zeros(2), "delta": x.new_zeros(8), "b": x, "w": x}, backend="triton")
    assert all(t.isfinite().all() for t in got.values())


def test_runs_repeat_to_the_bit_and_tokens_do_not_meet() -> None:
    case = CASES["gdn2"]
    tensors = rounded(make(case), torch.float32)
    first = run(delta_gates, tensors, backend="triton")
    assert_same(run(delta_gates, tensors, backend="triton"), first)
    other = dict(tensors)
    for name in ("f", "b", "w"):
        other[name] = torch.cat([tensors[name][:, :20], 30 * tensors[name][:, 20:]], 1)
    changed = run(delta_gates, other, backend="triton")
    per_token = ("g", "b", "w", "df", "db", "dw")
    assert_same({name: changed[name][:, :20] for name in per_token}, {name: first[name][:, :20] for name in per_token})


def test_slices_are_read_in_place_and_gradients_of_any_layout_are_taken() -> None:
    tensors = rounded(make(CASES["gdn2"], sliced=True), torch.float32)
    for name in ("f", "b", "w"):
        assert as_rows(tensors[name], 70).data_ptr() == tensors[name].data_ptr()
    f, a, delta = (tensors[name].detach().requires_grad_() for name in ("f", "a", "delta"))
    expanded = [torch.autograd.grad(delta_gates(f, a, delta, backend=name)[0].sum(), (f, a, delta)) for name in ("triton", "reference")]
    assert_close(dict(zip("fad", expanded[0], strict=True)), dict(zip("fad", expanded[1], strict=True)), 1e-5)
    turned = f.detach().transpose(0, 1).transpose(1, 2)  # channels are not adjacent
    same = [delta_gates(turned.transpose(1, 2), a, delta, backend=name)[0] for name in ("triton", "reference")]
    assert_close({"g": same[0].detach()}, {"g": same[1].detach()}, 1e-5)


def test_operators_keep_torchs_rules() -> None:
    tensors = rounded(make(CASES["kda"]), torch.float32)
    f, a, delta, b = (tensors[name].requires_grad_() for name in ("f", "a", "delta", "b"))
    w = f.detach().new_empty(1, 9, 0)
    torch.library.opcheck(op.delta_gates, (f, a, delta, b, w, 2.0))
    outs = op.delta_gates(f, a, delta, b, w, 2.0)
    gradients = [random_cotangent(x, 0) for x in outs]
    torch.library.opcheck(op.delta_gates_backward, (*gradients, *(x.detach() for x in (outs[0], a, b, w)), 2.0, torch.float16))


def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(backend, "interpreted", lambda: True)  # the question reads an environment variable, which the compiler cannot trace
    tensors = rounded(make(CASES["gdn2"], sliced=True), torch.float32)
    compiled = torch.compile(lambda **x: delta_gates(**x, b_scale=2.0, backend="triton"), fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, tensors), run(delta_gates, tensors, b_scale=2.0, backend="triton"))


def test_float64_runs_on_the_reference() -> None:
    tensors = {name: x.to(DEVICE) for name, x in make(CASES["kda"]).items()}
    assert delta_gates(**tensors)[0].dtype == torch.float64
    with pytest.raises(NotImplementedError, match="delta_gates: backend='triton' cannot run: its kernels take no float64"):
        delta_gates(**tensors, backend="triton")


def test_every_program_finds_its_rows_and_columns() -> None:
    """One block of columns or several, narrow or wide."""
    wide = launch("backward", torch.empty(70, 2048), torch.empty(70, 16), torch.empty(70, 0), 4)
    assert (wide.row_blocks, wide.grid, wide.options["BC"]) == (2, (6,), 1024)
    narrow = launch("backward", torch.empty(600, 16), torch.empty(600, 16), torch.empty(600, 16), 4)
    assert (narrow.row_blocks, narrow.grid, narrow.options["BC"]) == (5, (15,), 16)
