"""`bench train`: whole trainings, tokens a second, on one device and on several.

Every figure comes from `fit` in a process of its own, as a user would run it, on the built-in corpus.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lit_modules.parallel import check_strategy_name
from mixers.base import at_least
from mixers.errors import ConfigError
from recipes.commands import bench_rows
from recipes.commands.arguments import Arguments
from recipes.commands.bench_arguments import OUT, check_rows, needs_gpu, shapes_of
from recipes.commands.bench_rows import AmountOrNone, Commit, Count, Day, Figure, Machine, Text
from recipes.commands.config_files import find_config
from recipes.commands.run_folder import METRICS

WARM_UP, TIMED = 10, 20  # optimizer steps; `Throughput` averages over the last 20
TRAINING = "training"  # kind of the rows
FIXED = {  # data that every machine has, and nothing beside the training
    "data.path": "null",
    "data.val_path": "null",
    "data.test_path": "null",
    "data.tokenizer": "bytes",
    "model.max_tokens": 10**12,
    "trainer.max_steps": WARM_UP + TIMED,
    "trainer.limit_val_batches": 0,
    "trainer.enable_checkpointing": "false",
    "summary.max_new_tokens": 0,
}


class Training(NamedTuple):
    """A row: what was trained on which devices, and how fast. Empty where nothing was measured."""

    recipe: Text
    strategy: Text
    devices: Count
    batch: Count  # of a device, in a micro-batch
    seq_len: Count
    accumulate: Count  # micro-batches of an optimizer step, of a device
    tokens_per_second: Figure  # of all devices
    ratio: Figure  # to the first of the run with this recipe and shape
    tflops_per_second: AmountOrNone  # of a device
    mfu: AmountOrNone
    peak_memory_gib: AmountOrNone  # of the device with most
    data_wait: AmountOrNone  # share of the time
    gpu: Text
    torch: Text
    triton: Text
    commit: Commit
    date: Day


def run(argv: list[str]) -> int:
    """Trains every recipe at every shape on every set of devices; 1 if a training failed, and so got no figure."""
    given = _parser().parse_args(argv)
    shapes, devices = shapes_of(given.shapes), devices_of(given.on)
    at_least(1, accumulate=given.accumulate)
    recipes = [name for name in given.config.split(",") if name]
    if not recipes:
        raise ConfigError("config: must name at least one recipe")
    for recipe in recipes:
        for name in recipe.split("+"):
            find_config(name)
    machine, failed = check_rows(given, TRAINING, Training), 0
    needs_gpu()
    for recipe in recipes:
        for batch, tokens in shapes:
            rows: list[Training] = []
            for strategy, count in devices:
                what = f"{recipe}, {batch} x {tokens:,} tokens, {given.accumulate} micro-batches a step, {strategy} on {count}"
                print(f"training: {what}", flush=True)
                found = train(recipe, strategy, count, batch, tokens, given.accumulate)
                if isinstance(found, str):
                    print(f"no figure: {what}: {found}", file=sys.stderr, flush=True)
                    failed += 1
                    continue
                base = float(rows[0].tokens_per_second) if rows else found["tokens_per_second"]
                rows.append(row_of((recipe, strategy, count, batch, tokens, given.accumulate), found, base, machine))
                bench_rows.append(given.out, TRAINING, rows[-1:])
            if rows:
                show(rows)
    return int(failed > 0)


def devices_of(text: str) -> list[tuple[str, int]]:
    """ "auto:1,ddp:2" as strategies and numbers of devices."""
    found = []
    for one in text.split(","):
        strategy, _, count = one.partition(":")
        if not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"on: must be STRATEGY:DEVICES with commas between them, such as auto:1,ddp:2,fsdp2:2, got {text!r}")
        check_strategy_name(strategy)
        found.append((strategy, int(count)))
    return found


def train(recipe: str, strategy: str, devices: int, batch: int, tokens: int, accumulate: int) -> dict[str, float] | str:
    """The last row of a training's metrics, or why there is none."""
    with tempfile.TemporaryDirectory() as root:
        settings: dict[str, Any] = FIXED | {
            "data.seq_len": tokens,
            "data.batch_size": batch,
            "data.val_tokens": tokens,
            "trainer.accumulate_grad_batches": accumulate,
            "trainer.devices": devices,
            "trainer.strategy": strategy,
            "trainer.default_root_dir": root,
        }
        configs = [word for name in recipe.split("+") for word in ("--config", name)]
        command = [sys.executable, "-m", "recipes", "fit", *configs, *(f"--{name}={value}" for name, value in settings.items())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no word")
            return f"exit code {done.returncode}: {said.removeprefix('error: ')}"
        (metrics,) = Path(root).glob(f"*/{METRICS}")
        with metrics.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("tokens_per_second")]
        if not rows:
            return "no speed in its metrics"
        return {name: float(value) for name, value in rows[-1].items() if value}


def row_of(what: tuple[str, str, int, int, int, int], found: dict[str, float], base: float, machine: Machine) -> Training:
    """A row; `base` is what one compares with, in tokens a second."""
    digits = {"tflops_per_second": 1, "mfu": 4, "peak_memory_gib": 2, "data_wait": 4}
    cells = [bench_rows.number(found.get(name), n) for name, n in digits.items()]
    rate = found["tokens_per_second"]
    return Training(*what, bench_rows.number(rate, 1), bench_rows.number(rate / base, 3), *cells, *machine)


def show(rows: list[Training]) -> None:
    """A table on the terminal."""
    first = rows[0]
    title = f"{first.recipe}, {first.batch} x {first.seq_len:,} tokens, {first.accumulate} micro-batches a step"
    table = Table("strategy", title=title, title_justify="left")
    for name in ("devices", "tokens/s", "ratio", "TFLOP/s a device", "MFU", "memory", "waiting for data"):
        table.add_column(name, justify="right")
    for row in rows:
        mfu, wait = (f"{float(x):.1%}" if x else "" for x in (row.mfu, row.data_wait))
        memory = f"{row.peak_memory_gib} GiB" if row.peak_memory_gib else ""
        rate = f"{float(row.tokens_per_second):,.0f}"
        table.add_row(row.strategy, str(row.devices), rate, f"{row.ratio}x", row.tflops_per_second, mfu, memory, wait)
    Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(table)


def _parser() -> Arguments:
    parser = Arguments(
        "python -m recipes bench train",
        f"Tokens a second of whole trainings: `fit` in a process of its own, {WARM_UP} optimizer steps to warm up and {TIMED} that are timed.",
    )
    parser.add_argument("--config", default="quickstart", help="recipes or files, with commas between them; A+B: B over A (%(default)s)")
    parser.add_argument("--shapes", default="4x4096", help="sequences in a micro-batch of a device x tokens, with commas between them (%(default)s)")
    parser.add_argument("--on", default="auto:1", help="strategy:devices, with commas between them, such as auto:1,ddp:2,fsdp2:2 (%(default)s)")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of an optimizer step, of a device (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder whose CSV file the rows are added to (%(default)s)")
    parser.add_argument("--commit", help="the commit that the rows name (default: what git says, or unknown)")
    return parser
