"""The delta rule with several keys, values and queries a token, and with a weight of its own for what a token reads of itself: the reference.

The recurrence is held against the sum over earlier tokens, the chunkwise form against the recurrence, all in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import delta_rule, delta_rule_step
from kernels.delta.reference import chunkwise, recurrent
from recipes.commands import problems
from recipes.commands.problems import Draw, Problem, Shape

pytestmark = pytest.mark.usefixtures("poison")

EXACT = 1e-12
SHAPE = Shape(2, 130, 2, 6, 5, 2)


def run(problem: Problem, function: Callable[..., Any]) -> dict[str, Tensor]:
    return problems.run(problem, partial(function, **problem.options))


def made(ranks: int, *without: str, packed: bool = False) -> Problem:
    """A problem, some of its arguments left out; of 0 ranks one without their axis."""
    problem = problems.ranked_delta_rule(SHAPE, Draw(seed=ranks), ranks=max(ranks, 1), packed=packed)
    leaves = {name: 20 * x if name == "g" else x for name, x in problem.leaves.items() if name not in without}
    cotangents = dict(problem.cotangents)
    if not ranks:
        leaves |= {name: leaves[name].squeeze(2) for name in "qkv"}
        cotangents["o"] = cotangents["o"].squeeze(2)
    return problem._replace(leaves=leaves, cotangents=cotangents)


def by_sums(
    q: Tensor, k: Tensor, v: Tensor, *, state: Tensor, g: Tensor | None = None, w: Tensor | None = None, own: Tensor | None = None, scale: float
) -> Tensor:
    """o_{t,r}: what every token j <= t has written, decayed by exp(g_{j+1} + ... + g_t), read by q_{t,r}. With ranks, without chunks or a state."""
    batch, tokens, _, heads, _ = v.shape
    q, k = (x.repeat_interleave(heads // x.shape[3], 3) for x in (q, k))
    ones = torch.ones(batch, tokens, heads, dtype=v.dtype)
    g, w = (default if x is None else x.squeeze(-1).repeat_interleave(heads // x.shape[2], 2) for x, default in ((g, 0 * ones), (w, ones)))
    weights = (w, w if own is None else own.squeeze(-1))
    written = torch.einsum("btrhk,btrhv->bthkv", k, v)
    outputs = []
    for t in range(tokens):
        read = g[:, : t + 1].sum(1).exp()[..., None, None] * state
        for j in range(t + 1):
            read = read + (g[:, j + 1 : t + 1].sum(1).exp() * weights[j == t][:, j])[..., None, None] * written[:, j]
        outputs.append(scale * torch.einsum("brhk,bhkv->brhv", q[:, t], read))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("without", ["", "own", "g", "w"])
def test_recurrence_is_the_sum(ranks: int, without: str) -> None:
    leaves = {name: x[:, :12] if name != "state" else x for name, x in made(ranks, without).leaves.items()}
    torch.testing.assert_close(recurrent(**leaves, scale=0.7)[0], by_sums(**leaves, scale=0.7), rtol=0, atol=EXACT)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("ranks", "without"), [(0, ()), (0, ("g", "w")), (1, ("own",)), (2, ()), (3, ("state",)), (4, ("own", "w"))])
def test_chunkwise_equals_recurrent(ranks: int, without: tuple[str, ...], packed: bool) -> None:
    problem = made(ranks, *without, packed=packed)
    expected = run(problem, recurrent)
    errors = problems.errors(run(problem, chunkwise), expected)
    assert max(errors.values()) < EXACT, errors
    low = problem.to(torch.bfloat16)
    got = run(low, delta_rule)
    assert got["o"].dtype == torch.bfloat16
    assert max(problems.errors(got, run(low.to(torch.float64), recurrent)).values()) < 1e-2


def test_ranks_are_rows_of_one_state() -> None:
    """Without own: the last row of a token reads what R single rows have made of the state, of which the first decays."""
    problem = made(3, "own")
    o, final = recurrent(**problem.leaves)
    gates = {name: x.repeat_interleave(3, 1) for name, x in problem.leaves.items() if name in "gw"}
    gates["g"] = gates["g"] * (torch.arange(gates["g"].shape[1]) % 3 == 0).view(1, -1, 1, 1)
    rows = {name: x.flatten(1, 2) for name, x in problem.leaves.items() if name in "qkv"}
    single, same = recurrent(**rows, **gates, state=problem.leaves["state"])
    torch.testing.assert_close(o[:, :, -1], single.unflatten(1, (-1, 3))[:, :, -1], rtol=0, atol=EXACT)
    torch.testing.assert_close(final, same, rtol=0, atol=EXACT)


def test_a_step_for_each_token() -> None:
    """With own = w and one rank it is the op that was there before, which `delta_rule_step` takes on with."""
    leaves = made(0, "own").leaves
    o, final = delta_rule(**leaves, own=leaves["w"])
    state, outputs = leaves.pop("state"), []
    for t in range(SHAPE.tokens):
        read, state = delta_rule_step(**{name: x[:, t] for name, x in leaves.items()}, state=state)
        outputs.append(read)
    torch.testing.assert_close(o, torch.stack(outputs, 1), rtol=0, atol=EXACT)
    torch.testing.assert_close(final, state, rtol=0, atol=EXACT)
