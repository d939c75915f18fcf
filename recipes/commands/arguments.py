"""argparse with errors in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from recipes.commands.parser_errors import explain


class Arguments(argparse.ArgumentParser):
    """A parser that raises ConfigError where argparse prints its usage and exits; no abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise explain(message, [action.dest for action in self._actions if action.dest != "help"])
