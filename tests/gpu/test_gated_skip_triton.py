"""The kernels of Mamba-3's outputs and of the values of every rank against plain torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_cases import TOLERANCE, assert_close, assert_same, random_cotangent
from gpu_cases import DEVICE, DTYPES, ON_GPU
from torch import Tensor

from kernels import backend, gated_skip, rank_values
from kernels.ranks import op
from kernels.ranks.forward import by_rank, by_token
from mixers.contract import inputs
from mixers.init import initialize
from mixers.mamba3 import Mamba3

pytestmark = pytest.mark.usefixtures("poison")

SCALES = ("v_scale", "z_scale", "out_scale")
PARAMETERS = ("D", *SCALES)
# leading axes, ranks, heads, channels: fewer and more columns than a program takes, and than a power of two; more rows
SHAPES = [
    ((7,), 1, 1, 1),
    ((2, 5), 1, 3, 20),
    ((70,), 1, 2, 64),
    ((3,), 1, 9, 128),
    ((2, 5), 2, 3, 20),
    ((3,), 3, 5, 64),
    ((70,), 4, 2, 16),
    ((3,), 9, 2, 8),
]
by_shape = pytest.mark.parametrize(("lead", "ranks", "heads", "size"), SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_rank_number = pytest.mark.parametrize("ranks", [1, 4])


def make(
    lead: tuple[int, ...], ranks: int, heads: int, size: int, dtype: torch.dtype, *, wide: bool = False, sliced: bool = False
) -> dict[str, Tensor]:
    """Arguments of `gated_skip`, without scales for one rank. `wide`: o in float32; `sliced`: v and z are column slices of one projection."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, like)

    z, v = draw(*lead, 2 * heads * size + 3, like=dtype)[..., 3:].unflatten(-1, (2, heads, size)).unbind(-3)
    z, v = (z, v) if sliced else (z.contiguous(), v.contiguous())
    o = draw(*lead, ranks, heads, size, like=torch.float32 if wide else dtype)
    return {"o": o, "v": v, "z": z, "D": draw(heads)} | ({name: draw(heads, ranks, size) for name in SCALES} if ranks > 1 else {})


def run(function: Callable[..., Tensor], tensors: dict[str, Tensor], **options: str) -> dict[str, Tensor]:
    """The output and every gradient under a fixed random cotangent."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves, **options)
    gradients = torch.autograd.grad(y, list(leaves.values()), random_cotangent(y, 0))
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def check(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> None:
    """Parameters' gradients, sums over all tokens in float32, are float32's whatever the dtype."""
    got = run(function, tensors, backend="triton")
    expected = run(function, {name: x.double() for name, x in tensors.items()}, backend="reference")
    for name, value in got.items():
        like = tensors[name.removeprefix("d")] if name != "y" else tensors["v"]
        assert value.dtype == like.dtype, name
        assert value.is_contiguous(), name
        assert_close({name: value}, {name: expected[name]}, TOLERANCE[like.dtype])


def ranks_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of `rank_values`."""
    return {"v": tensors["v"], "scale": tensors["v_scale"]}


@by_dtype
@by_shape
def test_against_float64(lead: tuple[int, ...], ranks: int, heads: int, size: int, dtype: torch.dtype) -> None:
    tensors = make(lead, ranks, heads, size, dtype)
    check(gated_skip, tensors)
    if ranks > 1:
        check(rank_values, ranks_of(tensors))


@by_rank_number
def test_slices_and_an_o_in_float32(ranks: int) -> None:
    tensors = make((2, 5), ranks, 3, 16, torch.float16, wide=True, sliced=True)
    for name in "vz":
        assert by_token(tensors[name], 10).data_ptr() == tensors[name].data_ptr(), "read in place"
    check(gated_skip, tensors)
    if ranks > 1:
        check(rank_values, ranks_of(tensors))


@pytest.mark.gpu
@by_dtype
@by_rank_number
@pytest.mark.parametrize("wide", [False, True])
def test_large(ranks: int, dtype: torch.dtype, wide: bool) -> None:
    tensors = make((2, 1000), ranks, 36, 64, dtype, wide=wide, sliced=True)
    check(gated_skip, tensors)
    if ranks > 1:
        check(rank_values, ranks_of(tensors))


def test_one_rank_may_have_scales_and_many_ranks_have_kernels() -> None:
    for ranks in (1, 16):
        tensors = make((4,), ranks, 2, 8, torch.float32)
        tensors |= {name: make((1,), 2, 2, 8 * ranks, torch.float32)[name][:, :1].reshape(2, ranks, 8) for name in SCALES}
        check(gated_skip, tensors)
        check(rank_values, ranks_of(tensors))


