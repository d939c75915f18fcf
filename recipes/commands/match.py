"""`match`: the MLP width that gives a config a wanted number of parameters in the blocks, and its recurrent state beside the paper's."""

from __future__ import annotations

import sys
from decimal import Decimal, InvalidOperation
from typing import NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table

from lit_modules.decoder_lm import Block, DecoderLM
from mixers import registry
from mixers.errors import ConfigError
from recipes.commands import sizes
from recipes.commands.arguments import Arguments
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import collect, dig, merge
from recipes.commands.plan import MOST_PARAMETERS, make_plan

MULTIPLE = 64  # of the width: what matrix kernels like
TOLERANCE = 0.005
PAPER_STATE = 16 * 128 * 128  # recurrent numbers a layer and sequence in every model of arXiv 2605.22791
PAPER_D_MODEL = 2048  # the width at which its appendix compares states


class Match(NamedTuple):
    """A width of the MLPs and what it gives."""

    width: int
    parameters: int  # in the blocks
    target: int

    @property
    def off(self) -> float:
        """Distance from the target, relative to it."""
        return self.parameters / self.target - 1


def run(argv: list[str]) -> int:
    """Prints the width and the states; the arguments are those of `fit`, and --to."""
    given, rest = _parser().parse_known_args(argv)
    target = _target(given.to)
    request = collect([token for name in given.config for token in ("--config", name)] + rest)
    if request.option("ckpt_path") is not None:
        raise ConfigError("ckpt_path: match takes a config, not a checkpoint")
    if dig(request.config, "model.lm.mlp_width") is None:  # any will do
        request = request._replace(config=merge(request.config, {"model": {"lm": {"mlp_width": MULTIPLE}}}))
    lm = make_plan(MixersCLI("preflight", request).config, needs_tokenizer=False).model.lm
    found, now = solve(lm, target), at_width(lm, lm.settings["mlp_width"], target)
    lines = {
        "target": f"{target:,} parameters in the blocks",
        "mlp_width": f"{found.width:,} (a multiple of {MULTIPLE}) gives {_size(found)}",
        "now": "the same" if now == found else f"{now.width:,} gives {_size(now)}",
    }
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for name, value in lines.items():
        console.print(f"{name:<10} {value}", soft_wrap=True, markup=False)
    console.print("", state_table(lm), sep="\n")
    for note in state_notes(lm):
        console.print(note, soft_wrap=True, markup=False)
    return 0


def solve(lm: DecoderLM, target: int) -> Match:
    """The width nearest to `target` parameters in the blocks; that of `lm` itself does not matter.

    Raises:
        ConfigError: no multiple of 64 comes within 0.5 %.
    """
    fixed, per_unit = _line(lm)
    width = max(MULTIPLE, round((target - fixed) / per_unit / MULTIPLE) * MULTIPLE)
    found = at_width(lm, width, target)
    if abs(found.off) <= TOLERANCE:
        return found
    if fixed > target:
        raise ConfigError(f"to: {target:,} is less than the {fixed:,} parameters that the blocks have without their MLPs")
    near = [at_width(lm, w, target) for w in (width - MULTIPLE, width, width + MULTIPLE) if w > 0]
    tried = ", ".join(f"mlp_width {m.width:,} gives {_size(m)}" for m in sorted(near, key=lambda m: abs(m.off))[:2])
    raise ConfigError(f"to: no multiple of {MULTIPLE} comes within {100 * TOLERANCE} % of {target:,}: {tried}")


def at_width(lm: DecoderLM, width: int, target: int) -> Match:
    """What `lm` would be with MLPs of another width."""
    fixed, per_unit = _line(lm)
    return Match(width, fixed + per_unit * width, target)


def recurrent_numbers(lm: DecoderLM) -> dict[str, int | None]:
    """By mixer, the numbers that a layer's recurrence carries for one sequence: without convolutions and caches; None where it has no recurrence."""
    states = zip(lm.layer_names, lm.init_state(1, max_tokens=1, device="meta"), strict=True)
    return {name: _recurrent(state) for name, state in states}


def state_table(lm: DecoderLM) -> Table:
    """Every mixer's recurrent state, beside the paper's."""
    table = Table(title="State, numbers a layer and sequence", title_justify="left")
    table.add_column("mixer")
    for column in ("recurrent", f"beside {PAPER_STATE:,}", f"recurrent at d_model {PAPER_D_MODEL:,}", "other state at 4,096 tokens"):
        table.add_column(column, justify="right")
    for name, number in recurrent_numbers(lm).items():
        mixer = lm.mixers()[lm.layer_names.index(name)]
        other = at_paper_width(lm, name)
        ratio = "-" if number is None else "equal" if number == PAPER_STATE else f"{100 * (number / PAPER_STATE - 1):+.1f} %"
        table.add_row(name, _number(number), ratio, _number(other), f"{mixer.state_numel(4096) - (number or 0):,}")
    return table


def state_notes(lm: DecoderLM) -> list[str]:
    """A line for each mixer whose recurrent state is not the paper's."""
    notes = []
    for name, number in recurrent_numbers(lm).items():
        if number is not None and number != PAPER_STATE:
            also = f"; at d_model {PAPER_D_MODEL:,} it is equal" if at_paper_width(lm, name) == PAPER_STATE else ""
            notes.append(f"note: {name} carries {number:,} numbers at d_model {lm.settings['d_model']:,}, not {PAPER_STATE:,}{also}")
    return notes


def at_paper_width(lm: DecoderLM, name: str) -> int | None:
    """The recurrent state that the mixer `name` of `lm` would have at the paper's d_model; None where there is none."""
    try:
        with torch.device("meta"):
            return _recurrent(registry.build(name, PAPER_D_MODEL, lm.settings["mixers"]).init_state(1, max_tokens=1, device="meta"))
    except ConfigError:  # heads that do not divide that width
        return None


def _recurrent(state: tuple[torch.Tensor, ...]) -> int | None:
    """The numbers in the one tensor that a recurrence sums up; None for a state that has none."""
    sums = [getattr(state, name).numel() for name in ("S", "u") if hasattr(state, name)]
    return sum(sums) if sums else None


def _line(lm: DecoderLM) -> tuple[int, int]:
    """Parameters in the blocks are the first number plus the second times the width of the MLPs."""
    mlps = sum(sizes.count(block.mlp) for block in cast(list[Block], list(lm.layers)))
    return sizes.parameters_in_blocks(lm) - mlps, mlps // int(lm.settings["mlp_width"])


def _size(match: Match) -> str:
    return f"{match.parameters:,} ({100 * match.off:+.2f} %)"


def _number(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _target(text: str) -> int:
    """`--to` as a whole number: 1.3e9, 1_300_000_000."""
    try:
        number = Decimal(text.replace("_", ""))
    except InvalidOperation:
        number = Decimal(0)
    if not number.is_finite() or not 1 <= number <= MOST_PARAMETERS or number != number.to_integral_value():
        raise ConfigError(f"to: must be a number of parameters such as 1.3e9 (at most {MOST_PARAMETERS:.0e}), got {text!r}")
    return int(number)


def _parser() -> Arguments:
    parser = Arguments(
        "python -m recipes match",
        f"Finds the model.lm.mlp_width (a multiple of {MULTIPLE}) that gives a config so many parameters in its blocks, within {100 * TOLERANCE} %; "
        "embedding, final norm and head do not count. Also takes every option of fit.",
    )
    parser.add_argument("-c", "--config", action="append", default=[], help="a file or recipe; repeatable, as for fit")
    parser.add_argument("--to", required=True, metavar="N", help="parameters in the blocks, such as 1.3e9")
    return parser
