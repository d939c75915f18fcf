"""Both Mamba mixers beside mamba-ssm's own layers on a GPU, with loaded weights: outputs and every gradient against float64, ours no farther from it
than theirs. Needs the package (`mamba_ssm_cases`); MIMO also TileLang, which that package asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from gpu_cases import DEVICE
from gpu_summary import BESIDE
from mamba_ssm_cases import needs_package, take_one_configuration
from torch import Tensor

from kernels.rotary.reference import wrapped
from mixers import mamba2, mamba3, mamba_ssm, registry
from mixers.contract import inputs

pytestmark = [pytest.mark.gpu, needs_package]

D, T, BATCH, DRAWS = 512, 500, 2, 8
# Rounding is random and much of it common to both (bf16 projections): an error of theirs that equals ours may come out a little smaller. A tensor of
# few numbers (one a head) averages over few.
SLACK, SLACK_OF_FEW, FEW = 1.1, 1.25, 1000
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-4}  # below it both are right
PACKAGE_ERROR = 0.05  # of the kernels of mamba_ssm in bfloat16: its running angles have 8 bits
DELTA_ERROR = 0.03  # of ours


class Layer(NamedTuple):
    """A layer of the package and the mixer that is to be the same."""

    mixer: str
    settings: dict[str, Any]  # ours
    theirs: dict[str, Any]
    tokens: int = T
    backward: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # dtypes in which theirs has one


MIMO = {"is_mimo": True, "mimo_rank": 4, "chunk_size": 16}
LAYERS = {
    "mamba2": Layer("mamba2", {}, {"d_state": 64}),
    "mamba2-groups": Layer("mamba2", {"num_groups": 2, "d_state": 128}, {"d_state": 128, "ngroups": 2}),
    "siso": Layer("mamba3", {}, {"d_state": 64}),
    "siso-norm": Layer(
        "mamba3",
        {"num_groups": 2, "d_state": 128, "rope_fraction": 1.0, "out_norm": True},
        {"d_state": 128, "ngroups": 2, "rope_fraction": 1.0, "is_outproj_norm": True},
    ),
    # whole chunks of 16 tokens; TileLang does not compile its backward pass for float32. 64 is the paper's, 128 their own default
    "mimo": Layer("mamba3", {"mimo_rank": 4}, {"d_state": 64, **MIMO}, tokens=512, backward=(torch.bfloat16,)),
    "mimo-128": Layer("mamba3", {"mimo_rank": 4, "d_state": 128}, {"d_state": 128, **MIMO}, tokens=512, backward=(torch.bfloat16,)),
}
NAMES = {"mamba2": mamba2.MAMBA_SSM, "mamba3": mamba3.MAMBA_SSM}
# TileLang compiles for minutes; where it is installed and does not work the test fails
TILELANG = [pytest.mark.long, pytest.mark.skipif(find_spec("tilelang") is None, reason="mamba-ssm's MIMO needs TileLang, which is not installed")]
CASES = [
    pytest.param(name, dtype, marks=TILELANG if "mimo" in name else [])
    for name, dtype in product(LAYERS, (torch.float32, torch.bfloat16))
    if (name, dtype) != ("mimo-128", torch.float32)
]


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Projections in float32 are float32 in both."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def layer_of_the_package(layer: Layer) -> Any:
    """Float32 weights, those that begin as constants moved away from them."""
    cls = mamba_ssm.kernel(f"modules.{layer.mixer}", layer.mixer.capitalize())
    take_one_configuration()
    options = {"use_mem_eff_path": False} if layer.mixer == "mamba2" else {}  # the other path needs the package causal-conv1d
    torch.manual_seed(0)
    theirs = cls(D, headdim=64, **layer.theirs, **options, device=DEVICE, dtype=torch.float32)
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            if parameter.ndim != 2:
                parameter.add_(0.1 * inputs(*parameter.shape, dtype=torch.float32, seed=50 + i).to(DEVICE))
    return theirs


def mixer_with(layer: Layer, theirs: Any, backend: str) -> Any:
    mixer: Any = registry.build(layer.mixer, D, {layer.mixer: {**layer.settings, "backend": backend}})
    mixer = mixer.to(DEVICE)
    mixer.load_mamba_ssm(theirs.state_dict())
    return mixer


def precision(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """As a training has it: bfloat16 under autocast, with float32 weights."""
    return torch.autocast("cuda", dtype=dtype) if dtype == torch.bfloat16 else nullcontext()


def results(
    call: Callable[[Tensor], Tensor], parameters: dict[str, Tensor], dtype: torch.dtype, tokens: int = T, *, backward: bool = True
) -> dict[str, Tensor]:
    """Outputs, and with `backward` gradients of the input and of the parameters, of all draws, in float64 on the CPU."""
    found: dict[str, list[Tensor]] = {}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for seed in range(DRAWS):
        x = inputs(BATCH, tokens, D, dtype=torch.float32, seed=100 + seed).to(DEVICE, wide).requires_grad_()
        weights = inputs(BATCH, tokens, D, dtype=torch.float32, seed=200 + seed).to(DEVICE, wide)
        with precision(dtype):
            y = call(x)
        leaves = {"x": x, **parameters} if backward else {}
        gradients = torch.autograd.grad((y.to(wide) * weights).sum(), list(leaves.values())) if backward else ()
        for name, t in zip(("y", *(f"d{name}" for name in leaves)), (y, *gradients), strict=True):
            found.setdefault(name, []).append(t.detach().double().cpu())
    return {name: torch.stack(draws) for name, draws in found.items()}


def ours(layer: Layer, mixer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    own = dict(mixer.named_parameters())
    named = {theirs: own[name] for theirs, name in NAMES[layer.mixer].items() if name in own}
    return results(lambda x: mixer(x)[0], named, dtype, layer.tokens)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """|a - b| / |b| of every tensor, in the Euclidean norm; infinite for what is not finite."""
    values = {name: float((a - exact[name]).norm() / exact[name].norm()) for name, a in found.items()}
    return {name: value if value == value else float("inf") for name, value in values.items()}


def compared(name: str, backend: str, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float], dict[str, Tensor]]:
    """The errors of our layer and of theirs, of every tensor that theirs has, and the float64 results."""
    layer = LAYERS[name]
    theirs = layer_of_the_package(layer)
    exact = ours(layer, mixer_with(layer, theirs, "delta").double(), torch.float64)
    mine = errors(ours(layer, mixer_with(layer, theirs, backend), dtype), exact)
    found = errors(results(theirs, dict(theirs.named_parameters()), dtype, layer.tokens, backward=dtype in layer.backward), exact)
    assert dtype not in layer.backward or found.keys() == mine.keys()
    return {key: mine[key] for key in found}, found, exact


def assert_no_farther(
    mine: dict[str, float], theirs: dict[str, float], exact: dict[str, Tensor], dtype: torch.dtype, note: Callable[[str, object], None]
) -> None:
    note(BESIDE, {key: [value, theirs[key]] for key, value in mine.items()})
    report = "\n".join(f"{key:<16} ours {mine[key]:.2e}  theirs {theirs[key]:.2e}" for key in mine)
    print(report)
    for key, value in mine.items():
        slack = SLACK_OF_FEW if exact[key][0].numel() < FEW else SLACK
        assert value <= max(slack * theirs[key], FLOOR[dtype]), f"{key} is farther from float64 than mamba-ssm's\n{report}"


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_delta_is_no_farther_from_float64_than_mamba_ssm(name: str, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    mine, theirs, exact = compared(name, "delta", dtype)
    assert max(theirs.values()) < 0.2, f"the two layers are not the same: {theirs}"
    assert_no_farther(mine, theirs, exact, dtype, record_property)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("mamba2", "mamba2-groups") for dtype in (torch.float32, torch.bfloat16)]
    + [(name, torch.bfloat16) for name in ("siso", "siso-norm")],  # those kernels are for bfloat16 alone
    ids=str,
)
def test_backend_mamba_ssm_is_no_farther_either(name: str, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    """The same kernels; around them the layer is ours."""
    mine, theirs, exact = compared(name, "mamba_ssm", dtype)
    assert_no_farther(mine, theirs, exact, dtype, record_property)


# --- packed documents and states ---

LENGTHS = {"batch": None, "documents": [1, 63, 64, 200, 2, 170]}


def with_state(mixer: Any, lengths: list[int] | None, state: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], Any]:
    """Outputs, the state afterwards, gradients of the input, of the parameters and of the state carried in."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (BATCH, T, D) if lengths is None else (1, sum(lengths), D)
    ends = None if lengths is None else torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    x = inputs(*shape, dtype=torch.float32, seed=1).to(DEVICE, wide).requires_grad_()
    if state is not None:
        empty = mixer.init_state(len(state[0]), device=DEVICE)
        state = type(state)(*(t.detach().to(like.dtype).requires_grad_() for t, like in zip(state, empty, strict=True)))
    with precision(dtype):
        y, after = mixer(x, state, cu_seqlens=ends)
    out = {"y": y, **({} if after is None else {f"after {n}": getattr(after, n) for n in after._fields if n != "angle"})}
    loss = sum((t.to(wide) * inputs(*t.shape, dtype=torch.float32, seed=9 + i).to(DEVICE, wide)).sum() for i, t in enumerate(out.values()))
    leaves = {"x": x, **dict(mixer.named_parameters()), **({} if state is None else {f"carried {n}": getattr(state, n) for n in state._fields})}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {**out, **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}}
    return {n: t.detach().double().cpu() for n, t in found.items()}, after


