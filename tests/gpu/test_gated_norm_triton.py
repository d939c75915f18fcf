"""The gated RMSNorm's kernels against the plain-torch norm in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from delta_cases import TOLERANCE, assert_close, assert_same, random_cotangent
from gpu_cases import DEVICE, DTYPES, ON_GPU
from torch import Tensor

from kernels import backend, gated_rms_norm
from kernels.gated_norm import op
from kernels.gated_norm.forward import as_heads

pytestmark = pytest.mark.usefixtures("poison")

EPS = 0.1  # a row of one channel then has a gradient that does not vanish
SHAPES = [(9, 1), (7,), (300, 3), (2, 5, 3, 20), (2, 70, 2, 64), (5, 96), (3, 2, 1000), (2, 1024), (3, 4608), (2, 8192)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make(shape: tuple[int, ...], dtype: torch.dtype, sliced: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """x, gate [.., heads, size], weight [size]; `sliced`: x and gate are column slices of one projection of each token."""
    generator = torch.Generator().manual_seed(seed)
    lead, heads = shape[:-2], shape[-2:]
    wide = 2 * torch.randn(*lead, 2, *heads, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    x, gate = (t.squeeze(len(lead)) for t in wide.split(1, len(lead)))
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(DEVICE, torch.float32)
    return {"x": x if sliced else x.contiguous(), "gate": gate if sliced else gate.contiguous(), "weight": weight}


def run(function: Callable[..., Tensor], tensors: dict[str, Tensor | None], **options: str) -> dict[str, Tensor]:
    """The output and every gradient under a fixed random cotangent."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if x is not None}
    y = function(**{"gate": None, **leaves}, eps=EPS, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), random_cotangent(y, 0))
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def check(tensors: dict[str, Tensor | None]) -> None:
    dtype = tensors["x"].dtype
    tensors = {name: x for name, x in tensors.items() if x is not None}
    got = run(gated_rms_norm, tensors, backend="triton")
    expected = run(gated_rms_norm, {name: x.double() for name, x in tensors.items()}, backend="reference")
    assert {name: x.dtype for name, x in got.items()} == {"y": dtype, **{f"d{name}": x.dtype for name, x in tensors.items()}}
    assert_close(got, expected, TOLERANCE[dtype])
    if tensors["weight"].dtype == torch.float32:
        assert_close({"dweight": got["dweight"]}, {"dweight": expected["dweight"]}, TOLERANCE[torch.float32])


@by_dtype
@by_shape
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make(shape, dtype))


@by_dtype
@by_shape
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_without_a_gate(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    tensors = make(shape, dtype, sliced=True)
    check({"x": scale * tensors["x"], "gate": None, "weight": tensors["weight"]})


def test_squares_that_float32_does_not_hold() -> None:
    tensors = make((4, 4608), torch.float32)
    check({"x": 1e30 * tensors["x"], "gate": None, "weight": tensors["weight"]})


@by_dtype
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2], ids=str)
def test_slices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = make(shape, dtype, sliced=True)
    heads, rows = as_heads(tensors["x"], tensors["gate"])
    assert heads == shape[-2]
    assert [r.data_ptr() for r in rows] == [tensors["x"].data_ptr(), tensors["gate"].data_ptr()], "read in place"
    check(tensors)


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("shape", [(2, 8192, 16, 128), (16384, 2048 // 3), (1 << 22, 3)], ids=str)
def test_large(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make(shape, dtype))


def test_weight_and_gate_of_other_dtypes() -> None:
    tensors = make((2, 3, 20), torch.float32)
    check({**tensors, "gate": tensors["gate"].half()} | {"x": tensors["x"].half(), "weight": tensors["weight"].half()})
    check({**tensors, "x": tensors["x"].half()})


def test_layouts_that_need_a_copy() -> None:
    tensors = make((6, 4, 8), torch.float32)
    turned = {"x": tensors["x"].transpose(1, 2), "gate": tensors["gate"].transpose(1, 2).contiguous()}
    check({**turned, "weight": tensors["weight"][:4]})
    tensors["gate"] = tensors["gate"][:1].expand(6, 4, 8)
    check(tensors)
    x, gate, weight = tensors["x"].requires_grad_(), tensors["gate"], tensors["weight"]
    # the gradient of a sum is expanded from one number
    got, expected = (torch.autograd.grad(gated_rms_norm(x, gate, weight, EPS, backend=name).sum(), x)[0] for name in ("triton", "reference"))
    assert_close({"dx": got}, {"dx": expected}, 1e-5)


def test_extremes_are_finite() -> None:
    tensors = make((4, 16), torch.float32)
    for x_size, gate_size in ((0.0, 1.0), (1e-30, 1e4), (1e15, -1e4)):
        got = run(gated_rms_norm, {**tensors, "x": tensors["x"] * x_size, "gate": tensors["gate"] * gate_size}, backend="triton")
        assert all(x.isfinite().all() for x in got.values())


def test_runs_repeat_to_the_bit_and_tokens_do_not_meet() -> None:
    tensors = make((300, 3), torch.float32)
    first = run(gated_rms_norm, tensors, backend="triton")
    assert_same(run(gated_rms_norm, tensors, backend="triton"), first)
    other = {name: x if name == "weight" else torch.cat([x[:50], 30 * x[50:]]) for name, x in tensors.items()}
    changed = run(gated_rms_norm, other, backend="triton")
    assert_same({name: changed[name][:50] for name in ("y", "dx", "dgate")}, {name: first[name][:50] for name in ("y", "dx", "dgate")})


def test_operators_keep_torchs_rules() -> None:
    tensors = {name: x.requires_grad_() for name, x in make((2, 3, 5), torch.float32).items()}
    torch.library.opcheck(op.gated_rms_norm, (*tensors.values(), EPS))
    dy = random_cotangent(tensors["x"].detach(), 0)
    torch.library.opcheck(op.gated_rms_norm_backward, (dy, *(x.detach() for x in tensors.values()), EPS))
    torch.library.opcheck(op.gated_rms_norm, (tensors["x"], None, tensors["weight"], EPS))
    torch.library.opcheck(op.gated_rms_norm_backward, (dy, tensors["x"].detach(), None, tensors["weight"].detach(), EPS))


def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(backend, "interpreted", lambda: True)  # the question reads an environment variable, which the compiler cannot trace
    tensors = make((2, 3, 2, 16), torch.float32, sliced=True)
    compiled = torch.compile(lambda **x: gated_rms_norm(**x, backend="triton"), fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, tensors), run(gated_rms_norm, tensors, backend="triton"))


REFUSED = [(4, torch.float64, "its kernels take no float64"), (8193, torch.float32, "size 8193 is above 8192")]


@pytest.mark.parametrize(("size", "dtype", "why"), REFUSED)
def test_what_the_kernels_cannot_take_runs_on_the_reference(size: int, dtype: torch.dtype, why: str) -> None:
    x, weight = torch.ones(2, size, device=DEVICE, dtype=dtype), torch.ones(size, device=DEVICE)
    assert gated_rms_norm(x, x, weight, EPS).dtype == dtype
    with pytest.raises(NotImplementedError, match=f"gated_rms_norm: backend='triton' cannot run: {why}"):
        gated_rms_norm(x, x, weight, EPS, backend="triton")
