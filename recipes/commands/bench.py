"""`bench`: how fast ops, layers, decoding and trainings are on this GPU, beside other implementations; what tiles are fast; plots of rows."""

from __future__ import annotations

from importlib import import_module

from mixers.errors import ConfigError, unknown

COMMANDS = {
    "op": ("bench_ops", "the ops, forward and backward"),
    "layer": ("bench_layer", "whole mixers under autocast"),
    "decode": ("bench_decode", "a decode step, in a CUDA graph and eager, beside a copy of the state"),
    "train": ("bench_train", "whole trainings, tokens a second, on one device and on several"),
    "tune": ("bench_tune", "candidates for the rows of a tile table"),
    "plot": ("bench_plot", "docs/benchmarks.md and its plots from the rows"),
}


def run(argv: list[str]) -> int:
    """Runs a subcommand."""
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"bench: say what to time first (legal: {', '.join(COMMANDS)})")
    if argv[0] not in COMMANDS:
        raise unknown("bench", "benchmark", argv[0], COMMANDS)
    code: int = import_module(f"recipes.commands.{COMMANDS[argv[0]][0]}").run(argv[1:])
    return code


def usage() -> str:
    """The text of `--help`."""
    lines = [f"  {name:<8} {what}" for name, (_, what) in COMMANDS.items()]
    example = "  example: python -m recipes bench op --baseline fla,sdpa --shapes 8x2048,1x16384"
    return "\n".join(["usage: python -m recipes bench WHAT ...", "", *lines, "", "  options: bench WHAT --help", example])
