"""The convolution's kernels against the plain-torch reference in float64.

Shapes: B batch, T tokens, D channels, W taps, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_cases import TOLERANCE, assert_close, assert_same, cu_seqlens_of
from gpu_cases import DEVICE, DTYPES, ON_GPU
from torch import Tensor

from kernels import backend, causal_conv1d, causal_conv1d_step
from kernels.conv1d import op, tiles
from kernels.conv1d.forward import rows_of
from kernels.tiles import Key, Tile

pytestmark = pytest.mark.usefixtures("poison")

D = 12
# segments have 16 tokens; documents end at, before and behind their borders, and some are shorter than every filter
LAYOUTS: dict[str, tuple[int, ...]] = {"dense": (19, 19), "short": (2, 2, 2), "packed": (1, 2, 3, 9, 1, 1, 5, 1), "one document": (17,)}
EPILOGUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "silu": {"activation": "silu"},
    "norm": {"norm_size": 3},
    "silu, norm of the first channels": {"activation": "silu", "norm_size": 4, "norm_channels": 8},
}
FULL = EPILOGUES["silu, norm of the first channels"]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_layout = pytest.mark.parametrize("layout", ["dense", "packed"])
by_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES.keys())


def is_packed(layout: str) -> bool:
    return layout in ("packed", "one document")


def make(
    lengths: tuple[int, ...], *, packed: bool, dtype: torch.dtype, width: int = 4, channels: int = D, bias: bool = True, state: bool = True
) -> dict[str, Tensor]:
    """Random tensors of a call."""
    generator = torch.Generator().manual_seed(width)
    shape = (1, sum(lengths), channels) if packed else (len(lengths), lengths[0], channels)
    shapes: dict[str, tuple[int, ...]] = {"x": shape, "weight": (channels, width)}
    shapes |= {"bias": (channels,)} if bias else {}
    shapes |= {"state": (len(lengths), width - 1, channels)} if state else {}
    return {name: torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for name, s in shapes.items()}


def of_layout(layout: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and options that go with them."""
    tensors = make(LAYOUTS[layout], packed=is_packed(layout), dtype=dtype, **options)
    return tensors, {"cu_seqlens": cu_seqlens_of(LAYOUTS[layout]).to(DEVICE)} if is_packed(layout) else {}


def cotangent(x: Tensor, seed: int) -> Tensor:
    """Random numbers that every dtype holds exactly."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(x)


def run(function: Callable[..., tuple[Tensor, Tensor]], tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, state and every gradient under fixed random cotangents."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y, state = function(**leaves, **options)
    gradients = torch.autograd.grad([y, state], list(leaves.values()), [cotangent(y, 0), cotangent(state, 1)])
    return {"y": y.detach(), "final": state.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def check(tensors: dict[str, Tensor], function: Callable[..., tuple[Tensor, Tensor]] = causal_conv1d, **options: Any) -> None:
    """Everything against the reference on the same rounded inputs, and in its dtype."""
    got = run(function, tensors, backend="triton", **options)
    expected = run(function, {name: x.double() for name, x in tensors.items()}, backend="reference", **options)
    dtype = tensors["x"].dtype
    assert {name: x.dtype for name, x in got.items()} == {"y": dtype, "final": dtype, **{f"d{name}": x.dtype for name, x in tensors.items()}}
    assert_close(got, expected, TOLERANCE[dtype])


@by_layout
@by_epilogue
def test_against_float64(layout: str, epilogue: dict[str, Any]) -> None:
    tensors, options = of_layout(layout)
    check(tensors, **options, **epilogue)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(dtype: torch.dtype, layout: str) -> None:
    tensors, options = of_layout(layout, dtype)
    check(tensors, **options, **FULL)


@by_layout
def test_two_runs_are_bitwise_equal(layout: str) -> None:
    tensors, options = of_layout(layout)
    first = run(causal_conv1d, tensors, **options, **FULL, backend="triton")
    assert_same(run(causal_conv1d, tensors, **options, **FULL, backend="triton"), first)


@by_layout
@pytest.mark.parametrize(("bias", "state"), [(False, False), (True, False), (False, True)], ids=["neither", "bias", "state"])
def test_absent_inputs(layout: str, bias: bool, state: bool) -> None:
    tensors, options = of_layout(layout, bias=bias, state=state)
    check(tensors, **options, **FULL)


@by_layout
@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_widths(layout: str, width: int) -> None:
    tensors, options = of_layout(layout, width=width)
    check(tensors, **options, **FULL)


SIZES = {
    "one channel": (1, {}),
    "two channels a group": (6, {"norm_size": 2}),
    "no multiple of a block": (300, {"norm_size": 20, "norm_channels": 200}),
    "no power of two": (200, {"norm_size": 96, "norm_channels": 96}),
    "wider than a block": (520, {"norm_size": 260}),
    "border inside a block": (96, {"norm_size": 32, "norm_channels": 32}),
}


@pytest.mark.parametrize(("channels", "norm"), SIZES.values(), ids=SIZES.keys())
def test_sizes(channels: int, norm: dict[str, int]) -> None:
    check(make((6, 6), packed=False, dtype=torch.float32, channels=channels), activation="silu", **norm)


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize(
    "lengths", [(4100,), (700,) * 3, tuple(1 + i % 4 for i in range(1000)), (1000, 3, 1, 2000, 64, 128, 900)], ids=["4100", "3x700", "1000", "7"]
)
@pytest.mark.parametrize("norm_size", [64, 96, 128, 256, 1024])
def test_large(dtype: torch.dtype, lengths: tuple[int, ...], norm_size: int, state: bool) -> None:
    packed = len(set(lengths)) > 1
    tensors = make(lengths, packed=packed, dtype=dtype, channels=3072, state=state)
    options = {"cu_seqlens": cu_seqlens_of(lengths).to(DEVICE)} if packed else {}
    check(tensors, **options, activation="silu", norm_size=norm_size, norm_channels=norm_size * (2048 // norm_size))


@by_layout
def test_segments_do_not_show(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the tokens are divided, outputs and gradients of tokens are the same to the bit."""
    tensors, options = of_layout(layout)
    short = run(causal_conv1d, tensors, **options, **FULL, backend="triton")
    monkeypatch.setattr(tiles, "ENOUGH_WARPS", 1)
    assert tiles.plan("forward", tensors["x"], 4, 4, tokens=19).segment == 64
    long = run(causal_conv1d, tensors, **options, **FULL, backend="triton")
    by_token = {"y", "final", "dx", "dstate"}
    assert_same({name: x for name, x in long.items() if name in by_token}, {name: x for name, x in short.items() if name in by_token})
    assert_close(long, short, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("kernel", "key", "tile"), [entry for entry in tiles.TILES.entries() if entry[1].size == 4], ids=str)
