"""The delta rule with several keys, values and queries a token, and with a weight of its own for what a token reads of itself, on Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from delta_triton_cases import LOW, TOLERANCE, kernel
from gpu_cases import DEVICE, ON_GPU
from torch import Tensor

from kernels import delta_rule
from kernels.delta.reference import recurrent
from recipes.commands import problems
from recipes.commands.problems import Draw, Problem, Shape

pytestmark = pytest.mark.usefixtures("poison")

SIZE = 64 if ON_GPU else 16
SINGLE = torch.float32
Results = dict[str, Tensor]


def make(
    ranks: int, tokens: int = 70, groups: int = 1, sizes: tuple[int, int] = (SIZE, SIZE), without: tuple[str, ...] = (), **options: Any
) -> Problem:
    """A problem with decays, values and weights of any size, some of its arguments left out."""
    problem = problems.ranked_delta_rule(
        Shape(1 if options.get("packed") else 2, tokens, 2, *sizes, groups), Draw(seed=ranks), ranks=ranks, **options
    )
    leaves = {name: x * 20 if name == "g" else 3 * x - 1 if name in ("w", "own") else x for name, x in problem.leaves.items()}
    return problem._replace(leaves={name: x for name, x in leaves.items() if name not in without})


def one_rank(problem: Problem) -> Problem:
    """It without the axis of its one rank."""
    leaves = {name: x.squeeze(2) if name in ("q", "k", "v") else x for name, x in problem.leaves.items()}
    return problem._replace(leaves=leaves, cotangents={**problem.cotangents, "o": problem.cotangents["o"].squeeze(2)})


CASES: dict[str, tuple[Problem, torch.dtype]] = {
    "own": (one_rank(make(1)), SINGLE),
    "own, packed, groups": (one_rank(make(1, groups=2, packed=True)), SINGLE),
    "own, low": (one_rank(make(1, sizes=(SIZE, 64))), LOW),
    "own alone": (one_rank(make(1, without=("g", "w"))), SINGLE),
    "rank 1": (make(1), SINGLE),
    "rank 2, packed, groups": (make(2, groups=2, packed=True), SINGLE),
    "rank 3": (make(3), SINGLE),
    "rank 4": (make(4), SINGLE),
    "rank 4, low, packed": (make(4, packed=True), LOW),
    "rank 4, blocks of columns": (make(4, tokens=20, sizes=(SIZE, 128)), SINGLE),
    "rank 4, blocks of columns, low": (make(4, tokens=20, sizes=(SIZE, 128)), LOW),
    "rank 4, no own": (make(4, without=("own",)), SINGLE),
    "rank 4, no decay": (make(4, tokens=33, without=("g",)), SINGLE),
    "rank 4, no write gate": (make(4, tokens=33, without=("w",)), SINGLE),
    "rank 4, no state": (make(4, tokens=33, without=("state",)), SINGLE),
    "rank 64": (make(64, tokens=3), SINGLE),
    "one token": (make(4, tokens=1), SINGLE),
    "one channel": (one_rank(make(1, tokens=33, sizes=(1, 1))), SINGLE),  # a gate of one is one number a head
    "rank 4, one key channel": (make(4, tokens=33, sizes=(1, SIZE)), SINGLE),
    "rank 2, one value channel": (make(2, tokens=33, sizes=(SIZE, 1), packed=True), SINGLE),
}
if ON_GPU:
    CASES |= {f"rank {ranks}, {size}, long": (make(ranks, 1000, sizes=(size, size)), LOW) for ranks in (1, 4) for size in (32, 64, 128)}


def run(problem: Problem, function: Callable[..., Any] = kernel, dtype: torch.dtype | None = None, device: torch.device | str = DEVICE) -> Results:
    there = problem.to(dtype or problem.leaves["q"].dtype, device)
    return problems.run(there, partial(function, scale=1.0, **there.options))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str) -> None:
    problem, dtype = CASES[name]
    rounded = problem.to(dtype)
    got, wanted = run(rounded), run(rounded, recurrent, torch.float64, "cpu")
    errors = problems.errors(got, wanted)
    assert max(errors.values()) <= TOLERANCE[dtype], errors
    dtypes = {f"d{name}": x.dtype for name, x in rounded.leaves.items()} | {"o": dtype, "final": torch.float32}
    assert {name: x.dtype for name, x in got.items()} == dtypes


@pytest.mark.parametrize("ranks", [1, 4])
def test_causality(ranks: int) -> None:
    """Outputs and gradients of the past do not depend on what follows, nor on the last weight there: not on values, not on decays of -1000."""
    problem = make(ranks, tokens=70, without=("state",)).to(SINGLE, DEVICE)
    for position in (1, 16 // ranks, 64 // ranks, 66):
        cotangents = {"o": problem.cotangents["o"].clone(), "final": torch.zeros_like(problem.cotangents["final"])}
        cotangents["o"][:, position:] = 0
        before = run(problem._replace(cotangents=cotangents))
        after = run(problem._replace(leaves=changed_from(problem, position, 1000.0, tuple(problem.leaves)), cotangents=cotangents))
        for name in before.keys() - {"final"}:
            assert torch.equal(after[name][:, :position], before[name][:, :position]), (position, name)
        assert not after["dw"][:, position - 1 :].any()


@pytest.mark.parametrize("ranks", [1, 4])
def test_what_is_no_number_stays_behind(ranks: int) -> None:
    """A decay or weight that is NaN: of the past nothing changes. (Rows of q, k and v meet in products, which a NaN spreads through.)"""
    problem = make(ranks, tokens=70, without=("state",)).to(SINGLE, DEVICE)
    for position in (1, 64 // ranks, 66):
        leaves = changed_from(problem, position, float("nan"), ("g", "own", "w"))
        assert torch.equal(raw_output(leaves)[:, :position], raw_output(problem.leaves)[:, :position]), position


def changed_from(problem: Problem, position: int, factor: float, names: tuple[str, ...]) -> Results:
    """The leaves, some of them multiplied from a token on; the write gate from the one before on."""
    leaves = {name: x.clone() for name, x in problem.leaves.items()}
    for name in names:
        leaves[name][:, position - (name == "w") :] *= factor
    return leaves


def raw_output(leaves: Results) -> Tensor:
    """The op itself, which does not look at values."""
    qkv, ranks = (leaves[name].flatten(1, 2) for name in ("q", "k", "v")), leaves["q"].shape[2]
    o, *_ = torch.ops.lightning_mixers.delta_rule(*qkv, leaves["g"], None, leaves["w"], leaves["own"], 1.0, None, None, ranks, False)
    return o.unflatten(1, (-1, ranks))


@pytest.mark.parametrize("ranks", [1, 4])
def test_two_runs_are_bitwise_equal(ranks: int) -> None:
    problem = make(ranks, groups=2, packed=True).to(LOW)
    first, second = run(problem), run(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_kernels_refuse() -> None:
    wide, many = (torch.rand(1, 2, ranks, 1, size, device=DEVICE) for ranks, size in ((2, 129), (65, 8)))
    for x, why in ((wide, "must be at most 128 with ranks or own"), (many, "R = 65 is above 64")):
        with pytest.raises(NotImplementedError, match=why):
            kernel(x, x, x)
        assert torch.equal(delta_rule(x, x, x)[0], delta_rule(x, x, x, backend="reference")[0])
