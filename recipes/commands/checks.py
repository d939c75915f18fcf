"""What proves the kernels on a machine: a table of small problems, each run on the backend that a training would use and held against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import backend as backends
from kernels.delta.reference import recurrent
from recipes.commands import problems
from recipes.commands.problems import Draw, Problem, Shape

# of the largest entry of each tensor: above what rounding does in these dtypes (docs/numerics.md), far below what a wrong kernel does
TOLERANCE = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
HEAD_SIZES = (32, 64, 128, 256)
FULL_SIZES, MOST_SIZES = (128,), (64, 128)
LONG = 4096  # tokens of the one long sequence
# Value columns of all sequences and heads: tiles of the serial passes depend on them, on sm_90 others from 2,113, 4,225 and 8,449 on.
COLUMNS = (2048, 4096, 8192, 16384)
MANY = ("gdn2", "kda", "gdn", "deltanet", "gla")  # whose serial passes are launches of their own


INFERENCE = ", without gradients"


class Check(NamedTuple):
    """One problem for each head size and dtype."""

    name: str
    op: str
    make: Callable[..., Problem]  # of a head size, in float64 on the CPU
    sizes: tuple[int, ...] = FULL_SIZES
    mixer: str | None = None  # whose gate widths these are; None: of no one mixer
    of_heads: bool = False  # `make` takes the size of values too, so that a model's own heads can be tried
    v_size: int | None = None  # of values, where it is not that of keys and queries


class Trial(NamedTuple):
    """A check at one head size in one dtype."""

    check: Check
    size: int
    dtype: torch.dtype
    v_size: int | None = None  # of values, where it is another

    @property
    def label(self) -> str:
        size = str(self.size) if self.v_size in (None, self.size) else f"{self.size} x {self.v_size}"
        return f"{self.check.op}: {self.check.name}, head size {size}, {str(self.dtype).removeprefix('torch.')}"

    def problem(self) -> Problem:
        """In the trial's dtype, on the CPU."""
        sizes = (self.size,) if self.v_size is None else (self.size, self.v_size)
        return self.check.make(*sizes).to(self.dtype)


class Result(NamedTuple):
    """What came of a trial."""

    label: str
    passed: bool
    worst: float | None  # error of the worst tensor; None if nothing was computed
    note: str  # the worst tensor, why nothing was computed, or what was raised


def _small(n: int, v: int | None = None, groups: int = 1) -> Shape:
    return Shape(2, 130, 2, n, v or n, groups)


def _layer(size: int) -> Shape:
    """As wide as a layer: the tiles of some ops depend on all channels."""
    return Shape(1, 150, 16, size, size)


def _delta(n: int, v: int | None = None, *, mixer: str) -> Problem:
    return problems.delta_rule(mixer, _small(n, v), Draw(), extreme=True, state=True)


def _packed(n: int, v: int | None = None, *, mixer: str) -> Problem:
    return problems.delta_rule(mixer, _small(n, v, 2), Draw(seed=1), packed=True)


def _shared(n: int, v: int, *, packed: bool) -> Problem:
    """Nine value heads a key, as wide as Mamba-2's: on Hopper the backward pass has kernels of its own for them."""
    return problems.delta_rule("mamba2", _small(n, v, 9), Draw(seed=8), extreme=True, packed=packed, state=True)


def _long(n: int, v: int | None = None, *, mixer: str, groups: int = 1) -> Problem:
    """Few programs in the serial passes, and many chunks."""
    return _remembered(problems.delta_rule(mixer, Shape(1, LONG, 1, n, v or n, groups), Draw(seed=2)))


