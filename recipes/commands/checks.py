"""What proves the kernels on a machine: a table of small problems, each run on the backend that a training would use and held against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

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
FULL_SIZES = (128,)
LONG = 4096  # tokens of the one long sequence
MANY = ("gdn2", "kda", "gdn", "deltanet", "gla")  # whose serial passes are launches of their own


class Check(NamedTuple):
    """One problem for each head size and dtype."""

    name: str
    op: str
    make: Callable[[int], Problem]  # of a head size, in float64 on the CPU
    sizes: tuple[int, ...] = FULL_SIZES
    mixer: str | None = None  # whose gate widths these are; None: of no one mixer


class Trial(NamedTuple):
    """A check at one head size in one dtype."""

    check: Check
    size: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.check.op}: {self.check.name}, head size {self.size}, {str(self.dtype).removeprefix('torch.')}"


class Result(NamedTuple):
    """What came of a trial."""

    label: str
    passed: bool
    worst: float | None  # error of the worst tensor; None if nothing was computed
    note: str  # the worst tensor, why nothing was computed, or what was raised


def _small(size: int, groups: int = 1) -> Shape:
    return Shape(2, 130, 2, size, size, groups)


def _layer(size: int) -> Shape:
    """As wide as a layer: the tiles of some ops depend on all channels."""
    return Shape(1, 150, 16, size, size)


def _delta(n: int, *, mixer: str) -> Problem:
    return problems.delta_rule(mixer, _small(n), Draw(), extreme=True, state=True)


def _packed(n: int, *, mixer: str) -> Problem:
    return problems.delta_rule(mixer, _small(n, 2), Draw(seed=1), packed=True, state=True)


def _long(n: int) -> Problem:
    """Few programs in the serial passes, and many chunks."""
    return problems.delta_rule("gdn2", Shape(1, LONG, 1, n, n), Draw(seed=2))


def _unequal(n: int, *, mixer: str, packed: bool = False) -> Problem:
    """K != V, each half of the other's: kernels of their own."""
    k_dim, v_dim = (n // 2, n) if mixer == "gla" else (n, n // 2)
    return problems.delta_rule(mixer, Shape(2, 130, 2, k_dim, v_dim, 2), Draw(seed=5), extreme=True, packed=packed, state=True)


def _many(n: int, *, mixer: str, batch: int) -> Problem:
    """The tiles of the serial passes depend on how many sequences there are."""
    return problems.delta_rule(mixer, Shape(batch, 70, 4, n, n), Draw(seed=4))


def _step(n: int, *, batch: int) -> Problem:
    return problems.delta_rule_step("gdn2", Shape(batch, 1, 16, n, n), Draw(seed=3))


def _taps(make: Callable[..., Problem], n: int, *, taps: int) -> Problem:
    return make(_layer(n), Draw(seed=taps), taps=taps)


def _ranked(make: Callable[..., Problem], n: int, *, ranks: int) -> Problem:
    return make(_layer(n), Draw(seed=ranks), ranks=ranks)


def _own(n: int, *, ranks: int, packed: bool) -> Problem:
    return problems.ranked_delta_rule(_small(n), Draw(seed=6), ranks=ranks, packed=packed)


def _whole(n: int, *, heads: int) -> Problem:
    return problems.rms_norm(Shape(1, 150, heads, n, n), Draw())


def _gates(n: int, *, mixer: str) -> Problem:
    return problems.delta_gates(mixer, _layer(n), Draw(), extreme=True)


def _table() -> Iterator[Check]:
    for mixer in problems.WIDTHS:
        most = mixer in ("gdn2", "mamba2")
        yield Check(f"{mixer}, extreme gates", "delta_rule", partial(_delta, mixer=mixer), HEAD_SIZES if most else FULL_SIZES, mixer)
        yield Check(f"{mixer}, packed, grouped heads", "delta_rule", partial(_packed, mixer=mixer), (64, 128) if most else FULL_SIZES, mixer)
    yield Check("gdn2, one long sequence", "delta_rule", _long, mixer="gdn2")
    for mixer in ("gdn2", "gla", "mamba2"):
        yield Check(f"{mixer}, K and V unequal", "delta_rule", partial(_unequal, mixer=mixer), (64, 128), mixer)
    yield Check("mamba2, K and V unequal, packed", "delta_rule", partial(_unequal, mixer="mamba2", packed=True), (64, 128), "mamba2")
    for mixer in MANY:
        batches, sizes = ((8, 16, 32, 40), (64, 128)) if mixer == "gdn2" else ((8, 16, 32), FULL_SIZES)
        for batch in batches:
            yield Check(f"{mixer}, {batch} sequences", "delta_rule", partial(_many, mixer=mixer, batch=batch), sizes, mixer)
    yield Check("gdn2, one token", "delta_rule_step", lambda n: problems.delta_rule_step("gdn2", _small(n), Draw(), extreme=True), HEAD_SIZES)
    for batch in (8, 72):  # of 16 heads: the kernel's blocks depend on how many states there are
        yield Check(f"gdn2, one token of {batch} sequences", "delta_rule_step", partial(_step, batch=batch))
    yield Check("kda, one token", "delta_rule_step", lambda n: problems.delta_rule_step("kda", _small(n, 2), Draw()))
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
        yield Check(f"mamba3, rank {ranks}", "delta_rule", partial(_own, ranks=ranks, packed=False), (64, 128), "mamba3")
        yield Check(f"mamba3, rank {ranks}, packed", "delta_rule", partial(_own, ranks=ranks, packed=True), mixer="mamba3")
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
) -> list[Trial]:
    """The trials of some ops (None: all there are), dtypes, head sizes and mixers (None: all).

    float16 shares its tiles with bfloat16 and is tried at one head size only, unless it is the only dtype.
    """
    legal, wanted, chosen = set(ops() if found is None else found), tuple(dtypes), None if mixers is None else set(mixers)
    of = [check for check in CHECKS if check.op in legal and (check.mixer is None or chosen is None or check.mixer in chosen)]
    trials = [Trial(check, size, dtype) for check in of for size in check.sizes for dtype in wanted]
    if len(wanted) > 1:
        trials = [trial for trial in trials if trial.dtype != torch.float16 or trial.size in FULL_SIZES]
    near = None if sizes is None else {min((n for n in HEAD_SIZES if n >= size), default=max(HEAD_SIZES)) for size in sizes}
    return [trial for trial in trials if near is None or trial.size in near or len(trial.check.sizes) == 1]


