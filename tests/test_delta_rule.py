"""The delta rule: the chunkwise algorithm against the recurrence, the recurrence against each published model, and what callers rely on.

Tolerances and their reasons: docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from delta_cases import (
    CASES,
    FACTORS,
    HALF,
    HEADS,
    TOLERANCE,
    Case,
    Inputs,
    all_pairs,
    assert_close,
    assert_same,
    document_lengths,
    make,
    pairs_of,
    pairwise,
    run,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import delta_rule, delta_rule_step
from kernels.delta.reference import CHUNK, chunkwise, recurrent
from kernels.delta.tree import tree_scores

pytestmark = pytest.mark.usefixtures("poison")

FLOAT64, FLOAT32 = TOLERANCE[torch.float64], TOLERANCE[torch.float32]
IMPLEMENTATIONS = {"recurrent": recurrent, "chunkwise": chunkwise}
FULL = Case("channel", "channel", "channel", "key", "key", 2, 200, (8, 12), "dense", True, None, "contiguous", "mixed")
WIDTHS = {
    "gdn2": FULL,
    "kda": FULL._replace(b="scalar", w="scalar"),
    "gdn": FULL._replace(g="scalar", b="scalar", w="scalar"),
    "deltanet": FULL._replace(g="absent", b="scalar", w="scalar"),
    "gla": FULL._replace(b="absent", w="absent"),
}
by_width = pytest.mark.parametrize("case", WIDTHS.values(), ids=WIDTHS.keys())
by_implementation = pytest.mark.parametrize("function", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())


def slice_tokens(inputs: Inputs, start: int, end: int, state: Tensor | None) -> dict[str, Any]:
    """The arguments for tokens start..end, with another state."""
    arguments = inputs.arguments()
    cut = {name: x[:, start:end] for name, x in arguments.items() if isinstance(x, Tensor) and name not in ("state", "cu_seqlens")}
    return cut | {"scale": arguments["scale"], "state": state}


# --- agreement ---


def test_every_pair_of_settings_is_covered() -> None:
    rows = pairwise(FACTORS)
    covered = set().union(*(pairs_of(row) for row in rows))
    assert covered == set(all_pairs(FACTORS))
    assert all(x in values for row in rows for x, values in zip(row, FACTORS.values(), strict=True))
    assert rows == pairwise(FACTORS)
    assert len(set(map(str, CASES))) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunkwise_equals_recurrent(case: Case) -> None:
    inputs = make(case)
    expected = run(recurrent, inputs)
    chunked = run(chunkwise, inputs)
    assert_close(chunked, expected, FLOAT64)
    assert_same(run(delta_rule, inputs), chunked)
    assert_close(run(chunkwise, inputs.to(torch.float32)), expected, FLOAT32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@by_width
def test_half_precision_inputs(case: Case, dtype: torch.dtype) -> None:
    """o has v's dtype, the state is float32, and the results are those for the same rounded inputs in float64."""
    inputs = make(case._replace(decay="mild"))
    keep = dict.fromkeys(("g", "state"), torch.float32)
    low = inputs._replace(leaves={name: x.to(keep.get(name, dtype)) for name, x in inputs.leaves.items()})
    got = run(delta_rule, low)
    assert got["o"].dtype == got["dv"].dtype == dtype
    assert got["final"].dtype == torch.float32
    assert_close(got, run(recurrent, low.to(torch.float64)), TOLERANCE[dtype])


# --- the ladder: each model's recurrence as its paper prints it, on one head and in float64 ---
# Columns: key, value, decay alpha, erase b, write w of one token. States marked [dv, dk] are the transpose of ours.


