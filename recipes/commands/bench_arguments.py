"""What the subcommands of `bench` share: their arguments, and what they need before anything is timed."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from lit_modules.paths import given_path
from mixers.base import at_least
from mixers.errors import ConfigError, unknown
from recipes.commands import bench_rows
from recipes.commands.arguments import Arguments
from recipes.commands.problems import Shape
from recipes.commands.run_folder import check_writable

SHAPES = "8x2048,4x4096,2x8192,1x16384"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OUT = Path("docs/benchmarks")


def add_common(parser: Arguments, shapes: str | None = SHAPES, rows: bool = True) -> None:
    """Arguments of subcommands that time something: with `shapes` at shapes, these if no others are given; with `rows` beside others, for a table."""
    if shapes is not None:
        parser.add_argument("--shapes", default=shapes, help="batch x tokens, with commas between them (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help=f"of {', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--budget_ms", type=float, default=1000.0, help="about how long a set of implementations is timed (%(default)s)")
    if rows:
        parser.add_argument("--baseline", default="", help="other implementations beside ours: fla, sdpa, mamba_ssm (default: none)")
        parser.add_argument("--out", type=Path, default=OUT, help="folder whose CSV file the rows are added to (%(default)s)")
        parser.add_argument("--commit", help="the commit that the rows name (default: what git says, or unknown)")


def add_heads(parser: Arguments) -> None:
    """Arguments of what has heads of keys and of values."""
    parser.add_argument("--heads", type=int, default=16, help="heads (%(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="size of a head; d_state of ssd and siso (%(default)s)")
    parser.add_argument("--v_dim", type=int, help="size of a head of values (default: as --dim)")


def problem_shapes(given: Namespace) -> list[Shape]:
    """The sizes of the inputs that the arguments of `add_common` and `add_heads` ask for.

    Raises:
        ConfigError: a size below 1, or shapes that are none.
    """
    v_dim = given.dim if given.v_dim is None else given.v_dim
    at_least(1, heads=given.heads, dim=given.dim, v_dim=v_dim)
    return [Shape(batch, tokens, given.heads, given.dim, v_dim) for batch, tokens in shapes_of(given.shapes)]


def shapes_of(text: str) -> list[tuple[int, int]]:
    """ "8x2048,4x4096" as numbers."""
    try:
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in text.split(",") if shape]
    except ValueError:
        shapes = []
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ConfigError(f"shapes: must be batch x tokens with commas between them, such as 8x2048,1x16384, got {text!r}")
    return [(batch, tokens) for batch, tokens in shapes]


def dtype_of(name: str) -> torch.dtype:
    """The dtype behind a name."""
    if name not in DTYPES:
        raise unknown("dtype", "dtype", name, DTYPES)
    return DTYPES[name]


def needs_gpu() -> None:
    """ConfigError where nothing can be timed."""
    if not torch.cuda.is_available():
        raise ConfigError("bench: needs a GPU that torch can use, and there is none here: see python -m recipes doctor")


def check_rows(given: Namespace, kind: str, of: type[Any] = bench_rows.Row) -> bench_rows.Machine:
    """Sees to it that rows of a kind can be written where `out` says, whose `~` is resolved, before any is measured; nothing is left there. Returns
    the end of every row.

    Raises:
        ConfigError: they cannot, this GPU's table has other columns, or `commit` may not stand in it.
    """
    if given.commit is not None and not bench_rows.COMMIT.fits(given.commit):
        raise ConfigError(f"commit: must be {bench_rows.COMMIT.words}, got {bench_rows.shown(given.commit)}")
    given.out = given_path(given.out, "out")
    check_writable(given.out, "out")
    machine = bench_rows.this_machine(given.commit)
    bench_rows.check_columns(given.out, kind, machine.gpu, of)
    return machine


def check_budget(given: Namespace) -> None:
    """ConfigError: the budget is no time."""
    if not 0 < given.budget_ms < math.inf:
        raise ConfigError(f"budget_ms: must be > 0 and finite, got {given.budget_ms:g}")


def prepare(given: Namespace, kind: str) -> bench_rows.Machine:
    """Checks what is needed before the first figure, which goes to the rows of a kind; the end of every row.

    Raises:
        ConfigError: there is no GPU, the budget is no time, or rows cannot be written.
    """
    check_budget(given)
    machine = check_rows(given, kind)
    needs_gpu()
    return machine
