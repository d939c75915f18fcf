"""`mixers`: every mixer by name, with its settings, the size of its state, and where it comes from. Does not import Lightning."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixers import registry
from mixers.base import SequenceMixer, at_least
from mixers.errors import ConfigError
from recipes.commands.arguments import Arguments
from recipes.commands.config_files import dig, find_config, merge, read_config


class Row(NamedTuple):
    """A mixer that can be named in a layout, or why it cannot."""

    name: str
    settings: str
    states: list[str]  # for each number of tokens
    origin: str


def run(argv: list[str]) -> int:
    """Prints the table."""
    given = _parser().parse_args(argv)
    at_least(1, d_model=given.d_model)
    tokens = _numbers(given.tokens)
    config: dict[str, Any] = {}
    for name in given.config:
        config = merge(config, read_config(find_config(name)))
    settings, layout = dig(config, "model.lm.mixers") or {}, dig(config, "model.lm.layout") or []
    d_model = dig(config, "model.lm.d_model") or given.d_model
    if not isinstance(settings, dict) or not isinstance(layout, list):
        raise ConfigError("config: model.lm.mixers must be a mapping and model.lm.layout a list")
    names = dict.fromkeys([*registry.available(), *settings, *map(str, layout), *given.names])
    title = f"Mixers (state: numbers a layer and sequence, at d_model {d_model})"
    table = Table("mixer", "settings", *(f"state at {n:,}" for n in tokens), "from", title=title, title_justify="left")
    for row in (describe(name, settings, d_model, tokens) for name in names):
        table.add_row(row.name, escape(row.settings), *row.states, escape(row.origin), end_section=True)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    return 0


def describe(name: str, settings: Mapping[str, Any], d_model: int, tokens: list[int]) -> Row:
    """The row of a mixer: settings as in `settings`, else their defaults."""
    none = ["-"] * len(tokens)
    try:
        own = settings.get(name) or {}
        origin = f"alias of {own['mixer']}" if "mixer" in own else registry.find(name).origin
        cls = _class(own.get("mixer", name))
    except Exception as error:  # a plug-in may raise anything as it is imported, and must not hide the others
        return Row(name, f"{type(error).__name__}: {' '.join(str(error).split())}", none, "cannot be used")
    parameters = registry.settings_of(cls)
    try:
        _, values = registry.resolve(name, settings)
        with torch.device("meta"):
            mixer = registry.build(name, d_model, settings)
        states = [f"{mixer.state_numel(n):,}" for n in tokens]
    except ConfigError as error:  # a setting without a default, or one that does not fit d_model
        lines = [*map(str, parameters.values()), f"(no state: {error})"]
        return Row(name, "\n".join(lines), none, origin)
    return Row(name, "\n".join(f"{key}: {_type(parameters[key])} = {value}" for key, value in values.items()), states, origin)


def _type(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _class(name: str) -> type[SequenceMixer[Any]]:
    return registry.load(registry.find(name), key=f"mixers.{name}")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"tokens: must be integers with commas between them, such as 1024,4096, got {text!r}") from None
    for number in numbers:
        at_least(1, tokens=number)
    return numbers


def _parser() -> Arguments:
    parser = Arguments("python -m recipes mixers", "Lists mixers with their settings, the size of their state, and where they come from.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="further mixers by dotted path, such as my_pkg.MyMixer")
    parser.add_argument("-c", "--config", action="append", default=[], help="a file or recipe whose mixers and settings are shown as well")
    parser.add_argument("--tokens", default="1024,4096,32768", help="lengths that the size of the state is given for (%(default)s)")
    parser.add_argument("--d_model", type=int, default=2048, help="width that it is given for, without a config (%(default)s)")
    return parser
