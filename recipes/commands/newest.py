"""Which checkpoint `last` and `auto` mean: that of the newest run. Where it is gone, no older one stands in for it."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_modules.intact import last_good, old_of
from lit_modules.paths import given_path
from lit_modules.saving import DIVERGED
from lit_modules.saving import LAST as LAST_FILE
from mixers.errors import ConfigError
from recipes.commands.receipt import read_receipt
from recipes.commands.run_folder import CHECKPOINTS, CONFIG, STAMP

LAST = "last"
AUTO = "auto"  # last, or the beginning where no run has saved anything yet


def find_checkpoint(path: str, *roots: Path, place: Path | None = None) -> Path:
    """The file or folder of a checkpoint; `last` (or `auto`) is the `last.ckpt` of the newest run in `roots` that has saved anything.

    Args:
        path: what the user has given.
        roots: folders of runs.
        place: a folder where runs save, in place of their own.

    Raises:
        ConfigError: there is none. No other one is taken in its place, but the newest that is whole is named.
    """
    if path not in (LAST, AUTO):
        found = given_path(path, "ckpt_path")
        if not found.exists():
            raise ConfigError(f"ckpt_path: {path} does not exist (legal: a checkpoint, last or auto){last_good(beside(found))}")
        return found
    saved = saved_by(*roots) if place is None else saved_in(place)
    if not {LAST_FILE, old_of(Path(LAST_FILE)).name} & {file.name for file in saved}:
        where = ", ".join(map(str, roots if place is None else [place])) or "runs"
        raise ConfigError(f"ckpt_path: no run in {where} has a {LAST_FILE} to go on from{last_good({'': saved})}")
    last = max({file.parent for file in saved}, key=lambda folder: _began(folder.parent)) / LAST_FILE
    if last.exists():
        return last
    if not old_of(last).is_dir():
        raise ConfigError(f"ckpt_path: {last} does not exist, and its run is the newest{last_good(beside(last))}")
    rank_zero_only(print)(f"checkpoint: the run ended while {last} was replaced: going on from {old_of(last)}, which was there before", flush=True)
    return old_of(last)


def saved_in(*folders: Path) -> list[Path]:
    """The checkpoints in some folders that a training may go on from."""
    return [file for folder in folders for file in folder.glob("*.ckpt") if file.name != DIVERGED]


def saved_by(*roots: Path) -> list[Path]:
    """Those of all runs in folders of runs."""
    return saved_in(*(folder for root in roots for folder in root.glob(f"*/{CHECKPOINTS}")))


def beside(path: Path) -> dict[str, list[Path]]:
    """The other checkpoints of a run, and those of the runs beside it; of a checkpoint that lies elsewhere those in its folder. For `last_good`."""
    folder = path.absolute().parent
    there = [file for file in saved_in(folder) if file != path.absolute()]
    if folder.name != CHECKPOINTS:
        return {"beside it, which may be of another run, ": there}
    others = [file for file in saved_by(*folder.parents[1:2]) if file.parent != folder]
    return {"of this run ": there, "of another run ": others}


def _began(run: Path) -> tuple[float, int, float, str]:
    """When a run began, in seconds. Its receipt says so, or else its name; not when its files were written, which copies and editors change. A folder
    with neither is none of ours: then its config's time.

    Behind that, for a copy made while it went on and for runs of one second, at which step it ended, when it saved last, and its name, which has a
    number then.
    """
    saved = max((file.stat().st_mtime for file in saved_in(run / CHECKPOINTS)), default=0.0)
    with suppress(ConfigError, KeyError, TypeError, ValueError, RecursionError):
        about = read_receipt(run, "ckpt_path")
        return datetime.fromisoformat(about["started"]).timestamp(), int(about["outcome"].get("step") or 0), saved, run.name
    with suppress(ValueError):
        return datetime.strptime(run.name[: len("2026-01-31_23-59-59")], STAMP).timestamp(), 0, saved, run.name
    config = run / CONFIG
    return (config if config.is_file() else run).stat().st_mtime, 0, saved, run.name


def newest_run(roots: list[Path]) -> Path | None:
    """The run that began last, whether or not it has saved anything."""
    return max((config.parent for root in roots for config in root.glob(f"*/{CONFIG}")), key=_began, default=None)


def check_there(roots: list[Path], place: Path | None) -> None:
    """ConfigError if the newest run has lost all its checkpoints, or has them where nobody looks: what an older one has is not where it ended.

    Args:
        roots: folders of runs.
        place: where checkpoints are looked for, in place of the runs' own folders.
    """
    run = newest_run(roots)
    if run is None:
        return
    try:
        config = yaml.safe_load((run / CONFIG).read_bytes())
        saves = given_path(config["checkpoint"]["dirpath"] or run / CHECKPOINTS, "checkpoint.dirpath")
        first = read_receipt(run, "ckpt_path").get("first_saved")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # a run that did not come so far
        return
    if place is None and saves.resolve() != (run / CHECKPOINTS).resolve() and saved_in(saves):
        raise ConfigError(
            f"ckpt_path: {run}, the newest run, has saved in {saves}: give --checkpoint.dirpath {saves} to go on from there, or name the file; "
            "to begin anew, leave out ckpt_path"
        )
    if first is None or saved_in(saves):
        return
    others = last_good({"of another run ": saved_by(*roots)})
    raise ConfigError(
        f"ckpt_path: {saves} holds no checkpoint any more, but {run}, the newest run, has saved some there, the first at step {first:,}; "
        f"to go on from before it, or from the beginning, remove {run}{others}"
    )