def find(label: str) -> Trial:
    """The trial of a label."""
    everything = (Trial(check, size, dtype) for check in CHECKS for size in check.sizes for dtype in TOLERANCE)
    return next(trial for trial in everything if trial.label == label)


def oracle(problem: Problem) -> dict[str, Tensor]:
    """The float64 results: the recurrence itself for the delta rule, the plain-torch reference for the others."""
    exact = problem.to(torch.float64)
    function = problems.call(exact, "reference")
    if problem.op == "delta_rule" and exact.leaves["q"].shape[1] < LONG:  # beyond, the reference, which `make test` holds against the recurrence
        return problems.run(exact, lambda **leaves: recurrent(**leaves, **exact.options))
    return problems.run(exact, function)


def attempt(trial: Trial, device: torch.device) -> Result:
    """Runs a trial on `device`: on its kernels if they take it, else on the reference."""
    problem = trial.check.make(trial.size).to(trial.dtype)
    wanted = "auto" if backends.why_not(trial.check.op, device) or device.type == "cpu" else "triton"
    there = problem.to(trial.dtype, device)
    try:
        got = problems.run(there, problems.call(there, wanted))
    except backends.RefusedError as error:  # the kernels refuse this dtype or size: "auto" takes the reference there
        return Result(trial.label, True, None, f"runs on the reference: {error}")
    except Exception as error:  # a compiler that fails raises whatever it likes; it is the answer that was asked for
        return Result(trial.label, False, None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return judge(trial, {name: x.cpu() for name, x in got.items()}, oracle(problem))


def judge(trial: Trial, got: dict[str, Tensor], expected: dict[str, Tensor]) -> Result:
    """The result of a trial that ran."""
    errors = problems.errors(got, expected)
    worst = max(errors, key=lambda name: errors[name])
    return Result(trial.label, errors[worst] <= TOLERANCE[trial.dtype], errors[worst], worst)


def quick() -> list[Trial]:
    """Trials for a machine without a GPU: every check once, on the reference, with small heads."""
    return [Trial(check, 16, torch.float32) for check in CHECKS if check.op in ops()]
