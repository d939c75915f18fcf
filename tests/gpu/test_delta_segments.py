"""Few long sequences without erase: their segments go side by side, each from what those before it add (kernels/delta/README.md, section 7)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from delta_triton_cases import LOW, TOLERANCE, other_after
from delta_triton_cases import run_problem as run
from gpu_cases import DEVICE, ON_GPU
from torch import Tensor

from kernels import delta_rule
from kernels.delta import scan
from kernels.delta.reference import recurrent
from kernels.delta.scan import Segments
from recipes.commands import problems
from recipes.commands.problems import Draw, Problem, Shape

pytestmark = pytest.mark.usefixtures("poison")

SIZE = 64 if ON_GPU else 16
SINGLE = torch.float32


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every sequence is divided, into segments of one chunk or two; the numbers of segments that were taken."""
    seen: list[int] = []
    rule = scan.segments_of

    def watched(problem: Any) -> Segments:
        segments = rule(problem)
        seen.append(segments.number)
        return segments

    monkeypatch.setattr(scan, "how_many", lambda chunks, _states: min(chunks, 3))
    monkeypatch.setattr(scan, "segments_of", watched)
    yield seen
    assert seen


def make(
    tokens: int = 150, ranks: int = 0, groups: int = 1, sizes: tuple[int, int] = (SIZE, SIZE), batch: int = 2, without: tuple[str, ...] = (),
    decay: float = 5.0,
) -> Problem:  # fmt: skip
    """Decays between none and many thousand times, write gates of any sign; with ranks a weight of a token's own too."""
    shape, draw = Shape(batch, tokens, 2, *sizes, groups), Draw(seed=tokens + ranks)
    ranked = partial(problems.ranked_delta_rule, ranks=ranks)
    problem = ranked(shape, draw) if ranks else problems.delta_rule("mamba2", shape, draw, state=True)
    leaves = {name: x * decay if name == "g" else 3 * x - 1 if name in ("w", "own") else x for name, x in problem.leaves.items()}
    return problem._replace(leaves={name: x for name, x in leaves.items() if name not in without})


def channels(problem: Problem) -> Problem:
    """With a write gate per channel."""
    return problem._replace(leaves={**problem.leaves, "w": Draw(seed=3).uniform(*problem.leaves["v"].shape)})


CASES: dict[str, tuple[Problem, torch.dtype]] = {
    "gates per head": (make(), SINGLE),
    "segments of two chunks, a last one of one token": (make(257, groups=2, batch=1), SINGLE),
    "slow decays, segments of two chunks": (make(257, groups=2, batch=1, decay=0.05), SINGLE),
    "slow decays, rank 4": (make(70, ranks=4, batch=1, decay=0.2), SINGLE),
    "gates per channel": (channels(make()), SINGLE),
    "no gates": (make(without=("g", "w")), SINGLE),
    "no state": (make(without=("state",)), SINGLE),
    "blocks of columns": (make(130, sizes=(SIZE, 128), batch=1), SINGLE),
    "low": (make(sizes=(SIZE, 64)), LOW),
    "rank 1": (make(ranks=1), SINGLE),
    "rank 4": (make(40, ranks=4), SINGLE),
    "rank 4, low": (make(40, ranks=4), LOW),
}
if ON_GPU:
    CASES |= {
        f"{k} x {v}, {t}": (make(130, sizes=(k, v)), t) for k, v in ((32, 32), (64, 64), (128, 64), (64, 128), (128, 128)) for t in (LOW, SINGLE)
    }


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str, divided: list[int]) -> None:
    problem, dtype = CASES[name]
    rounded = problem.to(dtype)
    got = run(rounded)
    assert divided == [3, 3]
    errors = problems.errors(got, run(rounded, recurrent, torch.float64, "cpu"))
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("ranks", [0, 4])
def test_causality(ranks: int, divided: list[int]) -> None:
    """To the bit: outputs and gradients of the past do not depend on what follows, inside of a segment and at its border, nor on decays of -5000."""
    problem = make(40 if ranks else 150, ranks=ranks, without=("state",)).to(SINGLE, DEVICE)
    for position in (1, 16, 17, 33) if ranks else (1, 64, 65, 129):
        before, after = (run(one) for one in other_after(problem, position))
        for name in before.keys() - {"final"}:
            assert torch.equal(after[name][:, :position], before[name][:, :position]), (position, name)
    assert set(divided) == {3}