def test_layouts() -> None:
    tensors = make((6,), 4, 3, 8, torch.float32)
    turned = tensors["o"].transpose(0, 1).contiguous().transpose(0, 1)  # ranks outside: strides of its own
    assert by_rank(turned, 6).data_ptr() == turned.data_ptr(), "read in place"
    check(gated_skip, {**tensors, "o": turned})
    check(gated_skip, {**tensors, "v": tensors["v"][:1].expand(6, 3, 8), "z": tensors["z"].transpose(1, 2).contiguous().transpose(1, 2)})
    check(
        gated_skip, {**tensors, "o": tensors["o"].mT.contiguous().mT, "out_scale": tensors["out_scale"].transpose(0, 1).contiguous().transpose(0, 1)}
    )
    leaves = [x.requires_grad_() for x in ranks_of(tensors).values()]
    # the gradient of a sum is expanded from one number
    for function in (lambda name: rank_values(*leaves, backend=name), lambda name: gated_skip(**tensors, backend=name)):
        got, expected = (torch.autograd.grad(function(name).sum(), leaves) for name in ("triton", "reference"))
        assert_close(dict(zip("vs", got, strict=True)), dict(zip("vs", expected, strict=True)), 1e-5)


def test_extremes_are_finite() -> None:
    tensors = make((4,), 2, 2, 8, torch.float32)
    for size, gate_size in ((0.0, 1.0), (1e-30, 1e4), (1e15, -1e4)):
        scaled = {name: x * {"o": size, "v": size, "z": gate_size}.get(name, 1.0) for name, x in tensors.items()}
        assert all(x.isfinite().all() for x in run(gated_skip, scaled, backend="triton").values())


@by_rank_number
def test_runs_repeat_to_the_bit_and_tokens_do_not_meet(ranks: int) -> None:
    tensors = make((140,), ranks, 2, 4, torch.float32)
    later = {name: x if name in PARAMETERS else torch.cat([x[:50], 30 * x[50:]]) for name, x in tensors.items()}
    for function, of in ((gated_skip, dict), (rank_values, ranks_of))[: 1 if ranks == 1 else 2]:
        first, changed = run(function, of(tensors), backend="triton"), run(function, of(later), backend="triton")
        assert_same(run(function, of(tensors), backend="triton"), first)
        names = [name for name in first if name in ("y", "do", "dv", "dz")]
        assert_same({name: changed[name][:50] for name in names}, {name: first[name][:50] for name in names})


@by_rank_number
def test_operators_keep_torchs_rules(ranks: int) -> None:
    tensors = make((2, 3), ranks, 2, 4, torch.float32)
    scales = [tensors.get(name, tensors["D"].new_empty(0)) for name in SCALES]
    inputs = tuple(tensors[name] for name in ("o", "v", "z", "D")) + tuple(scales)
    torch.library.opcheck(op.gated_skip_backward, (random_cotangent(tensors["v"], 0), *inputs))
    torch.library.opcheck(op.gated_skip, tuple(x.requires_grad_() for x in inputs))
    if ranks > 1:
        v, scale = (x.detach() for x in ranks_of(tensors).values())
        torch.library.opcheck(op.rank_values_backward, (random_cotangent(tensors["o"].detach(), 0), v, scale))
        torch.library.opcheck(op.rank_values, (v.requires_grad_(), scale.requires_grad_()))


@by_rank_number
def test_compiles_without_a_graph_break(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(backend, "interpreted", lambda: True)  # the question reads an environment variable, which the compiler cannot trace
    tensors = make((2, 3), ranks, 2, 8, torch.float32, sliced=True)

    def call(**x: Tensor) -> Tensor:
        y = gated_skip(**x, backend="triton")
        return y if ranks == 1 else rank_values(y, x["v_scale"], backend="triton")

    assert_same(run(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors), run(call, tensors))


@by_rank_number
def test_a_layer_on_these_kernels(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Mamba-3 hands them: slices of its projection, parameters [H, R, V]; every gradient as with plain torch."""
    mixer = Mamba3(32, head_dim=16, d_state=16, mimo_rank=ranks).to(DEVICE)
    initialize(mixer, 0)
    x, resolve, found = inputs(2, 5, 32, dtype=torch.float32).to(DEVICE), backend.resolve, []
    for name in ("reference", "triton"):
        monkeypatch.setattr(backend, "resolve", lambda op, *rest, name=name: name if op in ("gated_skip", "rank_values") else resolve(op, *rest))
        leaf = x.clone().requires_grad_()
        y = mixer(leaf)[0]
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])
        step = mixer.step(x[:, 0], mixer.init_state(2))[0]
        found.append({"y": y.detach(), "step": step, **{str(i): g for i, g in enumerate(gradients)}})
    assert_close(found[1], found[0], TOLERANCE[torch.float32])


REFUSED: list[tuple[int, torch.dtype, str]] = [(2, torch.float64, "its kernels take no float64"), (17, torch.float32, "17 ranks are above 16")]


@pytest.mark.parametrize(("ranks", "dtype", "why"), REFUSED)
def test_what_the_kernels_cannot_take_runs_on_the_reference(ranks: int, dtype: torch.dtype, why: str) -> None:
    tensors: dict[str, Any] = make((2,), ranks, 2, 4, dtype)
    tensors |= {name: tensors[name].to(torch.promote_types(dtype, torch.float32)) for name in PARAMETERS}
    assert gated_skip(**tensors).dtype == rank_values(**ranks_of(tensors)).dtype == dtype
    for function, given in ((gated_skip, tensors), (rank_values, ranks_of(tensors))):
        with pytest.raises(NotImplementedError, match=f"^{function.__name__}: backend='triton' cannot run: {why}"):
            function(**given, backend="triton")
