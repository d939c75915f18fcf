"""`bench tune`: times candidate tiles of an op's kernels on this GPU and prints the rows to paste into the op's `tiles.py`.

The candidates of a kernel are what `CANDIDATES` of its `tiles.py` lists; where that is absent, other warps and stages of the tile that runs now.
A candidate counts only if its results equal those of the present tile to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.tiles import Key, Tile, TileTable, architecture
from mixers.errors import ConfigError, unknown
from recipes.commands import bench_groups, problems
from recipes.commands.arguments import Arguments
from recipes.commands.bench_arguments import add_common, add_heads, check_budget, dtype_of, needs_gpu, problem_shapes
from recipes.commands.bench_timing import Clock, CudaClock, in_turns
from recipes.commands.checks import TOLERANCE
from recipes.commands.problems import Draw, Shape

TABLES = {  # the module of an op's table
    "delta": "kernels.delta.tiles",
    "ssd": "kernels.delta.tiles",
    "siso": "kernels.delta.tiles",
    "step": "kernels.delta.step",
    "conv": "kernels.conv1d.tiles",
    "gates": "kernels.gates.tiles",
    "norm": "kernels.gated_norm.tiles",
    "l2norm": "kernels.qk_norm.tiles",
    "rotary": "kernels.rotary.tiles",
    "skip": "kernels.ranks.tiles",
    "ranks": "kernels.ranks.tiles",
}


class Timed(NamedTuple):
    """A candidate: its time, or why it has none."""

    tile: Tile
    ms: float | None
    note: str = ""


def run(argv: list[str]) -> int:
    """Prints a table and a row for every kernel that the op launches."""
    given = _parser().parse_args(argv)
    if given.op not in TABLES:
        raise unknown("op", "op", given.op, TABLES)
    if given.mixer not in problems.WIDTHS:
        raise unknown("mixer", "mixer", given.mixer, problems.WIDTHS)
    shapes, dtype = problem_shapes(given), dtype_of(given.dtype)
    module = import_module(TABLES[given.op])
    table: TileTable = module.TILES
    if given.kernel is not None and given.kernel not in table.safe:
        raise unknown("kernel", "kernel", given.kernel, table.safe)
    check_budget(given)
    needs_gpu()
    clock = CudaClock()
    for shape in shapes:
        done: set[tuple[str, Key]] = set()
        for work in works_of(given.op, given.mixer, shape, dtype):
            for kernel, key in picks(table, work):
                if given.kernel in (None, kernel) and (kernel, key) not in done:
                    listed: Sequence[Tile] = getattr(module, "CANDIDATES", {}).get(kernel, ())
                    found = tune(table, kernel, key, work, clock, TOLERANCE[dtype], given.budget_ms, listed)
                    report(f"{table.op}: {kernel}, {shape.batch} x {shape.tokens:,} tokens", key, found)
                done.add((kernel, key))
        launched = sorted({kernel for kernel, _ in done})
        if given.kernel not in (None, *launched):
            raise ConfigError(f"kernel: {given.op} launches no {given.kernel} at {shape.batch}x{shape.tokens}, but {', '.join(launched)}")
    return 0


def works_of(op: str, mixer: str, shape: Shape, dtype: torch.dtype, device: str = "cuda") -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Runs of an op, forward and backward, with their results: one for each rank of what has ranks."""
    if op == "step":
        problem = problems.delta_rule_step(mixer, shape, Draw(device)).to(dtype)
        yield lambda: problems.run(problem, problems.call(problem))
        return
    for group in bench_groups.groups(op, [mixer], shape, dtype, [], device):
        yield partial(bench_groups.results, group.entries[0])


def picks(table: TileTable, work: Callable[[], object]) -> list[tuple[str, Key]]:
    """The kernels that a run launches, with the rows that they look for."""
    seen: dict[tuple[str, Key], None] = {}
    pick = table.pick

    def watched(kernel: str, device: torch.device, itemsize: int, size: int) -> Tile:
        seen[kernel, Key(architecture(device), itemsize, size)] = None
        return pick(kernel, device, itemsize, size)

    table.pick = watched  # type: ignore[method-assign]
    try:
        work()
    finally:
        del table.pick  # the method of the class again
    return list(seen)


