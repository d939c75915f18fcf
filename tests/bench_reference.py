"""Times the two plain-torch forms of the delta rule on the CPU: `python tests/bench_reference.py`.

Prints a table and rewrites docs/benchmarks/reference_cpu.csv. The two forms take turns, so that what else the machine does meets both; a figure is
the median over the turns.
"""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkout beside this file, installed or not

from kernels.delta.reference import chunkwise, recurrent  # noqa: E402

TABLE = ROOT / "docs/benchmarks/reference_cpu.csv"
BATCH, TOKENS, HEADS, DK, DV, THREADS, TURNS = 1, 1024, 4, 64, 64, 2, 9
WIDTHS = {  # channels of g, b, w; 0: absent
    "gdn2": (DK, DK, DV),
    "kda": (DK, 1, 1),
    "gdn": (1, 1, 1),
    "deltanet": (0, 1, 1),
    "gla": (DK, 0, 0),
}
IMPLEMENTATIONS = {"recurrent": recurrent, "chunkwise": chunkwise}
Function = Callable[..., tuple[Tensor, Tensor]]


class Row(NamedTuple):
    """A line of the table; times in milliseconds, the first call (forward and backward) in seconds."""

    what: str
    impl: str
    batch: int
    tokens: int
    heads: int
    dk: int
    dv: int
    dtype: str
    fwd_ms: float
    fwd_bwd_ms: float
    extra_mib: str  # not measured on a CPU
    first_call_s: float
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


def inputs(what: str) -> list[Tensor | None]:
    """q, k, v, g, b, w as a trained layer has them: keys of length 1, gates from a softplus and sigmoids."""
    generator = torch.Generator().manual_seed(0)

    def normal(channels: int) -> Tensor:
        return torch.randn(BATCH, TOKENS, HEADS, channels, generator=generator)

    q, k, v = F.normalize(normal(DK), dim=-1), F.normalize(normal(DK), dim=-1), normal(DV)
    g, b, w = (normal(channels) if channels else None for channels in WIDTHS[what])
    return [q, k, v, *(None if x is None else act(x) for x, act in ((g, lambda x: -F.softplus(x)), (b, torch.sigmoid), (w, torch.sigmoid)))]


def seconds(function: Function, tensors: list[Tensor | None], *, backward: bool) -> float:
    """One forward, with or without a backward to every input."""
    leaves = [None if x is None else x.detach().requires_grad_(backward) for x in tensors]
    start = time.perf_counter()
    o, state = function(*leaves)
    if backward:
        (o.sum() + state.sum()).backward()
    return time.perf_counter() - start


def measure(what: str) -> list[Row]:
    tensors = inputs(what)
    first = {name: seconds(function, tensors, backward=True) for name, function in IMPLEMENTATIONS.items()}
    times: dict[tuple[str, bool], list[float]] = {(name, backward): [] for name in IMPLEMENTATIONS for backward in (False, True)}
    for _ in range(TURNS):
        for name, backward in times:
            times[name, backward].append(1000 * seconds(IMPLEMENTATIONS[name], tensors, backward=backward))
    forward, both = ({name: round(statistics.median(times[name, backward]), 2) for name in IMPLEMENTATIONS} for backward in (False, True))
    sizes = (BATCH, TOKENS, HEADS, DK, DV, "float32")
    return [Row(what, name, *sizes, forward[name], both[name], "", round(first[name], 3), *machine()) for name in IMPLEMENTATIONS]


def machine() -> tuple[str, str, str, str, str]:
    """Processor, torch, triton, commit and date."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = f"{names[0] if names else platform.processor()}, {THREADS} threads"
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT, capture_output=True, text=True)
    triton = version("triton") if platform.system() == "Linux" else ""
    return processor, torch.__version__, triton, found.stdout.strip(), datetime.now(UTC).date().isoformat()


def main() -> None:
    torch.set_num_threads(THREADS)
    rows: list[Row] = []
    print(f"{BATCH} x {TOKENS} tokens, {HEADS} heads, K = {DK}, V = {DV}, float32, {THREADS} threads; milliseconds, median of {TURNS}")
    print(f"{'':10}{'forward':>30}{'forward + backward':>32}")
    print(f"{'':10}" + 2 * f"{'recurrent':>12}{'chunkwise':>12}{'ratio':>7}")
    for what in WIDTHS:
        measured = measure(what)
        slow, fast = measured
        cells = ((slow.fwd_ms, fast.fwd_ms), (slow.fwd_bwd_ms, fast.fwd_bwd_ms))
        print(f"{what:10}" + "".join(f"{a:12.1f}{b:12.1f}{a / b:6.1f}x" for a, b in cells), flush=True)
        rows += measured
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
