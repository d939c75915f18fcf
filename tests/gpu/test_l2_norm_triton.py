"""The kernels that divide queries and keys by their lengths against plain torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_cases import TOLERANCE, assert_close, assert_same, random_cotangent
from gpu_cases import DEVICE, DTYPES, ON_GPU
from torch import Tensor

from kernels import backend, l2_norm
from kernels.gated_norm.forward import as_heads
from kernels.qk_norm import op

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(7,), (300, 3), (2, 5, 3, 20), (5, 96), (3, 2, 1000), (2, 1024), *((2, 35, 3, size) for size in (16, 32, 64, 128, 256))]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make(shape: tuple[int, ...], dtype: torch.dtype, sliced: bool = False, scale: float = 2.0) -> dict[str, Tensor]:
    """q, k [.., heads, size]; `sliced`: column slices of one projection of each token."""
    generator = torch.Generator().manual_seed(0)
    lead, heads = shape[:-2], shape[-2:]
    wide = (scale * torch.randn(*lead, 3, *heads, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)
    q, k, _ = wide.unbind(len(lead))
    return {"q": q if sliced else q.contiguous(), "k": k if sliced else k.contiguous()}


def run(function: Callable[..., tuple[Tensor, Tensor]], tensors: dict[str, Tensor], **options: str) -> dict[str, Tensor]:
    """The outputs and every gradient under a fixed random cotangent of each."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs = function(**leaves, **options)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [random_cotangent(x, i) for i, x in enumerate(outputs)])
    return {**{f"{name}_unit": x.detach() for name, x in zip("qk", outputs, strict=True)}, "dq": gradients[0], "dk": gradients[1]}


def check(tensors: dict[str, Tensor]) -> None:
    got = run(l2_norm, tensors, backend="triton")
    assert all(x.is_contiguous() for x in got.values())
    expected = run(l2_norm, {name: x.double() for name, x in tensors.items()}, backend="reference")
    for name, x in tensors.items():
        found = {key: value for key, value in got.items() if name in key}
        assert {value.dtype for value in found.values()} == {x.dtype}
        assert_close(found, {key: expected[key] for key in found}, TOLERANCE[x.dtype])


@by_dtype
@by_shape
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make(shape, dtype))


@by_dtype
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2], ids=str)
def test_slices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = make(shape, dtype, sliced=True)
    heads, rows = as_heads(*tensors.values())
    assert heads == shape[-2]
    assert [x.data_ptr() for x in rows] == [x.data_ptr() for x in tensors.values()], "read in place"
    check(tensors)


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("shape", [(2, 8192, 16, 128), (16384, 2048 // 3), (1 << 22, 3)], ids=str)
def test_large(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make(shape, dtype))


def test_short_rows_and_two_dtypes() -> None:
    for shape in ((4, 3, 8), (9, 1)):
        check(make(shape, torch.float32, scale=1e-3))  # the epsilon counts
    tensors = make((2, 3, 20), torch.float32)
    check({**tensors, "k": tensors["k"].half()})


def test_layouts_that_need_a_copy() -> None:
    tensors = make((6, 4, 8), torch.float32)
    check({name: x.transpose(1, 2) for name, x in tensors.items()})
    check({"q": tensors["q"][:1].expand(6, 4, 8), "k": tensors["k"]})
    q, k = (x.requires_grad_() for x in tensors.values())
    # the gradient of a sum is expanded from one number; the other output has none
    got, expected = (torch.autograd.grad(l2_norm(q, k, backend=name)[0].sum(), (q, k), allow_unused=True) for name in ("triton", "reference"))
    assert_close({"dq": got[0]}, {"dq": expected[0]}, 1e-5)
    assert got[1] is None or not got[1].any()


def test_extremes_are_finite() -> None:
    for scale in (0.0, 1e-30, 1e15):
        assert all(x.isfinite().all() for x in run(l2_norm, make((4, 16), torch.float32, scale=scale), backend="triton").values())


def test_runs_repeat_to_the_bit_and_tokens_do_not_meet() -> None:
    tensors = make((300, 3), torch.float32)
    first = run(l2_norm, tensors, backend="triton")
    assert_same(run(l2_norm, tensors, backend="triton"), first)
    changed = run(l2_norm, {name: torch.cat([x[:50], 30 * x[50:]]) for name, x in tensors.items()}, backend="triton")
    assert_same({name: x[:50] for name, x in changed.items()}, {name: x[:50] for name, x in first.items()})


def test_operators_keep_torchs_rules() -> None:
    tensors = make((2, 3, 5), torch.float32)
    dy = [random_cotangent(x, i) for i, x in enumerate(tensors.values())]
    torch.library.opcheck(op.l2_norm_backward, (*dy, *tensors.values()))
    torch.library.opcheck(op.l2_norm, tuple(x.requires_grad_() for x in tensors.values()))


def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(backend, "interpreted", lambda: True)  # the question reads an environment variable, which the compiler cannot trace
    tensors = make((2, 3, 2, 16), torch.float32, sliced=True)

    def call(**x: Tensor) -> Any:
        return l2_norm(**x, backend="triton")

    assert_same(run(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors), run(call, tensors))


REFUSED = [(4, torch.float64, "its kernels take no float64"), (1025, torch.float32, "size 1025 is above 1024")]


@pytest.mark.parametrize(("size", "dtype", "why"), REFUSED)
def test_what_the_kernels_cannot_take_runs_on_the_reference(size: int, dtype: torch.dtype, why: str) -> None:
    x = torch.ones(2, size, device=DEVICE, dtype=dtype)
    assert l2_norm(x, x)[0].dtype == dtype
    with pytest.raises(NotImplementedError, match=f"l2_norm: backend='triton' cannot run: {why}"):
        l2_norm(x, x, backend="triton")
