"""The parser's complaints, which take many lines, in one: the key, what is wrong, what is legal."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable

from mixers.errors import ConfigError

_UNKNOWN = (
    r"^Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'",
    r"^Option '(?P<key>[^']+)' is not accepted",
    r"^unrecognized arguments: --(?P<key>[^\s=]+)",
)


def explain(message: str, legal: Iterable[str]) -> ConfigError:
    """The error that a user reads for a parser's message; `legal` are all keys."""
    for pattern in _UNKNOWN:
        found = re.search(pattern, message)
        if found:
            return unknown_key(".".join(filter(None, (found.groupdict().get("group"), found["key"]))), legal)
    if found := re.match(r"the following arguments are required: (.+)", message):
        first, *others = found[1].replace("--", "").split(", ")
        also = f", and so must {', '.join(others)}" if others else ""
        hint = "; give a --config" if first.startswith("model.") else ""
        return ConfigError(f"{first}: must be set{also}{hint}")
    if found := re.match(r"argument --(\S+): (.+)", message, re.DOTALL):
        return ConfigError(f"{found[1]}: {_squeeze(found[2])}")
    if found := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        return ConfigError(_of_entry(found[1], found[2]) or f"{found[1]}: {_reason(found[2])}")
    return ConfigError(_squeeze(message))


def readable(message: str) -> str:
    """A parser's message about a value, wherever it stands in a longer one, as `key: expected int, got wide`."""
    return _squeeze(re.sub(r': Parser key "(\w+)":\s*', r".\1: ", message))


def unknown_key(key: str, legal: Iterable[str]) -> ConfigError:
    """The error for a key that is none of `legal`: the nearest one, or else those of its group."""
    keys = sorted(legal)
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    if close:
        return ConfigError(f"{key}: unknown key; did you mean {close[0]!r}?")
    group = key.rpartition(".")[0]
    beside = sorted({k.removeprefix(f"{group}.").partition(".")[0] for k in keys if not group or k.startswith(f"{group}.")})
    return ConfigError(f"{key}: unknown key (legal{f' in {group}' if group else ''}: {', '.join(beside) or 'none'})")


def _of_entry(key: str, text: str) -> str | None:
    """What is wrong where an entry of a mapping of mappings is none: that entry, not all of them."""
    given = re.search(r"Given value: (.*)\Z", text, re.DOTALL)
    if given is None or not re.search(r"Expected a <class 'dict'>", text):
        return None
    try:
        entries = ast.literal_eval(given[1].strip())
    except (SyntaxError, ValueError):
        return None
    if not isinstance(entries, dict):
        return None
    wrong = next(((name, value) for name, value in entries.items() if value is not None and not isinstance(value, dict)), None)
    return None if wrong is None else f"{key}.{wrong[0]}: expected dict, got {wrong[1]!r}"


def _reason(text: str) -> str:
    """Why a value does not fit. Of a union's reasons those that say most; its members if none says more than that."""
    given = re.search(r"Given value: (.*)\Z", text, re.DOTALL)
    if given is None:
        return _squeeze(text)
    value = _squeeze(given[1])
    value = value if len(value) <= 80 else f"{value[:77]}..."
    reasons = text.partition("Errors:")[2].partition("Given value type:")[0].split("\n    - ")
    telling = [_squeeze(reason) for reason in reasons if re.search(r"Problem with|Got value|dot import path", reason)]
    types = re.search(r"Subtypes: \[(.*)\]", text)
    return f"got {value}: {'; '.join(telling) if telling else 'expected ' + _squeeze(types[1] if types else text)}"


def _squeeze(text: str) -> str:
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r"Expected an? (\w+)\. Got value: ", r"expected \1, got ", text)
    return " ".join(text.split())