def _long_own(n: int, v: int | None = None, *, ranks: int) -> Problem:
    return _remembered(problems.ranked_delta_rule(Shape(1, LONG // ranks, 1, n, v or n), Draw(seed=7), ranks=ranks))


def _remembered(problem: Problem) -> Problem:
    """With decays so slow (exp(-1) in 500 tokens) that what a segment hands on to the next is a large part of its results."""
    return problem._replace(leaves={name: 0.04 * x if name == "g" else x for name, x in problem.leaves.items()})


def _unequal(n: int, *, mixer: str, packed: bool = False) -> Problem:
    """K != V, each half of the other's: kernels of their own."""
    k_dim, v_dim = (n // 2, n) if mixer == "gla" else (n, n // 2)
    return problems.delta_rule(mixer, _small(k_dim, v_dim, 2), Draw(seed=5), extreme=True, packed=packed, state=True)


def _many(n: int, v: int | None = None, *, mixer: str, columns: int) -> Problem:
    return problems.delta_rule(mixer, Shape(max(1, columns // (4 * (v or n))), 70, 4, n, v or n), Draw(seed=4))


def _step(n: int, *, batch: int) -> Problem:
    return problems.delta_rule_step("gdn2", Shape(batch, 1, 16, n, n), Draw(seed=3))


def _taps(make: Callable[..., Problem], n: int, *, taps: int) -> Problem:
    return make(_layer(n), Draw(seed=taps), taps=taps)


def _ranked(make: Callable[..., Problem], n: int, *, ranks: int) -> Problem:
    return make(_layer(n), Draw(seed=ranks), ranks=ranks)


def _own(n: int, v: int | None = None, *, ranks: int, packed: bool) -> Problem:
    return problems.ranked_delta_rule(_small(n, v), Draw(seed=6), ranks=ranks, packed=packed)


def _whole(n: int, *, heads: int) -> Problem:
    return problems.rms_norm(Shape(1, 150, heads, n, n), Draw())


def _gates(n: int, *, mixer: str) -> Problem:
    return problems.delta_gates(mixer, _layer(n), Draw(), extreme=True)


def _table() -> Iterator[Check]:
    for mixer in problems.WIDTHS:
        widest = HEAD_SIZES if mixer in ("gdn2", "mamba2") else MOST_SIZES
        yield Check(f"{mixer}, extreme gates, a state", "delta_rule", partial(_delta, mixer=mixer), widest, mixer, of_heads=True)
        yield Check(f"{mixer}, packed, grouped heads", "delta_rule", partial(_packed, mixer=mixer), MOST_SIZES, mixer, of_heads=True)
        for columns in COLUMNS if mixer in MANY else COLUMNS[:1]:
            make = partial(_many, mixer=mixer, columns=columns)
            yield Check(f"{mixer}, {columns:,} columns of values", "delta_rule", make, MOST_SIZES, mixer, of_heads=True)
    for mixer in ("gdn2", "mamba2", "linear_attention"):
        yield Check(f"{mixer}, one long sequence", "delta_rule", partial(_long, mixer=mixer), mixer=mixer, of_heads=True)
    for mixer in ("gdn2", "gla", "mamba2"):
        yield Check(f"{mixer}, K and V unequal", "delta_rule", partial(_unequal, mixer=mixer), MOST_SIZES, mixer)
    for packed in (False, True):
        name = "mamba2, heads that share keys" + ", packed" * packed
        yield Check(name, "delta_rule", partial(_shared, packed=packed), MOST_SIZES, "mamba2", of_heads=True, v_size=64)
    make = partial(_long, mixer="mamba2", groups=4)
    yield Check("mamba2, heads that share keys, one long sequence", "delta_rule", make, mixer="mamba2", of_heads=True, v_size=64)
    yield Check("mamba2, K and V unequal, packed", "delta_rule", partial(_unequal, mixer="mamba2", packed=True), MOST_SIZES, "mamba2")
    yield Check("gdn2, one token", "delta_rule_step", lambda n: problems.delta_rule_step("gdn2", _small(n), Draw(), extreme=True), HEAD_SIZES)
    for batch in (8, 72):  # of 16 heads: the kernel's blocks depend on how many states there are
        yield Check(f"gdn2, one token of {batch} sequences", "delta_rule_step", partial(_step, batch=batch))
    yield Check("kda, one token", "delta_rule_step", lambda n: problems.delta_rule_step("kda", _small(n, groups=2), Draw()))
    yield Check("SiLU and norm, packed", "causal_conv1d", lambda n: problems.causal_conv1d(_layer(n), Draw(), packed=True, state=True), HEAD_SIZES)
    yield Check("SiLU", "causal_conv1d", lambda n: problems.causal_conv1d(_layer(n), Draw(), norm=False))
    for taps in (2, 3):
        yield Check(f"{taps} taps", "causal_conv1d", partial(_taps, problems.causal_conv1d, taps=taps))
        yield Check(f"{taps} taps, one token", "causal_conv1d_step", partial(_taps, problems.causal_conv1d_step, taps=taps))
    yield Check("one token", "causal_conv1d_step", lambda n: problems.causal_conv1d_step(_layer(n), Draw()), HEAD_SIZES)
    for mixer in ("gdn2", "kda", "gdn"):
        yield Check(f"{mixer}, extreme inputs", "delta_gates", partial(_gates, mixer=mixer), HEAD_SIZES if mixer == "gdn2" else FULL_SIZES)
    yield Check("SiLU gate", "gated_rms_norm", lambda n: problems.gated_rms_norm(_layer(n), Draw()), HEAD_SIZES)
    for heads in (16, 36):  # all channels of a layer, 2,048 and 4,608
        yield Check(f"no gate, {heads} heads together", "gated_rms_norm", partial(_whole, heads=heads), mixer="mamba2")
    yield Check("queries and keys", "l2_norm", lambda n: problems.l2_norm(_layer(n), Draw()), HEAD_SIZES)
    for ranks in (1, 4):
        yield Check(f"mamba3, rank {ranks}", "delta_rule", partial(_own, ranks=ranks, packed=False), MOST_SIZES, "mamba3", of_heads=True)
        yield Check(f"mamba3, rank {ranks}, packed", "delta_rule", partial(_own, ranks=ranks, packed=True), mixer="mamba3", of_heads=True)
        yield Check(f"mamba3, rank {ranks}, one long sequence", "delta_rule", partial(_long_own, ranks=ranks), mixer="mamba3", of_heads=True)
        yield Check(f"mamba3, rank {ranks}", "gated_skip", partial(_ranked, problems.gated_skip, ranks=ranks), HEAD_SIZES)
    yield Check("mamba3, rank 4", "rank_values", partial(_ranked, problems.rank_values, ranks=4))
    yield Check("mamba3, packed", "rotary_keys", lambda n: problems.rotary_keys(_layer(n), Draw(), ranks=1, packed=True), HEAD_SIZES)
    yield Check("mamba3, rank 4", "rotary_keys", partial(_ranked, problems.rotary_keys, ranks=4), HEAD_SIZES)


CHECKS: tuple[Check, ...] = tuple(_table())
MIXERS = frozenset(check.mixer for check in CHECKS if check.mixer)  # which have checks of their own


def ops() -> list[str]:
    """The public ops that this version has."""
    return [op for op in problems.OUTPUTS if hasattr(kernels, op)]


def select(
    found: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = tuple(TOLERANCE),
    sizes: Iterable[int] | None = None,
    mixers: Iterable[str] | None = None,
    heads: Mapping[str, Iterable[tuple[int, int]]] | None = None,
) -> list[Trial]:
    """The trials of some ops (None: all there are), dtypes, head sizes and mixers (None: all).

    `heads`: K and V of a mixer's heads, which then take the place of the sizes that `delta_rule` is tried with for it. float16 shares its tiles with
    bfloat16 and is tried at one head size only, unless it is the only dtype.
    """
    legal, wanted, chosen = set(ops() if found is None else found), tuple(dtypes), None if mixers is None else set(mixers)
    of = [check for check in CHECKS if check.op in legal and (check.mixer is None or chosen is None or check.mixer in chosen)]
    near = None if sizes is None else {min((n for n in HEAD_SIZES if n >= size), default=max(HEAD_SIZES)) for size in sizes}
    trials = []
    for check in of:
        exact = sorted(set((heads or {}).get(check.mixer or "", ()))) if check.op == "delta_rule" else []
        if check.of_heads:
            trials += [Trial(check, k, dtype, v) for k, v in exact for dtype in wanted]
        listed = [] if exact else [size for size in check.sizes if near is None or size in near or len(check.sizes) == 1]
        trials += [
            Trial(check, size, dtype, check.v_size)
            for size in listed
            for dtype in wanted
            if len(wanted) == 1 or dtype != torch.float16 or size in FULL_SIZES
        ]
    return trials


def find(op: str, name: str, size: int, dtype: torch.dtype, v_size: int | None) -> Trial:
    """The trial of an op's check."""
    return Trial(next(check for check in CHECKS if (check.op, check.name) == (op, name)), size, dtype, v_size)


def oracle(problem: Problem) -> dict[str, Tensor]:
    """The float64 results: the recurrence itself for the delta rule, the plain-torch reference for the others."""
    exact = problem.to(torch.float64)
    function = problems.call(exact, "reference")
    if problem.op == "delta_rule" and exact.leaves["q"].shape[1] < LONG:  # beyond, the reference, which `make test` holds against the recurrence
        return problems.run(exact, lambda **leaves: recurrent(**leaves, **exact.options))
    return problems.run(exact, function)


def attempt(trial: Trial, device: torch.device) -> Result:
    """Runs a trial on `device`, with gradients and without: on its kernels if they take it, else on the reference."""
    problem = trial.problem()
    wanted = "auto" if backends.why_not(trial.check.op, device) or device.type == "cpu" else "triton"
    there = problem.to(trial.dtype, device)
    try:
        got = both_ways(there, problems.call(there, wanted))
    except backends.RefusedError as error:  # the kernels refuse this dtype or size: "auto" takes the reference there
        return Result(trial.label, True, None, f"runs on the reference: {error}")
    except Exception as error:  # a compiler that fails raises whatever it likes; it is the answer that was asked for
        return Result(trial.label, False, None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    exact = oracle(problem)
    if problem.cotangents:
        exact |= {name + INFERENCE: exact[name] for name in problems.OUTPUTS[problem.op] if name in exact}
    return judge(trial, {name: x.cpu() for name, x in got.items()}, exact)


def both_ways(problem: Problem, function: Callable[..., Any]) -> dict[str, Tensor]:
    """As `problems.run`, and the outputs of a second call that keeps nothing for gradients: some kernels are others then."""
    results = problems.run(problem, function)
    if problem.cotangents:
        outputs = problems.run(problem._replace(cotangents={}), function)
        results |= {name + INFERENCE: x for name, x in outputs.items()}
    return results


def judge(trial: Trial, got: dict[str, Tensor], expected: dict[str, Tensor]) -> Result:
    """The result of a trial that ran."""
    errors = problems.errors(got, expected)
    worst = max(errors, key=lambda name: errors[name])
    return Result(trial.label, errors[worst] <= TOLERANCE[trial.dtype], errors[worst], worst)


def quick() -> list[Trial]:
    """Trials for a machine without a GPU: every check once, on the reference, with small heads."""
    return [Trial(check, 16, torch.float32, check.v_size and 16) for check in CHECKS if check.op in ops()]
