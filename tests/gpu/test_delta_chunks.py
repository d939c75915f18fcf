"""Heads that share queries and keys, without erase, in 16 bits: on Hopper their backward pass is in halves (kernels/delta/README.md, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from delta_triton_cases import TOLERANCE, compilations, kernel, other_after
from delta_triton_cases import run_problem as run
from gpu_cases import DEVICE, ON_GPU

from kernels import delta_rule, tiles
from kernels.delta import scan
from kernels.delta.reference import recurrent
from recipes.commands import problems
from recipes.commands.problems import Draw, Problem, Shape

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

HOPPER = ON_GPU and tiles.architecture(torch.device("cuda")) == "sm_90"
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the backward passes were in halves."""
    seen: list[bool] = []
    rule = scan.by_chunks

    def watched(*arguments: Any) -> bool:
        seen.append(rule(*arguments))
        return seen[-1]

    monkeypatch.setattr(scan, "by_chunks", watched)
    return seen


def make(
    k: int = 64, tokens: int = 150, groups: int = 4, heads: int = 2, batch: int = 2, v: int = 64, without: tuple[str, ...] = (), decay: float = 5.0,
    extreme: bool = False, packed: bool = False,
) -> Problem:  # fmt: skip
    """Decays between none and many thousand times, write gates of any sign."""
    shape = Shape(batch, tokens, heads, k, v, groups)
    problem = problems.delta_rule("mamba2", shape, Draw(seed=tokens + k), extreme=extreme, packed=packed, state=True)
    leaves = {name: x if extreme else x * decay if name == "g" else 3 * x - 1 if name == "w" else x for name, x in problem.leaves.items()}
    return problem._replace(leaves={name: x for name, x in leaves.items() if name not in without})


