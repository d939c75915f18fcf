"""Paths that a user has given."""

from __future__ import annotations

from pathlib import Path

from mixers.errors import ConfigError

SHOWN = 100  # characters


def given_path(path: str | Path, key: str) -> Path:
    """A path with its `~` resolved, whether or not there is anything.

    Raises:
        ConfigError: the system takes it for none: too long, the home of a user that is not here, in a folder that may not be read.
    """
    try:
        found = Path(path).expanduser()
        found.exists()
    except (OSError, RuntimeError) as error:
        text = str(path)
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
        raise ConfigError(f"{key}: {shown} cannot be looked up: {getattr(error, 'strerror', None) or str(error).rstrip('.')}") from error
    return found
