"""The delta rule on a GPU, at sizes and in numbers that small cases cannot show: offsets, grids, compilations, waits, a peer's errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_cases import Inputs, assert_same, cu_seqlens_of, errors, make, random_cotangent, run
from delta_triton_cases import TOLERANCE, alone_in, case_of, compilations, expected, kernel
from gpu_cases import DEVICE
from gpu_summary import BESIDE
from torch import Tensor

from kernels import delta_rule
from kernels.delta import reference

pytestmark = pytest.mark.gpu
poisoned = pytest.mark.usefixtures("poison")
both = pytest.mark.parametrize("mixer", ["kda", "mamba2"])  # the launches with erase, and those without


@pytest.fixture
def _much_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests that take tens of gigabytes wait for each other, in whatever process they run."""
    with alone_in(tmp_path_factory.getbasetemp().parent):
        yield


def drawn(lead: tuple[int, int], heads: int, v_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype, mixer: str) -> dict[str, Tensor]:
    """q, k, v and the gates of KDA or Mamba-2, drawn on the device; decays are small."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*lead, *shape, device=DEVICE, generator=generator, dtype=dtype)

    q, k = (F.normalize(draw(heads, k_dim) - 0.5, dim=-1) for _ in range(2))
    gates = {"g": draw(heads, k_dim).float() * -0.02, "b": draw(heads, 1), "w": draw(v_heads, 1)}
    if mixer == "mamba2":
        gates = {"g": draw(v_heads, 1).float() * -0.02, "w": gates["w"]}
    return {"q": q, "k": k, "v": draw(v_heads, v_dim) - 0.5, **gates}


def held(leaves: dict[str, Tensor]) -> Inputs:
    return Inputs(leaves, {name: lambda x: x for name in leaves}, {})


@poisoned
@pytest.mark.usefixtures("_much_memory")
@pytest.mark.parametrize(("mixer", "groups"), [("gdn2", 1), ("mamba2", 1), ("mamba2", 4)])
def test_strided_inputs_beyond_two_billion_entries(mixer: str, groups: int) -> None:
    """The last tokens of every argument lie more than 2^31 entries behind the first: the same bits as for contiguous copies."""
    case = case_of(mixer, 64, 64, tokens=1100, decay="slow", state=False, heads=2 if groups == 1 else 1, groups=groups)
    small = make(case).rounded(torch.bfloat16, DEVICE)
    apart = 2**31 // 1090
    spread = {dtype: torch.empty(1, case.tokens, apart, device=DEVICE, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    leaves = {}
    for n, (name, x) in enumerate(small.leaves.items()):
        leaves[name] = spread[x.dtype][..., n * 256 : n * 256 + x.shape[2] * x.shape[3]].unflatten(-1, x.shape[2:])
        leaves[name].copy_(x)
        assert (case.tokens - 1) * leaves[name].stride(1) > 2**31
    assert_same(run(kernel, small._replace(leaves=leaves)), run(kernel, small))


@poisoned
@pytest.mark.usefixtures("_much_memory")
@both
def test_values_of_more_than_two_billion_entries(mixer: str) -> None:
    """64 value heads on one key head, of which the last one is compared; the others get no gradient."""
    inputs = drawn((1, 2**18 + 100), 1, 64, 32, 128, torch.bfloat16, mixer)
    assert inputs["v"].numel() > 2**31
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o, _ = kernel(**leaves)
    cotangent = torch.zeros_like(o)
    cotangent[:, :, -1] = random_cotangent(o[:, :, -1], 0)
    gradients = torch.autograd.grad(o, list(leaves.values()), cotangent)

    def last(x: Tensor) -> Tensor:
        return x[:, :, -1:].detach()

    own = {name: last(x).double().requires_grad_() for name, x in leaves.items()}
    wanted, _ = delta_rule(**own, backend="reference")
    wanted_gradients = torch.autograd.grad(wanted, list(own.values()), last(cotangent).double())
    got = {"o": last(o)} | {name: last(x) for name, x in zip(leaves, gradients, strict=True)}
    found = errors(got, {"o": wanted.detach()} | dict(zip(leaves, wanted_gradients, strict=True)))
    assert max(found.values()) <= TOLERANCE[torch.bfloat16], found


@poisoned
@pytest.mark.usefixtures("_much_memory")
def test_seventy_thousand_documents() -> None:
    """More documents, and so more chunks, than a short axis of a launch grid can hold. Of one token each: a step of the recurrence."""
    documents = 70_000
    case = case_of("gdn2", 32, 32, layout="packed", documents=(1,) * documents, tokens=documents, heads=1, decay="mild")
    inputs = make(case).rounded(torch.float32, DEVICE)

    def steps(state: Tensor, scale: None, cu_seqlens: Tensor, **arguments: Tensor) -> tuple[Tensor, Tensor]:
        assert cu_seqlens.numel() == documents + 1
        o, state = reference.step(**{name: x[0] for name, x in arguments.items()}, scale=32**-0.5 if scale is None else scale, state=state)  # type: ignore[arg-type]
        return o.unsqueeze(0), state

    found = errors(run(kernel, inputs), run(steps, inputs.to(torch.float64)))
    assert max(found.values()) <= TOLERANCE[torch.float32], found


@poisoned
@pytest.mark.usefixtures("_much_memory")
@both
def test_seventy_thousand_chunks(mixer: str) -> None:
    """1,100 sequences of 65 chunks; the last two are compared."""
    leaves = drawn((1100, 64 * 64 + 7), 1, 1, 32, 32, torch.bfloat16, mixer)
    got = run(kernel, held(leaves))
    last = held({name: x[-2:].double() for name, x in leaves.items()})
    o, final = (random_cotangent(got[name], seed)[-2:].double() for seed, name in enumerate(("o", "final")))
    tensors = {name: x.requires_grad_() for name, x in last.leaves.items()}
    results = delta_rule(**tensors, backend="reference")
    gradients = torch.autograd.grad(results, list(tensors.values()), (o, final))
    wanted = dict(zip(("o", "final", *(f"d{name}" for name in tensors)), (*(x.detach() for x in results), *gradients), strict=True))
    found = errors({name: x[-2:] for name, x in got.items()}, wanted)
    assert max(found.values()) <= TOLERANCE[torch.bfloat16], found


# --- what a length may not cost ---


def packed(lengths: list[int], mixer: str) -> Inputs:
    tokens = sum(lengths)
    return held(drawn((1, tokens), 16, 16, 128, 128, torch.bfloat16, mixer))._replace(options={"cu_seqlens": cu_seqlens_of(lengths).to(DEVICE)})


@both
def test_fifty_packed_lengths_compile_nothing(mixer: str) -> None:
    run(kernel, packed([100, 30], mixer))
    generator = torch.Generator().manual_seed(0)
    with compilations() as compiled:
        for n in range(50):
            count = (1, 2, 3, 8, 16, 17, 33)[n % 7]
            lengths = torch.randint(1, 300, (count,), generator=generator).tolist()
            run(kernel, packed([1] if n == 0 else [16] * count if n == 1 else [64] * count if n == 2 else lengths, mixer))
    assert compiled == []


@both
def test_dense_lengths_and_batches_compile_nothing(mixer: str) -> None:
    for batch, tokens in ((2, 130), (64, 130), (1, 8000)):  # a tile for few sequences, one for many; long ones have segments
        run(kernel, held(drawn((batch, tokens), 1, 2, 64, 64, torch.bfloat16, mixer)))
    with compilations() as compiled:
        for batch, tokens in ((1, 1), (1, 16), (3, 64), (16, 65), (1, 4096), (2, 4097), (5, 1000)):
            run(kernel, held(drawn((batch, tokens), 1, 2, 64, 64, torch.bfloat16, mixer)))
    assert compiled == []


@pytest.mark.parametrize("mixer", ["gdn2", "mamba2"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_does_not_wait_for_the_device(layout: str, mixer: str) -> None:
    inputs = make(case_of(mixer, 64, 64, layout=layout, tokens=4200 if layout == "dense" else 300)).rounded(torch.bfloat16, DEVICE)
    leaves = {name: x.requires_grad_() for name, x in inputs.leaves.items()}
    arguments = inputs._replace(leaves=leaves).arguments()
    results = kernel(**arguments)
    cotangents = [random_cotangent(x, seed) for seed, x in enumerate(results)]
    torch.autograd.grad(results, list(leaves.values()), cotangents)  # all kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(kernel(**arguments), list(leaves.values()), cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- bfloat16 errors beside a peer's ---


@pytest.mark.parametrize(("heads", "tokens"), [(4, 2048), (40, 512)])  # few programs in the serial passes, and many: kernels of their own
@pytest.mark.parametrize(("decay", "keys"), [("slow", "apart"), ("mild", "apart"), ("mixed", "apart"), ("slow", "alike"), ("mild", "alike")])
def test_errors_beside_flash_linear_attention(decay: str, keys: str, heads: int, tokens: int, record_property: Callable[[str, object], None]) -> None:
    """Against float64 from the same rounded inputs (q and k normalised before they are rounded), tensor by tensor: at most 1.1 times theirs.

    Keys that resemble each other (cosines about 0.9) make the solve multiply what was rounded before it. In the Euclidean norm: the largest of a
    million errors moves by 20 % either way when one rounding of a dozen is left out (docs/log.md).
    """
    gdn2 = pytest.importorskip("fla.ops.gdn2")
    case = case_of("gdn2", 128, 128, heads=heads, batch=2, tokens=tokens, decay=decay)

    def theirs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor, scale: Any) -> tuple[Tensor, Tensor]:
        o, final = gdn2.chunk_gdn2(q, k, v, g, b, w, scale=scale, initial_state=state, output_final_state=True)
        return o, final

    inputs = make(case)
    inputs.leaves["q"] = F.normalize(inputs.leaves["q"], dim=-1)
    if keys == "alike":
        k = inputs.leaves["k"]
        inputs.leaves["k"] = F.normalize(k + 3 * k[:, :1], dim=-1)
    inputs = inputs.rounded(torch.bfloat16, DEVICE)
    wanted = {name: x.to(DEVICE) for name, x in expected(inputs).items()}
    ours, peer = (
        {name: float((x.double() - wanted[name]).norm() / wanted[name].norm()) for name, x in run(f, inputs).items()} for f in (kernel, theirs)
    )
    record_property(BESIDE, {name: [error, peer[name]] for name, error in ours.items()})
    if decay != "mixed":  # decays of -1000 are not what it is made for
        assert max(peer.values()) < 0.1, f"not the same function: {peer}"
    assert keys == "alike" or max(ours.values()) < TOLERANCE[torch.bfloat16], ours  # whatever the peer's
    larger = {name: (error, peer[name]) for name, error in ours.items() if not error <= 1.1 * peer[name]}
    assert not larger, f"(ours, theirs): {larger}"