@contextmanager
def using(table: TileTable, kernel: str, key: Key, tile: Tile) -> Iterator[None]:
    """The table with another row."""
    rows = table.tuned.setdefault(kernel, {})
    before = rows.get(key)
    rows[key] = tile
    try:
        yield
    finally:
        if before is None:
            del rows[key]
        else:
            rows[key] = before


def candidates(present: Tile, listed: Sequence[Tile] = ()) -> list[Tile]:
    """The tiles to try, the present one first."""
    others = list(listed) or [
        present._replace(num_warps=warps, num_stages=stages)
        for warps in (1, 2, 4, 8, 16)
        for stages in (1, 2, 3, 4)
        if _near(warps, present.num_warps)
    ]
    return [present, *(tile for tile in others if tile != present)]


def _near(a: int, b: int) -> bool:
    return max(a, b) <= 2 * min(a, b)


def tune(
    table: TileTable,
    kernel: str,
    key: Key,
    work: Callable[[], Mapping[str, Tensor]],
    clock: Clock,
    tolerance: float,
    budget_ms: float,
    listed: Sequence[Tile] = (),
) -> list[Timed]:
    """The candidates of a kernel, fastest first; times are those of the whole op."""
    present = table.tuned.get(kernel, {}).get(key, table.safe[kernel])
    expected = dict(work())
    usable: list[Tile] = []
    failed: list[Timed] = []
    for tile in candidates(present, listed):
        with using(table, kernel, key, tile):
            try:
                errors = problems.errors(work(), expected)
            except Exception as error:  # too much shared memory, too many registers, a compiler that gives up
                failed.append(Timed(tile, None, f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"))
                continue
        if max(errors.values()) <= tolerance:
            usable.append(tile)
        else:
            failed.append(Timed(tile, None, f"WRONG: {max(errors.values()):.1e} from the present tile's results"))

    def with_tile(tile: Tile) -> Callable[[], None]:
        def run() -> None:
            with using(table, kernel, key, tile):
                work()

        return run

    times = in_turns([with_tile(tile) for tile in usable], clock, budget_ms * max(1, len(usable)))
    timed = [Timed(tile, ms, "present" if tile == present else "") for tile, ms in zip(usable, times, strict=True)]
    return sorted(timed, key=lambda t: t.ms or 0.0) + failed


def report(title: str, key: Key, found: list[Timed]) -> None:
    """The candidates, and the row of the fastest."""
    print(f"\n{title}, {key.architecture}, {key.itemsize} bytes, size {key.size}: the op's time with each tile")
    for timed in found:
        shown = "-" if timed.ms is None else f"{timed.ms:.4f} ms"
        print(f"  {shown:>12}  {source(timed.tile)}  {timed.note}")
    if found and found[0].ms is not None:
        print(f"row: {key!r}: {source(found[0].tile)},", flush=True)


def source(tile: Tile) -> str:
    """A tile as it stands in a `tiles.py`: what is not the default."""
    names = [name for name in Tile._fields if getattr(tile, name) != Tile._field_defaults.get(name, ...)]
    return f"Tile({', '.join(f'{name}={getattr(tile, name)!r}' for name in names)})"


def _parser() -> Arguments:
    parser = Arguments("python -m recipes bench tune", "Times candidate tiles of an op's kernels and prints the rows for its tiles.py.")
    add_common(parser, "4x4096", rows=False)
    parser.add_argument("--op", default="delta", help=f"of {', '.join(TABLES)} (%(default)s)")
    parser.add_argument("--kernel", help="only this kernel of the op's table (default: every one that is launched)")
    parser.add_argument("--mixer", default="gdn2", help="whose gates the delta rule gets (%(default)s)")
    add_heads(parser)
    return parser
