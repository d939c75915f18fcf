"""The one error that means "the user can mend this": the command line prints it as one line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting, file or checkpoint that cannot be used. The message is one line: the key, what is wrong, what is legal."""


def unknown(key: str, what: str, name: object, legal: Iterable[str]) -> ConfigError:
    """The error for a name that is not among `legal`: says the key, the nearest match and every legal value."""
    names = sorted(legal)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ConfigError(f"{key}: unknown {what} {str(name)!r}{hint} (legal: {', '.join(names) or 'none'})")
