"""`doctor`: what this machine will run the ops on, proof that the kernels are right here, and what to mend."""

from __future__ import annotations

import platform
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mixers.errors import ConfigError
from recipes.commands import machine
from recipes.commands.arguments import Arguments

if TYPE_CHECKING:  # another package called `kernels` may lie in the way of ours
    import torch

    from recipes.commands.checks import Result, Trial

ADVICE_INDENT = "  "


def run(argv: list[str]) -> int:
    """Prints what was found; 1 if a check failed."""
    given = _parser().parse_args(argv)
    if not machine.ours_is_imported():
        raise ConfigError(f"kernels: another package of this name is in the way ({machine.find_clash() or 'see sys.path'}): pip uninstall kernels")
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    found = machine.inspect()
    for name, value in versions(found).items():
        console.print(f"{name:<12} {value}", soft_wrap=True, markup=False)
    console.print()
    console.print(backend_table(found.usable))
    results = examine(console, gpu=found.usable, recheck=given.recheck)
    return conclude(console, found, results)


def versions(found: machine.Machine) -> dict[str, str]:
    """What is installed and what it runs on, a line each."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if found.usable else []
    capability = f", compute capability {'.'.join(map(str, found.capability))}" if found.capability else ""
    build = f"CUDA {found.torch_cuda}" if found.torch_cuda else "CPU build"
    return {
        "project": f"lightning-mixers {machine.installed('lightning-mixers') or '(not installed)'}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} ({build})",
        "triton": found.triton or "none",
        "lightning": machine.installed("lightning") or "none",
        "fla": machine.installed("fla-core", "flash-linear-attention") or "none (only bench --baseline fla needs it)",
        "GPU": (f"{' and '.join(gpus)}{capability}") if gpus else "none that torch can use",
        "driver": found.driver or "none",
    }


def backend_table(usable: bool) -> Table:
    """The backend of each op for tensors of a training on this machine, and why."""
    import torch

    from kernels import backend as backends
    from recipes.commands.checks import ops

    device = torch.device("cuda" if usable else "cpu")
    table = Table("op", "backend", "why", title=f"Backends for tensors on {device.type}", title_justify="left")
    for op in ops():
        chosen = backends.resolve(op, "auto", device)
        why = backends.why_not(op, device) or ("its kernels run here; the reference, where an argument asks for it" if chosen == "triton" else "")
        table.add_row(op, chosen, why)
    return table


def examine(console: Console, *, gpu: bool, recheck: bool) -> list[Result]:
    """Runs what has not passed here before; a line for each op."""
    import torch

    from recipes.commands import checks, verdict

    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    trials = checks.select() if gpu else checks.quick()
    console.print(f"\n{title(trials, device)}", markup=False)
    its = Counter(trial.check.op for trial in trials)
    heard: dict[str, list[tuple[Result, bool]]] = {op: [] for op in its}

    def hear(result: Result, known: bool) -> None:
        op = result.label.partition(":")[0]
        heard[op].append((result, known))
        if len(heard[op]) == its[op]:
            tell(console, op, heard[op])

    # all at once, so that no process waits for the last case of an op
    return verdict.prove(sorted(trials, key=lambda trial: list(its).index(trial.check.op)), device, recheck=recheck, say=hear)


def tell(console: Console, op: str, heard: list[tuple[Result, bool]]) -> None:
    """The line of an op, and one for each of its checks that failed. With each result goes whether it was known."""
    console.print(f"  {op:<20} {summary([result for result, _ in heard], sum(known for _, known in heard))}", markup=False)
    for result, _ in heard:
        if not result.passed:
            console.print(f"    FAILED {result.label}: {reason(result)}", markup=False, soft_wrap=True)


def title(trials: list[Trial], device: torch.device) -> str:
    """What is about to be checked."""
    what = "kernels, with the tiles that they run with on this GPU," if device.type == "cuda" else "plain-torch reference"
    wait = "; the first time takes minutes, most of them compiling" if device.type == "cuda" else ""
    return f"Checking the {what} against float64: {len(trials)} cases, forward and backward{wait}"


def summary(results: list[Result], known: int) -> str:
    """How the checks of an op went."""
    failed, on_reference = sum(not r.passed for r in results), sum(r.passed and r.worst is None for r in results)
    worst = max((r.worst for r in results if r.worst is not None), default=None)
    parts = [f"{failed} of {len(results)} FAILED" if failed else f"{len(results)} passed"]
    parts += [f"largest error {worst:.1e}"] if worst is not None else []
    parts += [f"{on_reference} of them on the reference"] if on_reference else []
    parts += [f"{known} known from before (--recheck repeats them)"] if known else []
    return ", ".join(parts)


def reason(result: Result) -> str:
    """Why a check failed."""
    return result.note if result.worst is None else f"{result.note} is off by {result.worst:.1e} of its largest entry"


def conclude(console: Console, found: machine.Machine, results: list[Result]) -> int:
    """The verdict and what to mend."""
    lines = machine.advice(found)
    if lines:
        console.print("\nTo mend:", markup=False)
        for line in lines:
            console.print(textwrap.indent(f"- {line}", ADVICE_INDENT), markup=False, soft_wrap=True)
    failed = sum(not result.passed for result in results)
    if failed:
        console.print(f"\n{failed} checks failed: fit will not start on this GPU" if found.usable else f"\n{failed} checks failed", markup=False)
        return 1
    device = "the kernels are right on this GPU" if found.usable else "the reference is right here, and is what runs on a CPU"
    console.print(f"\nAll {len(results)} checks passed: {device}", markup=False)
    return 0


def _parser() -> Arguments:
    parser = Arguments("python -m recipes doctor", "Says what the ops run on here, proves the kernels against float64, and names what to mend.")
    parser.add_argument("--recheck", action="store_true", help="repeat the checks that have passed here before")
    return parser
