"""Figures as rows: on the terminal, and in one CSV file for each kind of benchmark and GPU."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from rich.console import Console
from rich.table import Table

import kernels
from mixers.errors import ConfigError
from recipes.commands.machine import triton_version

DAMAGED = "surrogateescape"  # bytes that are no text: no column may hold what they become
SHOWN = 40  # characters of a cell


class Rule(NamedTuple):
    """What the cells of a column hold: a pattern of printable characters, and its words."""

    pattern: str
    words: str

    def fits(self, cell: str) -> bool:
        """Whether a cell may hold this."""
        return cell.isprintable() and re.fullmatch(self.pattern, cell) is not None


_DECIMAL, _NOT_ZERO = r"[0-9]{1,18}(\.[0-9]{1,18})?", "(?=.*[1-9])"
COMMIT = Rule(r"[^\s,]+", "a name without spaces, commas and control characters")
Text = Annotated[str, Rule(".+", "printable text")]
Commit = Annotated[str, COMMIT]
Day = Annotated[str, Rule("[0-9]{4}-[0-9]{2}-[0-9]{2}", "a day such as 2026-11-29")]
Count = Annotated[int, Rule("[1-9][0-9]{0,17}", "a whole number >= 1")]
Size = Annotated[int, Rule("[0-9]{1,18}", "a whole number >= 0")]  # 0: a layer without heads
Figure = Annotated[str, Rule(_NOT_ZERO + _DECIMAL, "a number > 0")]
FigureOrNone = Annotated[str, Rule(f"({_NOT_ZERO}{_DECIMAL})?", "a number > 0, or empty")]
AmountOrNone = Annotated[str, Rule(f"({_DECIMAL})?", "a number >= 0, or empty")]


class Row(NamedTuple):
    """A line of a table; empty where nothing was measured."""

    what: Text
    impl: Text
    batch: Count
    tokens: Count
    heads: Size
    dk: Size
    dv: Size
    dtype: Text
    fwd_ms: Figure
    fwd_bwd_ms: FigureOrNone
    extra_mib: AmountOrNone
    first_call_s: AmountOrNone
    gpu: Text
    torch: Text
    triton: Text
    commit: Commit
    date: Day


class Machine(NamedTuple):
    """The end of every row."""

    gpu: Text
    torch: Text
    triton: Text
    commit: Commit
    date: Day


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


def size_of(dk: int, dv: int, between: str = " x ") -> str:
    """The size of a head for a title or a file's name: one number where keys and values have the same."""
    return f"{dk}" if dk == dv else f"{dk}{between}{dv}"


def append(folder: Path, kind: str, rows: Iterable[Any]) -> Path | None:
    """Adds rows, NamedTuples of one class that end as `Machine`, to the file of their kind and GPU; None if there are none.

    Raises:
        ConfigError: the file has other columns, or cannot be written.
    """
    rows = list(rows)
    if not rows:
        return None
    path, columns = _path(folder, kind, rows[0].gpu), rows[0]._fields
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors=DAMAGED) if path.exists() else ""
        _check_columns(path, text.partition("\n")[0], columns)
        with path.open("a", newline="", encoding="utf-8") as file:
            if text and not text.endswith("\n"):  # its last row was cut: a full disk, a process that was killed
                file.write("\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([] if text else [columns])
            writer.writerows(rows)
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be written: {error.strerror}") from error
    return path


def read(folder: Path, kind: str, of: type[Any] = Row) -> list[Any]:
    """The rows of a kind of all GPUs, of a NamedTuple's columns, the newest last.

    Raises:
        ConfigError: a file cannot be read, or a line of it is not one that `append` writes.
    """
    return [row for path in sorted(folder.glob(f"{kind}_*.csv")) for row in _rows_of(path, of)]


def _rows_of(path: Path, of: type[Any]) -> Iterator[Any]:
    columns = get_type_hints(of, include_extras=True)
    try:
        with path.open(encoding="utf-8", errors=DAMAGED) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    _check_columns(path, line.rstrip("\n"), tuple(columns))
                elif line.strip():
                    yield of(*_values(f"{path}, line {number}", line, columns))
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be read: {error.strerror}") from error


def _path(folder: Path, kind: str, gpu: str) -> Path:
    return folder / f"{kind}_{slug(gpu)}.csv"


def check_columns(folder: Path, kind: str, gpu: str, of: type[Any] = Row) -> None:
    """ConfigError where `append` would find other columns, or a file that cannot be read."""
    path = _path(folder, kind, gpu)
    try:
        with path.open(encoding="utf-8", errors=DAMAGED) as file:
            _check_columns(path, file.readline().rstrip("\n"), of._fields)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be read: {error.strerror}") from error


def _check_columns(path: Path, first_line: str, columns: tuple[str, ...]) -> None:
    """An empty file may get any."""
    if first_line and first_line != ",".join(columns):
        raise ConfigError(f"out: {path}, line 1: has other columns than {', '.join(columns)}")


def _values(where: str, line: str, columns: dict[str, Any]) -> list[int | str]:
    """The cells of a line, which is a whole row: no cell that `append` writes has a line break."""
    try:
        (cells,) = csv.reader([line], strict=True)
    except csv.Error as error:
        raise ConfigError(f"out: {where}: is no row of a table: {error}") from error
    if len(cells) != len(columns):
        raise ConfigError(f"out: {where}: has {len(cells)} cells, must have {len(columns)}; mend or remove it")
    for cell, (name, hint) in zip(cells, columns.items(), strict=True):
        (rule,) = hint.__metadata__
        if not rule.fits(cell):
            raise ConfigError(f"out: {where}: {name}: must be {rule.words}, got {shown(cell)}")
    return [hint.__origin__(cell) for cell, hint in zip(cells, columns.values(), strict=True)]


def shown(cell: str) -> str:
    """A cell for a message, its beginning if it is long."""
    return repr(cell if len(cell) <= SHOWN else f"{cell[:SHOWN]}...")


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
