"""Figures as rows: on the terminal, and in one CSV file for each kind of benchmark and GPU."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from rich.console import Console
from rich.table import Table

import kernels
from mixers.errors import ConfigError
from recipes.commands.machine import triton_version


class Row(NamedTuple):
    """A line of a table; empty where nothing was measured."""

    what: str
    impl: str
    batch: int
    tokens: int
    heads: int
    dk: int
    dv: int
    dtype: str
    fwd_ms: str
    fwd_bwd_ms: str
    extra_mib: str
    first_call_s: str
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


class Machine(NamedTuple):
    """The end of every row."""

    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


def this_machine(commit: str | None = None) -> Machine:
    """What the figures of this run hold for."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Machine(gpu, torch.__version__, triton_version() or "none", commit or commit_of_checkout(), datetime.now(UTC).date().isoformat())


def commit_of_checkout() -> str:
    """The commit that the code comes from, "-dirty" behind it if files differ; "unknown" where git does not say."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, cwd=Path(kernels.__file__).parents[1], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def number(value: float | None, digits: int) -> str:
    """A cell."""
    return "" if value is None else f"{value:.{digits}f}"


def slug(gpu: str) -> str:
    """A GPU's name for a file's: "NVIDIA H100 80GB HBM3" is h100_80gb_hbm3."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower().replace("nvidia", "")).strip("_")


def append(folder: Path, kind: str, rows: Iterable[Any]) -> Path | None:
    """Adds rows, NamedTuples of one class that end as `Machine`, to the file of their kind and GPU; None if there are none.

    Raises:
        ConfigError: the file has other columns, or cannot be written.
    """
    rows = list(rows)
    if not rows:
        return None
    path, columns = folder / f"{kind}_{slug(rows[0].gpu)}.csv", rows[0]._fields
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        if not new and path.read_text(encoding="utf-8").partition("\n")[0] != ",".join(columns):
            raise ConfigError(f"out: {path} has other columns than {', '.join(columns)}")
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([columns] if new else [])
            writer.writerows(rows)
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be written: {error.strerror}") from error
    return path


def read(folder: Path, kind: str, of: type[Any] = Row) -> list[Any]:
    """The rows of a kind of all GPUs, of a NamedTuple's columns, the newest last."""
    rows: list[Any] = []
    for path in sorted(folder.glob(f"{kind}_*.csv")):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values: list[Any] = [int(row[name]) if kind is int else row[name] for name, kind in get_type_hints(of).items()]
                rows.append(of(*values))
    return rows


def show(title: str, rows: list[Row], errors: list[float | None] | None = None) -> None:
    """A table on the terminal; the ratio is to the first row of its `what`, ours."""
    table = Table("what", "impl", title=title, title_justify="left")
    for name in ("forward", "forward + backward", "ratio", "memory", "first call", "error"):
        table.add_column(name, justify="right")
    first: dict[str, float] = {}
    for row, error in zip(rows, errors or [None] * len(rows), strict=True):
        time = float(row.fwd_bwd_ms or row.fwd_ms)
        base = first.setdefault(row.what, time)
        cells = (_unit(row.fwd_ms, "ms"), _unit(row.fwd_bwd_ms, "ms"), f"{time / base:.2f}x", _unit(row.extra_mib, "MiB"))
        table.add_row(row.what, row.impl, *cells, _unit(row.first_call_s, "s"), "" if error is None else f"{error:.1e}")
    Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(table)


def _unit(cell: str, unit: str) -> str:
    return f"{cell} {unit}" if cell else ""