def gated_deltanet_2(S: Tensor, k: Tensor, v: Tensor, alpha: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """arXiv 2605.22791: S = (I - k (b * k)^T) Diag(alpha) S + k (w * v)^T."""
    return (torch.eye(k.numel()) - torch.outer(k, b * k)) @ torch.diag(alpha) @ S + torch.outer(k, w * v)


def kimi_delta_attention(S: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """arXiv 2510.26692: S = (I - beta k k^T) Diag(alpha) S + beta k v^T."""
    return (torch.eye(k.numel()) - beta * torch.outer(k, k)) @ torch.diag(alpha) @ S + beta * torch.outer(k, v)


def gated_deltanet(S: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """arXiv 2412.06464, [dv, dk]: S = S (alpha (I - beta k k^T)) + beta v k^T."""
    return S @ (alpha * (torch.eye(k.numel()) - beta * torch.outer(k, k))) + beta * torch.outer(v, k)


def deltanet(S: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """arXiv 2406.06484, [dv, dk]: S = S - beta (S k - v) k^T."""
    return S - beta * torch.outer(S @ k - v, k)


def gated_linear_attention(S: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """arXiv 2312.06635: S = Diag(alpha) S + k^T v for row vectors k, v."""
    return torch.diag(alpha) @ S + k[:, None] @ v[None, :]


def mamba_2(S: Tensor, k: Tensor, v: Tensor, alpha: Tensor, delta: Tensor) -> Tensor:
    """arXiv 2405.21060: h = a h + B (delta x)^T; B is the key, C the query. RetNet (arXiv 2307.08621) is a fixed a and delta = 1."""
    return alpha * S + torch.outer(k, delta * v)


def linear_attention(S: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """arXiv 2006.16236 without the normaliser: S = S + phi(k) v^T, with phi inside k."""
    return S + torch.outer(k, v)


# model: (its update, widths of g, b, w, whether w = b, whether its state is [dv, dk])
LADDER: dict[str, tuple[Callable[..., Tensor], tuple[str, str, str], bool, bool]] = {
    "gdn2": (gated_deltanet_2, ("channel", "channel", "channel"), False, False),
    "kda": (kimi_delta_attention, ("channel", "scalar", "absent"), True, False),
    "gdn": (gated_deltanet, ("scalar", "scalar", "absent"), True, True),
    "deltanet": (deltanet, ("absent", "scalar", "absent"), True, True),
    "gla": (gated_linear_attention, ("channel", "absent", "absent"), False, False),
    "mamba2": (mamba_2, ("scalar", "absent", "scalar"), False, False),
    "retnet": (mamba_2, ("scalar", "absent", "absent"), False, False),
    "linear_attention": (linear_attention, ("absent", "absent", "absent"), False, False),
}


@by_implementation
@pytest.mark.parametrize("model", LADDER)
def test_ladder(model: str, function: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    update, (g, b, w), tied, transposed = LADDER[model]
    case = FULL._replace(g=g, b=b, w=w, groups=1, tokens=70, scale=1.0, state=False, decay="-0.05" if model == "retnet" else "mixed")
    arguments = make(case).arguments()
    if tied:
        arguments["w"] = arguments["b"]
    o, final = function(**arguments)
    monkeypatch.setattr(torch, "eye", lambda n, eye=torch.eye: eye(n, dtype=torch.float64))
    gates = [x for x in (arguments.get("g"), arguments.get("b"), None if tied else arguments.get("w")) if x is not None]
    delta = [torch.ones(1, dtype=torch.float64)] if model == "retnet" else []
    for n in range(o.shape[0]):
        for head in range(HEADS):
            S = torch.zeros(final.shape[:-3:-1] if transposed else final.shape[-2:], dtype=torch.float64)
            for t in range(o.shape[1]):
                q, k, v = (arguments[name][n, t, head] for name in "qkv")
                extra = [x[n, t, head].exp() if x is arguments.get("g") else x[n, t, head] for x in gates]
                S = update(S, k, v, *extra, *delta)
                torch.testing.assert_close(o[n, t, head], S @ q if transposed else S.T @ q, rtol=0, atol=1e-12)
            torch.testing.assert_close(final[n, head], S.T if transposed else S, rtol=0, atol=1e-12)


@by_implementation
@pytest.mark.parametrize("gate_heads", ["key", "value"])
def test_grouped_value_heads(function: Callable[..., tuple[Tensor, Tensor]], gate_heads: str) -> None:
    """Value head j reads key head j // (HV // H), with its own v and w; g and b on key heads are shared like q and k."""
    groups = 3
    arguments = make(FULL._replace(groups=groups, tokens=66, g_heads=gate_heads, b_heads=gate_heads)).arguments()
    o, final = function(**arguments)
    for j in range(HEADS * groups):
        own = {name: j if x.shape[2] == HEADS * groups else j // groups for name, x in arguments.items() if name not in ("scale", "state")}
        alone = {name: arguments[name][:, :, head : head + 1] for name, head in own.items()}
        o_j, final_j = function(**alone, scale=arguments["scale"], state=arguments["state"][:, j : j + 1])
        assert_close({"o": o[:, :, j : j + 1], "final": final[:, j : j + 1]}, {"o": o_j, "final": final_j}, FLOAT64)


# --- causality and reproducibility: bitwise ---


def perturbed_after(inputs: Inputs, case: Case, position: int) -> Inputs:
    """Other inputs from `position` on: values a hundred times as large, and decays of -1000."""
    other = make(case._replace(decay="-1000"), seed=1).to(inputs.leaves["q"].dtype)
    leaves = {name: leaf.clone() for name, leaf in inputs.leaves.items()}
    for name in leaves.keys() - {"state"}:
        leaves[name][:, position:] = other.leaves[name][:, position:] * (100 if name == "v" else 1)
    return inputs._replace(leaves=leaves)


def run_before(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, position: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and the gradients of a loss on the tokens before `position`: those before it, and the gradients from it on."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    o, _ = function(**inputs._replace(leaves=leaves).arguments())
    gradients = torch.autograd.grad(o[:, :position].sin().sum(), list(leaves.values()))
    named = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    before = {"o": o[:, :position].detach()} | {name: x if name == "dstate" else x[:, :position] for name, x in named.items()}
    return before, {name: x[:, position:] for name, x in named.items() if name != "dstate"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("position", [1, 15, 16, 63, 64, 65, 128, 150])
@by_implementation
@by_width
def test_causality(case: Case, function: Callable[..., tuple[Tensor, Tensor]], position: int, dtype: torch.dtype) -> None:
    inputs = make(case).to(dtype)
    expected, _ = run_before(function, inputs, position)
    got, later = run_before(function, perturbed_after(inputs, case, position), position)
    assert_same(got, expected)
    assert_same(later, {name: torch.zeros_like(x) for name, x in later.items()})


@by_width
def test_documents_do_not_see_each_other(case: Case) -> None:
    lengths = (70, 3, 64, 1, 62)
    inputs = make(case._replace(layout="packed", documents=lengths)).to(torch.float32)
    changed = inputs._replace(leaves={name: x.clone() for name, x in inputs.leaves.items()})
    start, end = 70, 73
    for name, x in changed.leaves.items():
        part = x[1] if name == "state" else x[:, start:end]
        part.copy_(torch.full_like(part, -1000.0) if name == "g" else 5 * part)
    before, after = run(chunkwise, inputs), run(chunkwise, changed)
    for name in before:
        others = [n for n in range(len(lengths)) if n != 1] if name in ("final", "dstate") else [*range(start), *range(end, sum(lengths))]
        axis = 0 if name in ("final", "dstate") else 1
        rest = torch.tensor(others)
        assert torch.equal(before[name].index_select(axis, rest), after[name].index_select(axis, rest)), name


@by_implementation
def test_two_runs_are_bitwise_equal(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    inputs = make(FULL._replace(layout="packed")).to(torch.float32)
    assert_same(run(function, inputs), run(function, inputs))


# --- splitting, packing, stepping ---


@by_width
def test_packed_equals_separate(case: Case) -> None:
    inputs = make(case._replace(layout="packed"))
    expected = run(delta_rule, inputs)

    def separately(**arguments: Any) -> tuple[Tensor, Tensor]:
        ends = arguments.pop("cu_seqlens").tolist()
        held = inputs._replace(leaves=arguments, views={name: lambda x: x for name in arguments}, options={"scale": arguments.pop("scale")})
        states = arguments["state"].split(1)
        parts = [delta_rule(**slice_tokens(held, *ends[n : n + 2], state)) for n, state in enumerate(states)]
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])

    assert len(document_lengths(case.tokens)) > 4
    assert_close(run(separately, inputs), expected, FLOAT64)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 137, 199])
@by_width
def test_split_anywhere(case: Case, cut: int) -> None:
    inputs = make(case)

    def in_two(**arguments: Any) -> tuple[Tensor, Tensor]:
        held = inputs._replace(leaves=arguments, views={name: lambda x: x for name in arguments}, options={"scale": arguments.pop("scale")})
        first, state = delta_rule(**slice_tokens(held, 0, cut, arguments["state"]))
        second, state = delta_rule(**slice_tokens(held, cut, case.tokens, state))
        return torch.cat([first, second], 1), state

    assert_close(run(in_two, inputs), run(delta_rule, inputs), FLOAT64)


@by_width
def test_steps_equal_one_call(case: Case) -> None:
    inputs = make(case._replace(tokens=70))

    def stepwise(scale: float | None, state: Tensor, **arguments: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(70):
            o, state = delta_rule_step(**{name: x[:, t] for name, x in arguments.items()}, scale=scale, state=state)
            outputs.append(o)
        return torch.stack(outputs, 1), state

    assert_close(run(stepwise, inputs), run(delta_rule, inputs), FLOAT64)


def test_step_in_half_precision() -> None:
    inputs = make(FULL._replace(tokens=1))
    low = inputs._replace(leaves={n: x.to(torch.float32 if n in ("g", "state") else torch.bfloat16) for n, x in inputs.leaves.items()})
    arguments = low.arguments()
    o, state = delta_rule_step(**{n: x[:, 0] if isinstance(x, Tensor) and n != "state" else x for n, x in arguments.items()})
    whole, final = delta_rule(**arguments)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close({"o": o, "final": state}, {"o": whole[:, 0].double(), "final": final.double()}, TOLERANCE[torch.bfloat16])


# --- what the caller's tensors and context may not change ---


def test_autocast_changes_nothing() -> None:
    inputs = make(FULL).to(torch.float32)
    arguments = inputs.arguments()
    token = {n: x[:, 0] if isinstance(x, Tensor) and n != "state" else x for n, x in arguments.items()}
    plain, plain_step = delta_rule(**arguments), delta_rule_step(**token)
    with torch.autocast("cpu", torch.bfloat16):
        inside, inside_step = delta_rule(**arguments), delta_rule_step(**token)
    for got, expected in zip((*inside, *inside_step), (*plain, *plain_step), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@by_implementation
def test_inputs_are_not_modified(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    for layout in ("dense", "packed"):
        inputs = make(FULL._replace(layout=layout))
        arguments = inputs.arguments()
        copies = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
        versions = {name: arguments[name]._version for name in copies}
        run(function, inputs)
        function(**arguments)
        assert_same({name: arguments[name] for name in copies}, copies)
        assert {name: arguments[name]._version for name in copies} == versions


def test_step_does_not_modify_its_state() -> None:
    arguments = {n: x[:, 0] if isinstance(x, Tensor) and n != "state" else x for n, x in make(FULL).arguments().items()}
    before = arguments["state"].clone()
    _, after = delta_rule_step(**arguments)
    assert torch.equal(arguments["state"], before)
    assert after.data_ptr() != arguments["state"].data_ptr()


def test_gradcheck() -> None:
    inputs = make(FULL._replace(tokens=5, sizes=(3, 2), decay="mild"))
    leaves = [leaf.clone().clamp_(max=-0.1) if name == "g" else leaf for name, leaf in inputs.leaves.items()]
    names = list(inputs.leaves)

    def positional(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule(**dict(zip(names, tensors, strict=True)))  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(positional, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


def test_gradcheck_of_tree_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    left, k, g = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 8, 2, 3), (2, 8, 3), (2, 8, 3)))
    g = -g.abs() - 0.01
    assert torch.autograd.gradcheck(tree_scores, [x.requires_grad_() for x in (left, k, g)])
    expected = torch.zeros(2, 8, 2, 8, dtype=torch.float64)
    for r in range(8):
        for s in range(r):
            expected[:, r, :, s] = (left[:, r] * (k[:, s] * g[:, s + 1 : r + 1].sum(1).exp()).unsqueeze(1)).sum(-1)
    torch.testing.assert_close(tree_scores(left, k, g), expected, rtol=0, atol=1e-14)


# --- memory ---


class LargestStorage(TorchDispatchMode):
    """Records the size in bytes of the largest storage that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_no_tensor_of_rows_by_rows_by_channels(layout: str) -> None:
    """A decay per channel must not cost [C, C, K] numbers a chunk: the largest tensor holds the row sets of q and e, 2 K numbers a token and head."""
    case = FULL._replace(groups=1, tokens=256, sizes=(CHUNK, CHUNK), layout=layout, documents=(64, 192) if layout == "packed" else ())
    inputs = make(case).to(torch.float32)
    with LargestStorage() as recorded:
        run(chunkwise, inputs)
    tokens = inputs.leaves["q"].shape[0] * case.tokens
    assert recorded.largest <= 2.5 * tokens * HEADS * CHUNK * 4