def test_shipped_tiles(kernel: str, key: Key, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles.TILES, "tuned", {})
    monkeypatch.setitem(tiles.TILES.safe, kernel, tile)
    tensors, options = of_layout("packed", torch.float32 if key.itemsize == 4 else torch.float16)
    check(tensors, **options, **FULL)


@pytest.mark.parametrize("mixed", [torch.float64, torch.float16], ids=str)
def test_dtypes_may_differ(mixed: torch.dtype) -> None:
    """Parameters and a state in another dtype than x; the state is rounded to x's."""
    tensors, options = of_layout("packed", torch.float16)
    others = {name: tensors[name].to(mixed if name == "state" else torch.float32) for name in ("weight", "bias", "state")}
    check(tensors | others, **options, **FULL)


# --- storage ---


def column_slice(x: Tensor) -> Tensor:
    """x as a slice of the columns of a wider projection."""
    return torch.cat([torch.full_like(x, float("nan")), x, torch.full_like(x, float("nan"))], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def token_slice(x: Tensor) -> Tensor:
    """x as a slice of the tokens of a longer batch."""
    return torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : x.shape[1]]


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "columns": (column_slice, True),
    "tokens": (token_slice, True),
    "one token": (lambda x: token_slice(x[:, :1]), True),
    "columns of one sequence": (lambda x: column_slice(x[:1]), True),
    "every second channel": (lambda x: x.repeat_interleave(2, -1)[..., ::2], False),
    "channels first": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), False),
    "another batch stride": (lambda x: torch.cat([x.flatten(1), x[:, 0, :1]], 1)[:, :-1].unflatten(1, x.shape[1:]), False),
    "one token for all": (lambda x: x[:, :1].expand(x.shape), False),
}


@pytest.mark.parametrize(("view", "in_place"), VIEWS.values(), ids=VIEWS.keys())
def test_strided_x(view: Callable[[Tensor], Tensor], in_place: bool) -> None:
    tensors = make((3, 3), packed=False, dtype=torch.float32)
    x = view(tensors["x"])
    assert (rows_of(x).x.data_ptr() == x.data_ptr()) == in_place
    tensors |= {"x": x, "state": tensors["state"][: x.shape[0]]}
    got = run(causal_conv1d, tensors, **FULL, backend="triton")
    assert_same(got, run(causal_conv1d, {name: t.contiguous() for name, t in tensors.items()}, **FULL, backend="triton"))