def test_runs_repeat_to_the_bit_and_keep_nothing_without_gradients(divided: list[int]) -> None:
    problem = make(groups=2).to(LOW)
    first, second = run(problem), run(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = run(problem._replace(cotangents={}))
    assert all(torch.equal(alone[name], first[name]) for name in alone)
    assert divided == [3] * 5


def test_packed_sequences_are_whole(divided: list[int]) -> None:
    problem = problems.delta_rule("mamba2", Shape(1, 150, 2, SIZE, SIZE), Draw(), packed=True).to(SINGLE)
    errors = problems.errors(run(problem), run(problem, recurrent, torch.float64, "cpu"))
    assert max(errors.values()) <= TOLERANCE[SINGLE], errors
    assert divided == [1, 1]


@pytest.mark.parametrize("write", [True, False])
def test_gradients_of_all_states(write: bool, divided: list[int]) -> None:
    """What the backward pass of heads that share keys begins with: the gradient of the state behind every chunk, and the numbers of its rows."""
    problem = make(150, groups=3, batch=1, decay=0.2, without=("state",) if write else ("state", "w")).to(LOW, DEVICE)
    leaves, (do, dfinal) = problem.leaves, (problem.cotangents[name] for name in ("o", "final"))
    launched, _ = scan._problem(*(leaves.get(name) for name in "qkvgw"), None, None, 1)  # type: ignore[arg-type]
    dinitial = torch.empty_like(dfinal)
    dS, numbers = scan.state_gradients(launched, 0.5, do, dfinal, dinitial)
    exact = {name: x.double().cpu() for name, x in leaves.items()}
    wanted = {"dinitial": behind(exact, do, dfinal, 0)} | {f"chunk {n}": behind(exact, do, dfinal, end)[0] for n, end in enumerate((64, 128, 150))}
    sums = torch.nn.functional.pad(exact["g"][0, :, :, 0], (0, 0, 0, 42)).unflatten(0, (3, 64)).cumsum(1).transpose(1, 2) / math.log(2)
    w = exact["w"][0, :, :, 0] if write else torch.ones(150, 6).double()
    rows = [sums, torch.nn.functional.pad(w, (0, 0, 0, 42), value=0.0 if write else 1.0).unflatten(0, (3, 64)).transpose(1, 2)]
    rows += [(sums[..., -1:] - sums).exp2(), sums[..., -1:].exp2().expand_as(sums)]
    got = {"dinitial": dinitial, "numbers": numbers} | {f"chunk {n}": x for n, x in enumerate(dS)}
    errors = problems.errors({name: x.cpu() for name, x in got.items()}, {**wanted, "numbers": torch.stack(rows, 2)})
    assert len(errors) == 5
    assert max(errors.values()) <= TOLERANCE[LOW], errors
    assert divided == [3]


def behind(leaves: dict[str, Tensor], do: Tensor, dfinal: Tensor, token: int) -> Tensor:
    """The gradient of the state before a token, in float64."""
    state = torch.zeros(dfinal.shape, dtype=torch.float64, requires_grad=True)
    if token == do.shape[1]:
        return dfinal.double().cpu()
    o, final = recurrent(**{name: x[:, token:] for name, x in leaves.items()}, scale=0.5, state=state)
    (found,) = torch.autograd.grad((o * do[:, token:].double().cpu()).sum() + (final * dfinal.double().cpu()).sum(), state)
    return found


@pytest.mark.parametrize(
    ("chunks", "heads", "groups"),
    [(256, 72, 1), (1024, 72, 1), (132, 72, 1), (66, 72, 2), (64, 72, 2), (16, 72, 8), (1, 72, 18), (1, 9, 2), (1, 7, 1), (1, 2, 1), (100, 2, 1)],
)
def test_heads_that_share_a_key_fill_the_gpu_once_in_groups_of_four_or_more(chunks: int, heads: int, groups: int) -> None:
    assert scan.how_many_groups(chunks, heads) == groups


@pytest.mark.parametrize(
    ("sequences", "heads", "chunks", "segments"),
    [
        (1, 72, 1024, (32, 32)),
        (2, 72, 512, (16, 32)),
        (4, 72, 256, (8, 32)),
        (8, 72, 128, (4, 32)),
        (9, 72, 128, (1, 128)),  # states enough
        (1, 24, 63, (1, 63)),  # too short
        (1, 24, 64, (8, 8)),
        (4, 72, 64, (8, 8)),
        (1, 1, 1000, (31, 33)),
        (1, 1, 97, (9, 11)),  # the last one of 9
        (1, 1, 101, (10, 11)),  # the last one of 2
        (1, 1, 1, (1, 1)),
    ],
)
def test_how_sequences_are_divided(sequences: int, heads: int, chunks: int, segments: tuple[int, int]) -> None:
    problem = SimpleNamespace(lengths={"per_sequence": chunks}, settings={"PACKED": False}, sequences=sequences, v_heads=heads)
    number, each = scan.segments_of(problem)  # type: ignore[arg-type]
    assert (number, each) == segments
    assert (number - 1) * each < chunks <= number * each  # none is empty


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_long_sequence(size: int, dtype: torch.dtype) -> None:
    """As it is divided when nobody looks; 20,000 tokens and three heads against the chunkwise form in float64."""
    problem = problems.delta_rule("mamba2", Shape(1, 20_000, 3, size, size), Draw(seed=1), state=True).to(dtype)
    errors = problems.errors(run(problem), run(problem, partial(delta_rule, backend="reference"), torch.float64))
    assert max(errors.values()) <= TOLERANCE[dtype], errors
