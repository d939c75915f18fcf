"""`bench decode`: one token for a batch of sequences, in a CUDA graph and eager, beside a copy of the state, which moves the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import delta_rule_step
from kernels.backend import RefusedError, Requested
from mixers.base import at_least
from mixers.errors import ConfigError, unknown
from recipes.commands import bench_peers, bench_rows, checks, problems
from recipes.commands.arguments import Arguments
from recipes.commands.bench_arguments import add_common, dtype_of, prepare
from recipes.commands.bench_groups import kernels_on
from recipes.commands.bench_rows import Row, number
from recipes.commands.bench_timing import CudaClock, in_turns
from recipes.commands.problems import Draw, Problem, Shape

STEPS = 20  # timed together, each on states of its own: launching a graph costs as much as a small step
OURS, COPY = "ours", "copy of the state"
Step = Callable[[dict[str, Tensor]], Any]


def run(argv: list[str]) -> int:
    """Times a step for every batch size; 1 if it was wrong."""
    given = _parser().parse_args(argv)
    dtype, baselines = dtype_of(given.dtype), bench_peers.check_baselines(given.baseline)
    if given.mixer not in problems.WIDTHS:
        raise unknown("mixer", "mixer", given.mixer, problems.WIDTHS)
    at_least(1, heads=given.heads, dim=given.dim)
    batches = _batches(given.batches)
    machine = prepare(given, "decode")
    clock = CudaClock(ahead=False)
    for batch in batches:
        shape = Shape(batch, 1, given.heads, given.dim, given.dim)
        problem = problems.delta_rule_step(given.mixer, shape, Draw("cuda")).to(dtype)
        try:
            errors = problems.errors(problems.run(problem, problems.call(problem, "triton")), checks.oracle(problem))
        except RefusedError as error:
            raise ConfigError(f"{given.mixer} step, {given.heads} heads of {given.dim}: no figure: {error}") from error
        if not max(errors.values()) <= checks.TOLERANCE[dtype]:
            print(f"{given.mixer} step, batch {batch}: no figure: errors {errors}", flush=True)
            return 1
        times = measure(implementations(given.mixer, "fla" in baselines), problem, clock, given.budget_ms)
        rows = [
            Row(f"{given.mixer}_step", name, batch, 1, *shape[2:5], given.dtype, number(ms, 5), "", "", "", *machine) for name, ms in times.items()
        ]
        bench_rows.show(f"decode, batch {batch}, {given.heads} heads of {given.dim}, {given.dtype}", rows)
        graph = f"{OURS}, CUDA graph"
        print(
            f"batch {batch}: {1000 * times[graph]:.1f} us, {100 * times[f'{COPY}, CUDA graph'] / times[graph]:.0f} % of the copy's bandwidth",
            flush=True,
        )
        bench_rows.append(given.out, "decode", rows)
    return 0


def implementations(mixer: str, fla: bool, device: str = "cuda") -> dict[str, Step]:
    """One step each, on the arguments of `delta_rule_step`."""
    found: dict[str, Step] = {OURS: partial(_ours, kernels_on(device))}  # type: ignore[arg-type]
    peer = bench_peers.fla_step(mixer) if fla else None
    if peer is not None:
        name, function = peer
        found[name] = lambda leaves: function(**leaves)
    found[COPY] = lambda leaves: leaves["state"].clone()
    return found


def _ours(backend: Requested, leaves: dict[str, Tensor]) -> Any:
    return delta_rule_step(**leaves, backend=backend)  # type: ignore[arg-type]


def measure(steps: dict[str, Step], problem: Problem, clock: CudaClock, budget_ms: float) -> dict[str, float]:
    """Milliseconds of a step of each implementation, in a CUDA graph and eager, all in turns."""
    inputs = [{**problem.leaves, "state": problem.leaves["state"].clone()} for _ in range(STEPS)]
    functions: dict[str, Callable[[], object]] = {}
    for name, step in steps.items():
        eager = repeated(step, inputs)
        try:
            functions |= {f"{name}, CUDA graph": captured(eager), f"{name}, eager": eager}
        except Exception as error:  # a peer that cannot run here, or not in a graph, is left out
            if name in (OURS, COPY):
                raise
            print(f"{name} does not run: {type(error).__name__}: {' '.join(str(error).split())[:120]}", flush=True)
    with torch.no_grad():
        times = in_turns(list(functions.values()), clock, budget_ms)
    return {name: ms / STEPS for name, ms in zip(functions, times, strict=True)}


def repeated(step: Step, inputs: list[dict[str, Tensor]]) -> Callable[[], None]:
    """All steps, one after the other."""

    def run() -> None:
        for leaves in inputs:
            step(leaves)

    return run


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """The function as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


def _batches(text: str) -> list[int]:
    try:
        batches = [int(n) for n in text.split(",") if n]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ConfigError(f"batches: must be numbers of sequences with commas between them, such as 1,32,256, got {text!r}")
    return batches


def _parser() -> Arguments:
    parser = Arguments("python -m recipes bench decode", "Times one decode step, in a CUDA graph and eager, beside a copy of the state.")
    add_common(parser, None)
    parser.add_argument("--batches", default="1,32,256", help="numbers of sequences (%(default)s)")
    parser.add_argument("--mixer", default="gdn2", help="whose gates the step gets (%(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="heads (%(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="size of a head (%(default)s)")
    return parser