def one_for_all(problem: Problem) -> Problem:
    """With the decay of a key's first value head for all of them."""
    return problem._replace(
        leaves={**problem.leaves, "g": problem.leaves["g"][:, :, :: problem.leaves["v"].shape[2] // problem.leaves["q"].shape[2]]}
    )


def strided(problem: Problem) -> Problem:
    """Queries, keys and values that are columns of one tensor, as a projection leaves them; those of values begin at no multiple of 16 bytes."""
    leaves = dict(problem.leaves)
    for name, more in (("q", 16), ("k", 8), ("v", 3)):
        x = leaves[name]
        wide = torch.zeros(*x.shape[:2], x.shape[2] * x.shape[3] + 32, dtype=x.dtype, device=x.device)
        leaves[name] = wide[..., more : more + x.shape[2] * x.shape[3]].copy_(x.flatten(2)).unflatten(-1, x.shape[2:])
    return problem._replace(leaves=leaves)


CASES: dict[str, Callable[[int], Problem]] = {
    "two sequences": make,
    "a last chunk of one token": partial(make, tokens=65, heads=1),
    "one token": partial(make, tokens=1, heads=1, batch=1),
    "groups of heads, not alike": partial(make, tokens=300, groups=9),
    "many heads": partial(make, groups=72, heads=1, batch=1),
    "extreme gates": partial(make, tokens=200, extreme=True),
    "slow decays": partial(make, tokens=700, decay=0.05),
    "a write gate in 16 bits": lambda k: make(k)._replace(wide=frozenset({"g", "state", "final"})),
    "no write gate, no state": partial(make, without=("w", "state")),
    "documents": partial(make, packed=True),
    "documents, extreme gates": partial(make, groups=9, packed=True, extreme=True),
    "one decay for all": lambda k: one_for_all(make(k, groups=8)),
}


def agrees(problem: Problem, dtype: torch.dtype) -> None:
    rounded = problem.to(dtype)
    errors = problems.errors(run(rounded), run(rounded, recurrent, torch.float64, "cpu"))
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str, k: int, dtype: torch.dtype, halved: list[bool]) -> None:
    agrees(CASES[name](k), dtype)
    assert halved == [HOPPER]


@pytest.mark.parametrize("k", [64, 128])
def test_strided_inputs(k: int, halved: list[bool]) -> None:
    problem = make(k).to(torch.bfloat16, DEVICE)
    there, straight = run(strided(problem)), run(problem)
    assert all(torch.equal(there[name], straight[name]) for name in straight)
    assert halved == [HOPPER] * 2


@pytest.mark.parametrize("k", [64, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_long_sequence(k: int, dtype: torch.dtype, halved: list[bool]) -> None:
    """In segments, with decays so slow that they reach from one to the next, against the chunkwise form in float64."""
    problem = make(k, tokens=20_000, heads=1, batch=1, decay=0.004, without=("w",)).to(dtype)
    errors = problems.errors(run(problem), run(problem, partial(delta_rule, backend="reference"), torch.float64))
    assert max(errors.values()) <= TOLERANCE[dtype], errors
    assert halved[0] == HOPPER


@pytest.mark.parametrize(("k", "groups"), [(64, 4), (128, 4), (64, 9), (128, 72)])
def test_causality(k: int, groups: int, halved: list[bool]) -> None:
    """To the bit: outputs and gradients of the past do not depend on what follows, with decays of -500 among it; later ones get exact zeros."""
    problem = make(k, groups=groups, heads=1, without=("state",)).to(torch.bfloat16, DEVICE)
    for position in (1, 63, 64, 65, 129):
        before, after = (run(one) for one in other_after(problem, position))
        for name in before.keys() - {"final"}:
            assert torch.equal(after[name][:, :position], before[name][:, :position]), (position, name)
            assert name == "o" or not after[name][:, position:].any(), (position, name)
    assert halved == [HOPPER] * 10


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", [64, 128])
def test_runs_repeat_to_the_bit(k: int, packed: bool) -> None:
    problem = make(k, tokens=700, groups=9, packed=packed).to(torch.bfloat16, DEVICE)
    first = run(problem)
    for _ in range(3):
        again = run(problem)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("packed", [False, True])
def test_lengths_compile_nothing_and_are_not_waited_for(packed: bool, halved: list[bool]) -> None:
    """Of few chunks, whose heads are in groups, and of many."""

    def cut(length: int, documents: int) -> Problem:
        problem = make(tokens=length, groups=9, heads=1, batch=1 if packed else documents, without=("state",)).to(torch.bfloat16, DEVICE)
        if not packed:
            return problem
        ends = torch.linspace(0, length, documents + 1, device=DEVICE).to(torch.int32)
        final = torch.zeros(documents, *problem.cotangents["final"].shape[1:], device=DEVICE)
        return problem._replace(options={"cu_seqlens": ends}, cotangents={**problem.cotangents, "final": final})

    run(cut(8000, 3))  # all kernels are loaded
    several = [cut(length, documents) for length, documents in ((64, 1), (65, 4), (1000, 5), (4096, 8), (20_000, 1))]
    with compilations() as compiled:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for problem in several:
                problems.run(problem, partial(kernel, **problem.options))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert compiled == []
    assert halved == [HOPPER] * 6


@pytest.mark.parametrize(
    ("change", "halves"),
    [
        ({}, True),
        ({"groups": 2}, True),
        ({"groups": 1}, False),
        ({"v": 128}, False),
        ({"k": 32}, False),
        ({"without": ("g",)}, False),
        ({"groups": 8}, True),
    ],
)
def test_which_problems_are_halved(change: dict[str, Any], halves: bool, halved: list[bool]) -> None:
    """Those that are not take the launch that makes all, with the same results."""
    agrees(make(**change), torch.bfloat16)
    assert halved == [HOPPER and halves]


def test_neither_float32_nor_own_nor_a_write_gate_per_channel_is_halved(halved: list[bool]) -> None:
    plain = make()
    agrees(plain, torch.float32)
    agrees(plain._replace(leaves={**plain.leaves, "w": Draw().uniform(*plain.leaves["v"].shape)}), torch.bfloat16)
    agrees(problems.ranked_delta_rule(Shape(2, 150, 2, 64, 64, 4), Draw(), ranks=1), torch.bfloat16)
    assert halved == [False] * 3
