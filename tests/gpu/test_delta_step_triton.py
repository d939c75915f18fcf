"""Decoding on Triton: `lightning_mixers::delta_rule_step` against the equation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_cases import TOLERANCE, Case, Inputs, assert_close, assert_same, make, pairwise
from delta_triton_cases import compilations
from gpu_cases import DEVICE, DTYPES
from torch import Tensor

import kernels
from kernels.delta import reference
from kernels.delta.step import FEW, SOME, delta_rule_step, refusal

pytestmark = pytest.mark.usefixtures("poison")

STEPS = 2
TYPICAL = Case("channel", "channel", "channel", "key", "key", 2, STEPS, (32, 32), "dense", True, None, "contiguous", "mixed")
FACTORS: dict[str, tuple[Any, ...]] = {
    "g": ("channel", "scalar", "absent"),
    "b": ("channel", "scalar", "absent"),
    "w": ("channel", "scalar", "absent"),
    "g_heads": ("key", "value"),
    "b_heads": ("key", "value"),
    "groups": (1, 2),
    "K": (32, 64, 96, 128, 256),
    "V": (32, 64, 128, 100),
    "scale": (None, 1.0),
    "storage": ("contiguous", "expanded", "strided"),
    "dtype": DTYPES,
    "gate_dtype": ("as v", "float32"),
}
ROWS = pairwise(FACTORS)


def case_of(row: tuple[Any, ...]) -> tuple[Case, torch.dtype, bool]:
    *widths, k_dim, v_dim, scale, storage, dtype, gate_dtype = row
    return (
        TYPICAL._replace(**dict(zip(FACTORS, widths, strict=False)), sizes=(k_dim, v_dim), scale=scale, storage=storage),
        dtype,
        gate_dtype == "as v",
    )


def token(inputs: Inputs, t: int) -> dict[str, Any]:
    """The arguments of the op for token t, without the state."""
    arguments = inputs.arguments()
    scale = arguments.pop("scale")
    named = {name: arguments[name][:, t] if name in arguments else None for name in "qkvgbw"}
    return named | {"scale": named["q"].shape[-1] ** -0.5 if scale is None else scale}


def inputs_of(case: Case, dtype: torch.dtype, narrow_gates: bool = True, seed: int = 0) -> Inputs:
    wide = ("g", "state") if narrow_gates else ("g", "b", "w", "state")
    inputs = make(case, seed)
    return inputs._replace(leaves={name: x.to(DEVICE, torch.float32 if name in wide else dtype) for name, x in inputs.leaves.items()})


def expected_steps(inputs: Inputs, state: Tensor) -> dict[str, Tensor]:
    """The equation, in float64, from the rounded inputs."""
    state, outputs = state.double(), []
    for t in range(inputs.arguments()["q"].shape[1]):
        arguments = token(inputs, t)
        scale, heads = arguments.pop("scale"), arguments["v"].shape[1]
        o, state = reference.step(*(reference.expand_heads(x, heads, torch.float64) for x in arguments.values()), scale=scale, state=state)
        outputs.append(o)
    return {"o": torch.stack(outputs, 1), "state": state}


def run_steps(inputs: Inputs, state: Tensor) -> dict[str, Tensor]:
    outputs = []
    for t in range(inputs.arguments()["q"].shape[1]):
        o, state = delta_rule_step(**token(inputs, t), state=state)
        outputs.append(o)
    return {"o": torch.stack(outputs, 1), "state": state}


def check(inputs: Inputs, dtype: torch.dtype) -> None:
    state = inputs.arguments()["state"]
    before = state.clone()
    got, expected = run_steps(inputs, state), expected_steps(inputs, state)
    assert torch.equal(state, before)
    assert (got["o"].dtype, got["state"].dtype) == (dtype, torch.float32)
    assert_close({"o": got["o"]}, {"o": expected["o"]}, TOLERANCE[dtype])
    assert_close({"state": got["state"]}, {"state": expected["state"]}, TOLERANCE[torch.float32])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(x).removeprefix("torch.") for x in row))
def test_steps_equal_the_recurrence(row: tuple[Any, ...]) -> None:
    case, dtype, narrow_gates = case_of(row)
    check(inputs_of(case, dtype, narrow_gates), dtype)


@pytest.mark.parametrize("erase", ["0.0", "1.0", "2.0"])
@pytest.mark.parametrize("decay", ["0.0", "-1e-6", "-5.0", "-50.0", "-1000.0"])
def test_extreme_gates(decay: str, erase: str) -> None:
    check(inputs_of(TYPICAL._replace(decay=decay, erase=erase, groups=1, tokens=5), torch.float32), torch.float32)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (32, 130)], ids=str)
def test_odd_sizes(sizes: tuple[int, int]) -> None:
    check(inputs_of(TYPICAL._replace(sizes=sizes), torch.float32), torch.float32)


@pytest.mark.parametrize("size_class", ["few", "some", "many"])
def test_any_number_of_states(size_class: str) -> None:
    """Each class of launches, by its first number of sequences above the one before."""
    batch = {"few": 1, "some": FEW // 2 + 1, "many": SOME // 2 + 1}[size_class]
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (batch, 1, 4), "k": (batch, 1, 4), "v": (batch, 2, 4), "g": (batch, 1, 4), "b": (batch, 1, 4), "w": (batch, 2, 4)}
    arguments = {name: torch.rand(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    arguments["g"] = -arguments["g"]
    state = torch.rand(batch, 2, 4, 4, generator=generator).to(DEVICE)
    o, new = delta_rule_step(**arguments, scale=1.0, state=state)
    wide = [reference.expand_heads(x, 2, torch.float64) for x in arguments.values()]
    expected_o, expected = reference.step(*wide, scale=1.0, state=state.double())
    assert_close({"o": o, "state": new}, {"o": expected_o, "state": expected}, TOLERANCE[torch.float32])


def test_two_runs_are_bitwise_equal() -> None:
    inputs = inputs_of(TYPICAL, torch.float32)
    state = inputs.arguments()["state"]
    assert_same(run_steps(inputs, state), run_steps(inputs, state))


def test_opcheck() -> None:
    for case in (TYPICAL, TYPICAL._replace(g="absent", b="scalar", w="absent", storage="strided")):
        arguments = inputs_of(case, torch.float32)
        torch.library.opcheck(
            torch.ops.lightning_mixers.delta_rule_step.default, tuple((token(arguments, 0) | {"state": arguments.arguments()["state"]}).values())
        )


def test_refusals() -> None:
    q, state = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8, 8)
    assert refusal(q, q, None, state) is None
    assert "float32" in str(refusal(q.double()))
    assert "257" in str(refusal(torch.zeros(1, 1, 257)))
    state.requires_grad_()
    assert "gradients" in str(refusal(q, q, None, state))
    with torch.no_grad():
        assert refusal(q, q, None, state) is None


def test_the_public_function() -> None:
    """The kernel by name and its refusals; "auto" goes to the reference where gradients are needed, and they are right."""
    inputs = inputs_of(TYPICAL, torch.float32)
    arguments = token(inputs, 0) | {"state": inputs.arguments()["state"]}
    got = kernels.delta_rule_step(**arguments, backend="triton")
    assert_same(dict(enumerate(got)), dict(enumerate(delta_rule_step(**arguments))))
    arguments["q"] = arguments["q"].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="it has no gradients"):
        kernels.delta_rule_step(**arguments, backend="triton")
    gradients = [torch.autograd.grad(kernels.delta_rule_step(**arguments, backend=b)[0].sum(), arguments["q"])[0] for b in ("auto", "reference")]
    assert torch.equal(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32])
def test_in_a_cuda_graph(batch: int) -> None:
    """Captured once, replayed on other inputs: the same bits as a plain call."""
    arguments = {name: torch.rand(batch, 16, 128, device=DEVICE, dtype=torch.bfloat16) for name in "qkvbw"}
    arguments["g"] = -torch.rand(batch, 16, 128, device=DEVICE)
    state = torch.rand(batch, 16, 128, 128, device=DEVICE)
    delta_rule_step(**arguments, scale=0.1, state=state)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, new = delta_rule_step(**arguments, scale=0.1, state=state)
    for seed in range(3):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for name, x in (*arguments.items(), ("state", state)):
            x.copy_(torch.rand(x.shape, device=DEVICE, generator=generator) * (-1 if name == "g" else 1))
        graph.replay()
        expected_o, expected = delta_rule_step(**arguments, scale=0.1, state=state)
        assert_same({"o": o, "state": new}, {"o": expected_o, "state": expected})


@pytest.mark.gpu
def test_at_most_three_variants_for_all_batch_sizes() -> None:
    """Whatever the batch, one variant for each class of launches."""
    with compilations() as compiled:
        for batch in (1, 2, 3, 4, 5, 8, 13, 16, 32, 63, 64, 65, 100, 128, 256):
            x = torch.rand(batch, 16, 48, device=DEVICE)
            delta_rule_step(x, x, x, None, x, x, 1.0, torch.rand(batch, 16, 48, 48, device=DEVICE))
    assert 0 < len(compiled) <= 3, compiled


@pytest.mark.gpu
def test_does_not_wait_for_the_device() -> None:
    inputs = inputs_of(TYPICAL, torch.bfloat16)
    arguments = token(inputs, 0) | {"state": inputs.arguments()["state"]}
    delta_rule_step(**arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        delta_rule_step(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_states_beyond_two_billion_entries() -> None:
    """The last sequence of a batch whose states hold more than 2^31 numbers equals the same sequence alone."""
    batch = 2**31 // (16 * 128 * 128) + 2
    state = torch.zeros(batch, 16, 128, 128, device=DEVICE)
    x = torch.rand(batch, 16, 128, device=DEVICE, dtype=torch.bfloat16)
    state[-1].uniform_()
    o, new = delta_rule_step(x, x, x, None, x, x, 1.0, state)
    alone_o, alone = delta_rule_step(x[-1:], x[-1:], x[-1:], None, x[-1:], x[-1:], 1.0, state[-1:])
    assert_close({"o": o[-1:], "state": new[-1:]}, {"o": alone_o.double(), "state": alone.double()}, TOLERANCE[torch.float32])