def test_strided_everything_else() -> None:
    tensors, options = of_layout("packed")
    wide = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in tensors.items()}
    options["cu_seqlens"] = options["cu_seqlens"].long().repeat_interleave(2)[::2]
    assert_same(run(causal_conv1d, wide, **options, **FULL, backend="triton"), run(causal_conv1d, tensors, **options, **FULL, backend="triton"))


@pytest.mark.gpu
def test_cu_seqlens_may_lie_on_the_cpu() -> None:
    tensors, options = of_layout("packed")
    got = run(causal_conv1d, tensors, cu_seqlens=options["cu_seqlens"].cpu(), **FULL, backend="triton")
    assert_same(got, run(causal_conv1d, tensors, **options, **FULL, backend="triton"))


def test_strided_cotangents() -> None:
    tensors, _ = of_layout("dense")
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}

    def gradients(function: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        loss = function(*causal_conv1d(**leaves, **FULL, backend="triton"))
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    assert_same(gradients(lambda y, state: y.sum() + state.sum()), gradients(lambda y, state: (y * torch.ones_like(y)).sum() + (state + 0).sum()))
    wide = torch.randn(2, 19, 3 * D, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sliced = gradients(lambda y, _: (torch.cat([y, y, y], -1) * wide).sum())
    assert_close(sliced, gradients(lambda y, _: (y * wide.unflatten(-1, (3, D)).sum(-2)).sum()), TOLERANCE[torch.float32])
    only_state = gradients(lambda _, state: state.square().sum())
    assert not only_state["weight"].any()
    assert torch.equal(only_state["x"][:, -3:], 2 * leaves["x"][:, -3:])
    assert not only_state["x"][:, :-3].any()


# --- who sees whom ---


@pytest.mark.parametrize("position", [1, 16, 18])
def test_causality_is_bitwise(position: int) -> None:
    tensors, _ = of_layout("dense")
    changed = {name: x.clone() for name, x in tensors.items()}
    changed["x"][:, position:] *= 1000
    results = []
    for arguments in (tensors, changed):
        leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
        y, _ = causal_conv1d(**leaves, **FULL, backend="triton")
        gradients = torch.autograd.grad(y[:, :position].sin().sum(), list(leaves.values()))
        results.append({"y": y[:, :position].detach(), **dict(zip(leaves, gradients, strict=True))})
    assert_same(results[1], results[0])
    assert not results[0]["x"][:, position:].any()


def test_documents_do_not_see_each_other() -> None:
    """Packed equals separate, to the bit in everything that belongs to a token; one document may hold anything."""
    tensors, options = of_layout("packed")
    tensors["x"][:, 6:15] = float("nan")  # the fourth document
    tensors["state"][3] = float("inf")
    packed = run(causal_conv1d, tensors, **options, **FULL, backend="triton")
    d_y, d_final = cotangent(packed["y"], 0), cotangent(packed["final"], 1)
    start = 0
    for n, length in enumerate(LAYOUTS["packed"]):
        own = slice(start, start + length)
        x, state = tensors["x"][:, own].clone().requires_grad_(), tensors["state"][n : n + 1].clone().requires_grad_()
        y, final = causal_conv1d(x, tensors["weight"], tensors["bias"], state=state, **FULL, backend="triton")
        dx, d_state = torch.autograd.grad([y, final], [x, state], [d_y[:, own], d_final[n : n + 1]])
        if n != 3:
            got = {"y": packed["y"][:, own], "final": packed["final"][n], "dx": packed["dx"][:, own], "dstate": packed["dstate"][n]}
            assert_same(got, {"y": y.detach(), "final": final[0].detach(), "dx": dx, "dstate": d_state[0]})
        start += length


# --- one token ---


@by_dtype
@by_epilogue
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_step(dtype: torch.dtype, epilogue: dict[str, Any], bias: bool) -> None:
    tensors, _ = of_layout("dense", dtype, bias=bias)
    tensors["x"] = column_slice(tensors["x"])[:, 0]
    before = {name: x.clone() for name, x in tensors.items()}
    check(tensors, causal_conv1d_step, **epilogue)
    assert_same(tensors, before)


@pytest.mark.gpu
def test_step_in_a_cuda_graph() -> None:
    tensors = make((1,) * 5, packed=False, dtype=torch.bfloat16, channels=3072)
    tensors["x"] = tensors["x"][:, 0]
    expected = causal_conv1d_step(**tensors, activation="silu", norm_size=128, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = causal_conv1d_step(**tensors, activation="silu", norm_size=128, backend="triton")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- around the kernels ---


@pytest.mark.parametrize("layout", ["short", "packed"])
def test_opcheck(layout: str) -> None:
    tensors, options = of_layout(layout)
    leaves, cu_seqlens, epilogue = [t.requires_grad_() for t in tensors.values()], options.get("cu_seqlens"), (True, 4, 8)
    torch.library.opcheck(op.causal_conv1d, (*leaves, cu_seqlens, *epilogue, [4, 4, tensors["x"].shape[2] - 8]))
    arguments = [t.detach() for t in leaves]
    dy = [torch.ones_like(x) for x in arguments[0].split([4, 4, tensors["x"].shape[2] - 8], -1)]
    torch.library.opcheck(op.causal_conv1d_backward, (dy, None, *arguments, cu_seqlens, *epilogue))
    if cu_seqlens is None:
        torch.library.opcheck(op.causal_conv1d_step, (arguments[0][:, 0].clone().requires_grad_(), *leaves[1:], *epilogue))


def interpreted_when_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own answer reads an environment variable, which the compiler cannot trace."""
    if not ON_GPU:
        monkeypatch.setattr(backend, "interpreted", lambda: True)


@by_layout
def test_compile(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted_when_traced(monkeypatch)
    tensors, options = of_layout(layout)
    compiled = torch.compile(lambda **x: causal_conv1d(**x, **FULL, backend="triton"), fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, tensors, **options), run(causal_conv1d, tensors, **options, **FULL, backend="triton"))


def test_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted_when_traced(monkeypatch)
    tensors, _ = of_layout("dense")
    tensors["x"] = tensors["x"][:, 0].contiguous()
    compiled = torch.compile(lambda **x: causal_conv1d_step(**x, **FULL, backend="triton"), fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, tensors), run(causal_conv1d_step, tensors, **FULL, backend="triton"))


def test_only_inputs_are_saved() -> None:
    tensors, options = of_layout("packed")
    inputs = {t.data_ptr() for t in (*tensors.values(), options["cu_seqlens"])}
    y, _ = causal_conv1d(**{name: x.requires_grad_() for name, x in tensors.items()}, **options, **FULL, backend="triton")
    assert {t.data_ptr() for t in y.grad_fn.saved_tensors} == inputs  # type: ignore[union-attr]
    with torch.no_grad():
        assert causal_conv1d(**tensors, **options, **FULL, backend="triton")[0].grad_fn is None


def test_autocast_changes_nothing() -> None:
    tensors, _ = of_layout("dense")
    expected = causal_conv1d(**tensors, **FULL, backend="triton")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = causal_conv1d(**tensors, **FULL, backend="triton")
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_new_lengths_compile_nothing() -> None:
    from kernels.conv1d._triton.backward import conv_backward
    from kernels.conv1d._triton.forward import conv_forward

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in (conv_forward, conv_backward) for caches in kernel.device_caches.values())

    def both(lengths: tuple[int, ...]) -> None:
        run(causal_conv1d, make(lengths, packed=True, dtype=torch.bfloat16), cu_seqlens=cu_seqlens_of(lengths).to(DEVICE), backend="triton")
        run(causal_conv1d, make(lengths[:1] * 2, packed=False, dtype=torch.bfloat16), backend="triton")

    both((5, 6))
    before = compiled()
    for lengths in ((16,), (1, 1, 1), (32, 16), (1000, 1, 7, 8), tuple(range(1, 65))):
        both(lengths)
    assert compiled() == before


REFUSED: dict[str, tuple[dict[str, Tensor], int | None, str]] = {
    "double": ({"x": torch.ones(2, 6, D, dtype=torch.float64)}, None, "x is torch.float64"),
    "weight": ({"weight": torch.ones(D, 4).to(torch.float8_e4m3fn)}, None, "weight is torch.float8_e4m3fn"),
    "taps": ({"weight": torch.ones(D, 9)}, None, "9 taps are more than 8"),
    "norm": ({"x": torch.ones(1, 1, 1025), "weight": torch.ones(1025, 4)}, 1025, "norm_size = 1025 is above 1024"),
}


@pytest.mark.parametrize(("changes", "norm_size", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name_and_not_by_auto(changes: dict[str, Tensor], norm_size: int | None, message: str) -> None:
    tensors = {name: t.to(DEVICE) for name, t in ({"x": torch.ones(2, 6, D), "weight": torch.ones(D, 4)} | changes).items()}
    state = torch.zeros(tensors["x"].shape[0], tensors["weight"].shape[1] - 1, tensors["x"].shape[2], device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"^causal_conv1d: .*{message}"):
        causal_conv1d(**tensors, norm_size=norm_size, backend="triton")
    assert causal_conv1d(**tensors, norm_size=norm_size)[0].shape == tensors["x"].shape
    tensors["x"] = tensors["x"][:, 0]
    with pytest.raises(NotImplementedError, match=f"^causal_conv1d_step: .*{message}"):
        causal_conv1d_step(**tensors, state=state, norm_size=norm_size, backend="triton")
