"""`diff`: why two runs differ, by their receipts, configs and metrics."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_modules.paths import given_path
from mixers.errors import ConfigError
from recipes.commands.arguments import Arguments
from recipes.commands.config_files import read_config
from recipes.commands.diff_plot import Curve, draw
from recipes.commands.receipt import read_receipt
from recipes.commands.run_folder import CONFIG, METRICS

# in the order in which they explain a difference; what changes no number (times, the command line, folders) is not compared
SECTIONS = (
    *("data", "initial_weights", "config", "resumed", "processes", "strategy"),
    *("versions", "source", "machine", "backends", "tiles", "environment"),
)
VERIFIED = "data.verified"  # how many files of shards were read; no difference of the data, but a reason to doubt that there is none
PLACES = tuple(  # what lies there is compared
    f"config.{key}" for key in ("data.path", "data.val_path", "data.test_path", "trainer.default_root_dir", "checkpoint.dirpath", "ckpt_path")
)
NOTHING = "(none)"


def run(argv: list[str]) -> int:
    """Prints the differences, the most telling ones first; 1 if there are any.

    Raises:
        ConfigError: one is no run; or no difference is recorded and no loss can be compared, so that nobody can say that there is none.
    """
    parser = Arguments("python -m recipes diff", "Why two runs differ: exit code 0 if they do not, 1 if they do, 2 if there is nothing to compare.")
    parser.add_argument("a", help="a run folder, or its receipt.json")
    parser.add_argument("b", help="another one")
    parser.add_argument("--plot", metavar="PNG", help="draw both training losses here, each with the runs that it went on from")
    given = parser.parse_args(argv)
    a, b = read_receipt(given.a, "a"), read_receipt(given.b, "b")
    curves = _curve("a", given.a), _curve("b", given.b)
    if given.plot:
        draw(Path(given.plot), *curves)
    for line in doubts(a, b):
        print(line)
    lines = [*differences(a, b, _configs(given.a, a, given.b, b)), *_outcomes(a, b)]
    if not lines and not curves[0].losses.keys() & curves[1].losses.keys():
        raise ConfigError(f"nothing to compare: no difference is recorded, and {_without_losses(curves)}")
    losses, equal = compare_losses(*(curve.losses for curve in curves))
    print("\n".join([*(lines or ["no difference recorded"]), *losses]))
    return int(bool(lines) or not equal)


def differences(a: dict[str, Any], b: dict[str, Any], configs: tuple[dict[str, Any], dict[str, Any]] | None) -> Iterator[str]:
    """A line for each value that is not the same in two receipts. `configs`: the settings of both runs, where they can be read."""
    places = (*PLACES, "data.path") if a["data"].get("identity") == b["data"].get("identity") else PLACES
    for section in SECTIONS:
        pair = configs if section == "config" and configs is not None else (a.get(section), b.get(section))
        left, right = (flat(value, section) for value in pair)
        for key in dict.fromkeys([*left, *right]):
            if key not in (*places, VERIFIED) and left.get(key) != right.get(key):
                yield f"{key}: {_pair(left.get(key), right.get(key))}"


def doubts(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """A line where not all files of shards of a run are known to have had the checksums of their index."""
    data = a["data"], b["data"]
    shards = [any(key.endswith("_index") for key in about) for about in data]
    words = [str(about.get("verified", "none")) if known else "no shards" for about, known in zip(data, shards, strict=True)]
    if any(known and not _all(text) for known, text in zip(shards, words, strict=True)):
        yield f"note: {VERIFIED}: {_pair(*words)}: what was not read may be other data than its index says"


def _all(verified: str) -> bool:
    """Whether "7 of 10 files" are all."""
    return bool(found := re.fullmatch(r"(\d+) of (\d+) files", verified)) and found[1] == found[2]


def flat(value: Any, key: str) -> dict[str, Any]:
    """The leaves of nested mappings by their dotted keys; empty ones and None are left out."""
    if isinstance(value, dict):
        return {name: leaf for part, inner in value.items() for name, leaf in flat(inner, f"{key}.{part}").items()}
    return {} if value is None or value == [] else {key: value}


def _pair(a: Any, b: Any) -> str:
    return f"a {NOTHING if a is None else a}, b {NOTHING if b is None else b}"


def _outcomes(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    left, right = (f"{r['outcome'].get('state')} at step {r['outcome'].get('step', 'unknown')}" for r in (a, b))
    if left != right:
        yield f"outcome: {_pair(left, right)}"


def _folder(path: str) -> Path:
    given = given_path(path, "run")
    return given if given.is_dir() else given.parent


def _configs(path_a: str, a: dict[str, Any], path_b: str, b: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The configs of both runs; None unless both lie beside their receipts, as they were when the runs began."""
    found = []
    for path, receipt in ((path_a, a), (path_b, b)):
        file = _folder(path) / CONFIG
        if not file.is_file():
            return None
        if hashlib.sha256(file.read_bytes()).hexdigest() != receipt["config"]["sha256"]:
            print(f"note: {file} has been changed since its run; only whether the configs were the same is known")
            return None
        found.append(read_config(file))
    return found[0], found[1]


def compare_losses(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[list[str], bool]:
    """What metrics.csv of two runs say about train/loss, and whether it is the same wherever both have it."""
    common = sorted(a.keys() & b.keys())
    if not common:
        return ["train/loss: not compared: no step has a loss in both runs"], True
    for step in common:
        if a[step] != b[step] and not (a[step] != a[step] and b[step] != b[step]):  # NaN is the same as NaN
            return [f"train/loss: differs first at step {step:,}: a {a[step]!r}, b {b[step]!r} ({b[step] - a[step]:+.3g})"], False
    return [f"train/loss: the same in all {len(common):,} steps that both have"], True


def _curve(name: str, path: str) -> Curve:
    """A run's losses and those of the runs that it went on from; of a step that was taken again, the last one."""
    folders = [_folder(path)]
    while (origin := ((read_receipt(str(folders[0]), name).get("resumed") or {}).get("receipt"))) and Path(origin).is_file():
        folders.insert(0, Path(origin).parent)
    parts = [_losses(folder / METRICS) for folder in folders]
    losses = {step: loss for part in parts for step, loss in part.items()}
    return Curve(f"{name}: {folders[-1].absolute().name}", losses, [min(part) for part in parts[1:] if part])


def _without_losses(curves: tuple[Curve, Curve]) -> str:
    empty = [curve.label for curve in curves if not curve.losses]
    return f"{METRICS} of {' and of '.join(empty)} has no train/loss" if empty else "no step has a train/loss in both runs"


def _losses(file: Path) -> dict[int, float]:
    if not file.is_file():
        return {}
    try:
        with file.open(encoding="utf-8", newline="") as table:
            return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(table) if row.get("train/loss")}
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file}: is not a table of metrics: {' '.join(str(error).split())}") from error
