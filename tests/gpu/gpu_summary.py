"""The page that `make test-gpu` writes: what was tested where, how it went, what took longest."""

from __future__ import annotations

import os
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
OUTCOMES = ("passed", "failed", "error", "skipped")
SLOWEST = 15
BESIDE = "beside"  # the property of a test that has held our errors against another implementation's: {tensor: [ours, theirs]}


class Outcome(NamedTuple):
    """What came of one phase of a test that counts."""

    test: str  # path::name
    outcome: str
    seconds: float
    beside: Mapping[str, Sequence[float]] = {}  # errors of ours and of a peer, by tensor


class Facts(NamedTuple):
    """Where the tests ran."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str
    cores: int = 1


def facts(commit: str | None = None) -> Facts:
    """Those of this machine."""
    import torch
    import triton

    from recipes.commands.machine import driver_version

    count = torch.cuda.device_count()
    gpu = f"{count} x {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name() if count else "none"
    driver = driver_version(Path("/proc/driver/nvidia/version")) or "none"
    return Facts(gpu, driver, torch.__version__, triton.__version__, commit or _commit(), datetime.now(UTC).date().isoformat(), os.cpu_count() or 1)


def _commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def _beside(one: Outcome) -> str:
    name = max(one.beside, key=lambda tensor: one.beside[tensor][0] / max(one.beside[tensor][1], 1e-30))
    largest = [max(pair[i] for pair in one.beside.values()) for i in (0, 1)]
    return f"| `{one.test.rpartition('/')[2]}` | {name} | {' | '.join(f'{x:.2e}' for x in (*one.beside[name], *largest))} |"


def page(where: Facts, outcomes: Iterable[Outcome], seconds: float, processes: int) -> str:
    """Markdown."""
    outcomes = list(outcomes)
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for one in outcomes:
        by_file[one.test.partition("::")[0]][one.outcome] += 1
    total = Counter(one.outcome for one in outcomes)
    verdict = "FAILED" if total["failed"] + total["error"] else "passed" if total["passed"] else "nothing was tested"
    lines = ["# Tests on a GPU", "", f"Written by `make test-gpu`. The kernels' tests, on the GPU: **{verdict}**.", ""]
    names = {"commit": where.commit, "date": where.date, "GPU": where.gpu, "driver": where.driver, "torch": where.torch, "triton": where.triton}
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in names.items())]
    tests = sum(one.seconds for one in outcomes)
    lines += [f"| duration | {seconds:.0f} s in {processes} processes on {where.cores} cores; one after the other {tests:,.0f} s |", ""]
    lines += [f"| file | {' | '.join(OUTCOMES)} |", f"|---|{'---:|' * len(OUTCOMES)}"]
    lines += [f"| {file} | {' | '.join(str(counts[o]) for o in OUTCOMES)} |" for file, counts in sorted(by_file.items())]
    lines += [f"| **all** | {' | '.join(str(total[o]) for o in OUTCOMES)} |", ""]
    broken = sorted({one.test for one in outcomes if one.outcome in ("failed", "error")})
    lines += ["Failed:", "", *(f"- `{test}`" for test in broken), ""] if broken else []
    compared = sorted(one for one in outcomes if one.beside)
    if compared:
        lines += [
            "Errors against float64 (relative, Euclidean norm) on the same inputs: of the tensor whose error is largest beside a peer's, and of all.",
            "",
        ]
        lines += ["| test | tensor | ours | peer's | largest, ours | largest, peer's |", "|---|---|---:|---:|---:|---:|", *map(_beside, compared), ""]
    slow = sorted((one for one in outcomes if one.outcome != "skipped"), key=lambda one: -one.seconds)[:SLOWEST]
    lines += ["| slowest | seconds |", "|---|---:|", *(f"| `{one.test}` | {one.seconds:.1f} |" for one in slow)] if slow else []
    return "\n".join(lines).rstrip() + "\n"
