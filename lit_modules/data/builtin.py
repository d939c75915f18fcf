"""The corpus that every machine has: Python's own source, the docstrings of its C modules and pydoc's help topics."""

from __future__ import annotations

import importlib
import inspect
import os
import pydoc
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import final

from mixers.errors import ConfigError

# Third-party packages are not Python's own; tests are repetitive; bytecode is not text.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# The topics come as documents of their own; the second name holds the paths of the machine that built Python.
_SKIPPED_FILES = ("pydoc_data/topics.py", "_sysconfigdata")
# Compiled into CPython everywhere, so that importing them has no effect that is not there already. Distributions
# compile more into theirs (readline writes to the terminal when imported), hence a list and not all there are.
# fmt: off
_C_MODULES = frozenset({
    "_codecs", "_collections", "_functools", "_io", "_operator", "_signal", "_sre", "_thread", "_tracemalloc",
    "_warnings", "atexit", "builtins", "errno", "faulthandler", "gc", "itertools", "marshal", "posix", "sys", "time",
})
# fmt: on


def standard_library() -> Iterator[tuple[str, str]]:
    """(name, text) of every document, in a fixed order: source files, help topics, C modules.

    Raises:
        ConfigError: this Python was installed without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(_source_files(root))
    if not names:
        raise ConfigError(f"data.path: this Python has no standard library source in {root}; give a file or folder")
    for name in names:
        try:
            yield name, (root / name).read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):  # a few old modules are Latin-1; a broken link is no document either
            continue
    yield from _topics()
    for name in sorted(_C_MODULES.intersection(sys.builtin_module_names)):
        yield f"pydoc/{name}", _render(importlib.import_module(name))


def _source_files(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]  # os.walk does not enter the others
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            if name.endswith(".py") and not name.startswith(_SKIPPED_FILES):
                yield name


def _topics() -> Iterator[tuple[str, str]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some minimal installations leave the help texts out
        return
    for name in sorted(topics):
        yield f"pydoc/topics/{name}", topics[name]


@final
class _PlainText(pydoc.TextDoc):
    """pydoc's text without the overstriking that makes names bold in a terminal."""

    def bold(self, text: str) -> str:
        return text


def _render(module: ModuleType) -> str:
    """What `pydoc` prints of the module's functions and classes.

    Never of its data: that would be this process's environment, arguments and paths.
    """
    plain = _PlainText()
    parts = [f"{module.__name__}\n\n{inspect.getdoc(module) or ''}\n"]
    homes = {module.__name__, module.__name__.lstrip("_"), "builtins"}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name.endswith("hook"):  # programs replace sys.excepthook and its like
            continue
        if inspect.isbuiltin(value):
            parts.append(plain.document(value, name))
        elif inspect.isclass(value) and value.__module__ in homes:
            parts.append(f"class {name}\n\n{inspect.getdoc(value) or ''}\n")
            methods = [(key, item) for key, item in sorted(vars(value).items()) if not key.startswith("_")]
            parts += [plain.document(item, key) for key, item in methods if inspect.isroutine(item)]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(parts))  # addresses differ from one process to the next
