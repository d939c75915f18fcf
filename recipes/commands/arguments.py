"""argparse with errors in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from recipes.commands.parser_errors import explain


class Arguments(argparse.ArgumentParser):
    """A parser that raises ConfigError where argparse prints its usage and exits; no abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise explain(message, [action.dest for action in self._actions if action.dest != "help"])

    def given(self, argv: Sequence[str]) -> set[str]:
        """The names of the options in an argv that can be parsed, those with their default's value too."""
        nothing = argparse.Namespace(**dict.fromkeys(action.dest for action in self._actions))
        return {name for name, value in vars(self.parse_args(argv, nothing)).items() if value is not None}
