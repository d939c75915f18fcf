"""`bench op`: the ops beside other implementations of them."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable

import torch

from kernels import backend as backends
from mixers.errors import ConfigError, unknown
from recipes.commands import bench_groups, bench_rows, problems
from recipes.commands.arguments import Arguments
from recipes.commands.bench_arguments import add_common, add_heads, dtype_of, prepare, problem_shapes
from recipes.commands.bench_first import first_call_seconds
from recipes.commands.bench_groups import Group
from recipes.commands.bench_peers import check_baselines
from recipes.commands.bench_rows import Row, number
from recipes.commands.bench_timing import Clock, CudaClock, Entry, time_entries
from recipes.commands.checks import TOLERANCE
from recipes.commands.problems import Shape

SUMMED_EXACTLY = 1024  # tokens


def run(argv: list[str]) -> int:
    """Times every op at every shape; 1 if one was wrong, and so got no figure."""
    given = _parser().parse_args(argv)
    ops = _names("ops", given.ops, bench_groups.OPS)
    mixers = _names("mixers", given.mixers, problems.WIDTHS)
    shapes = problem_shapes(given)
    dtype, baselines = dtype_of(given.dtype), check_baselines(given.baseline)
    machine = prepare(given, "op")
    for op in ops:
        if why := backends.why_not(bench_groups.OPS[op], torch.device("cuda")):
            raise ConfigError(f"ops: {op} runs on its plain-torch reference here, which is not to be timed: {why}")
    clock, wrong = CudaClock(), 0
    for shape in shapes:
        for op in ops:
            for group in bench_groups.groups(op, mixers, shape, dtype, baselines):
                wrong += not measure(group, shape, clock, machine, given)
                torch.cuda.empty_cache()
    return int(wrong > 0)


def measure(group: Group, shape: Shape, clock: Clock, machine: bench_rows.Machine, given: Namespace) -> bool:
    """Proves, times and writes down a group. False if ours is wrong: then there is no figure."""
    size = bench_rows.size_of(shape.dk, shape.dv)
    title = f"{group.entries[0].what}, {shape.batch} x {shape.tokens:,} tokens, {shape.heads} heads of {size}, {given.dtype}"
    try:
        usable, errors = prove(group, dtype_of(given.dtype), show_all=given.errors)
    except WrongResultError as error:
        print(f"{title}: no figure: {error}", flush=True)
        return False
    timings = time_entries(usable, clock, given.budget_ms)
    rows = []
    for entry, timing in zip(usable, timings, strict=True):
        first = first_call_seconds(entry, shape, given) if given.first_call else None
        figures = number(timing.fwd_ms, 4), number(timing.fwd_bwd_ms, 4), number(timing.extra_mib, 1), number(first, 2)
        rows.append(Row(entry.what, entry.impl, *shape[:5], given.dtype, *figures, *machine))
    bench_rows.show(title, rows, [max(its.values()) if its else None for its in errors])
    bench_rows.append(given.out, "op", rows)
    return True


class WrongResultError(Exception):
    """Ours is not within the tolerance of its dtype at this shape."""


def prove(group: Group, dtype: torch.dtype, *, show_all: bool = False) -> tuple[list[Entry], list[dict[str, float]]]:
    """The implementations that run, and the errors of each against float64.

    Raises:
        WrongResultError: ours is wrong, or does not run.
    """
    if group.entries[0].impl != bench_groups.OURS:  # torch's attention is taken at its word
        return group.entries, [{} for _ in group.entries]
    exact = bench_groups.expected(group)
    limits = allowed(group, exact, dtype)
    usable: list[Entry] = []
    errors: list[dict[str, float]] = []
    for entry in group.entries:
        try:
            found = bench_groups.errors_of(group, exact, entry)
        except Exception as error:  # a peer that cannot run here is left out; ours must
            if not usable:
                raise WrongResultError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
            print(f"{entry.impl} does not run: {type(error).__name__}: {' '.join(str(error).split())[:120]}", flush=True)
            continue
        if show_all:
            print(f"  {entry.impl:<12} " + "  ".join(f"{name} {value:.2e}" for name, value in found.items()), flush=True)
        worst = max(found, key=lambda name: found[name] / limits[name])
        if not usable and not found[worst] <= limits[worst]:
            raise WrongResultError(f"{worst} is off by {found[worst]:.1e} of its largest entry, {limits[worst]:.2g} are allowed in {dtype}")
        usable.append(entry)
        errors.append(found)
    return usable, errors


def allowed(group: Group, exact: Iterable[str], dtype: torch.dtype) -> dict[str, float]:
    """How far a tensor may be from its float64 result, of its largest entry.

    An angle of Mamba-3 turns all later tokens alike, which changes nothing but pairs that lie across it: little is left of the sum over T tokens that
    is its gradient, and the rounding of 16-bit gradients of keys and queries, which it adds up, grows like the root of T. So does the tolerance, from
    1,024 tokens on.
    """
    tolerance = TOLERANCE.get(dtype, math.inf)
    grown = tolerance * max(1.0, math.sqrt(group.entries[0].cotangents[0].shape[1] / SUMMED_EXACTLY))
    return {name: grown if name.removeprefix("d") in group.sums else tolerance for name in exact}


def _names(key: str, text: str, legal: Iterable[str]) -> list[str]:
    names, known = [name for name in text.split(",") if name], list(legal)
    for name in names:
        if name not in known:
            raise unknown(key, key.removesuffix("s"), name, known)
    if not names:
        raise ConfigError(f"{key}: must name at least one of {', '.join(known)}")
    return names


def _parser() -> Arguments:
    parser = Arguments("python -m recipes bench op", "Times the ops, each at every shape, beside other implementations on the same tensors.")
    add_common(parser)
    parser.add_argument("--ops", default="delta", help=f"of {', '.join(bench_groups.OPS)}, with commas between them (%(default)s)")
    parser.add_argument("--mixers", default="gdn2,kda,gdn", help="whose gates the delta rule gets (%(default)s)")
    add_heads(parser)
    parser.add_argument("--first-call", action="store_true", help="time the first call of a fresh process with an empty cache too")
    parser.add_argument("--errors", action="store_true", help="print the error of every tensor of every implementation against float64")
    return parser