@pytest.mark.parametrize("name", ["mamba2", "mamba2-groups", "siso", "siso-norm"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("carried", [False, True])
def test_documents_and_states_go_through_mamba_ssm(name: str, lengths: list[int] | None, carried: bool) -> None:
    """In bfloat16, near float64, with gradients; the angle that is carried on is the one of delta, to float32 rounding."""
    layer = LAYERS[name]
    theirs = layer_of_the_package(layer)
    delta, package = (mixer_with(layer, theirs, backend) for backend in ("delta", "mamba_ssm"))
    assert package.kernels.resolve(DEVICE, torch.bfloat16) == "mamba_ssm"
    wide, state = mixer_with(layer, theirs, "delta").double(), None
    if carried:
        sequences = BATCH if lengths is None else len(lengths)
        prefix = inputs(sequences, 70, D, dtype=torch.float64, seed=3).to(DEVICE)
        state = wide(prefix, wide.init_state(sequences, device=DEVICE))[1]
    exact, _ = with_state(wide, lengths, state, torch.float64)
    of_delta, after_delta = with_state(delta, lengths, state, torch.bfloat16)
    of_package, after_package = with_state(package, lengths, state, torch.bfloat16)
    for what, found, bound in (("delta", of_delta, DELTA_ERROR), ("mamba_ssm", of_package, PACKAGE_ERROR)):
        far = {key: value for key, value in errors(found, exact).items() if value > bound}
        assert not far, f"{what}: {far}"
    if carried and "angle" in after_delta._fields:
        assert wrapped(after_delta.angle - after_package.angle).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["mamba2", "siso"])
def test_a_prefill_goes_on_with_steps(name: str) -> None:
    layer = LAYERS[name]
    theirs = layer_of_the_package(layer)
    mixer, x = mixer_with(layer, theirs, "mamba_ssm"), inputs(BATCH, 100, D, dtype=torch.float32).to(DEVICE)
    exact = mixer_with(layer, theirs, "delta").double()(x.double())[0].detach()
    with torch.no_grad(), precision(torch.bfloat16):
        y, state = mixer(x[:, :90], mixer.init_state(BATCH))
        rows = [y]
        for t in range(90, 100):
            step, state = mixer.step(x[:, t], state)
            rows.append(step.unsqueeze(1))
    found = torch.cat(rows, 1).double()
    assert float((found - exact).norm() / exact.norm()) < PACKAGE_ERROR
    assert float((found - exact)[:, 90:].norm() / exact[:, 90:].norm()) < PACKAGE_ERROR
