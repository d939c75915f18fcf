"""Trainings that are cut short, each in a process of its own that is forked from one that has imported everything.

`python tests/resume_worker.py FOLDER` runs what tests/test_resume.py is about, and prints a line of JSON for each: exit codes, what was said, and in
what it differs from the training that nobody cut short.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from cli_cases import CONFIG, fill
from lightning.fabric.utilities.rank_zero import rank_zero_only
from shard_cases import SETTINGS, prepared, write_jsonl

from lit_modules import intact
from lit_modules.checkpoint import read_checkpoint
from lit_modules.lit_lm import LitLM
from lit_modules.sharded import read_sharded
from mixers.attention import Attention
from recipes.__main__ import main
from recipes.commands.config_files import merge

TIMES = ("tokens_per_second", "tflops_per_second", "mfu", "data_wait", "peak_memory_gib")
SHARDS = {"data": {"path": "shards", "val_path": None}}
TEXT = {
    "data": {"path": "corpus.txt", "val_path": "corpus.txt", "num_workers": 1, "batch_size": 3},
    "trainer": {"val_check_interval": 1.0, "check_val_every_n_epoch": 1},  # at the end of an epoch, of 4 steps
    "checkpoint": {"every_n_train_steps": 3},
}
STEPS = 9
RANDOM = 2  # kills at random moments, of each kind of data
BASE = {
    "model": {"lm": {"layout": ["gdn2", "resume_worker.Noisy"], "mixers": {"resume_worker.Noisy": {"num_heads": 2}}}, "max_tokens": 10**6},
    "trainer": {"accumulate_grad_batches": 2, "max_steps": STEPS, "val_check_interval": 4, "num_sanity_val_steps": 0, "enable_progress_bar": False},
    "checkpoint": {"every_n_train_steps": 1},
    "summary": {"max_new_tokens": 0},
}


class Noisy(Attention):
    """A plug-in that draws random numbers in training."""

    def forward(self, x_BTD, state=None, *, cu_seqlens=None):
        y_BTD, state = super().forward(x_BTD, state, cu_seqlens=cu_seqlens)
        return torch.nn.functional.dropout(y_BTD, 0.2, self.training), state


class Fault(NamedTuple):
    """Something that happens when a point of the training is passed for the given time."""

    point: str  # micro_batch, optimizer, validation, write, before_rename, after_rename, between_renames (of a folder that replaces another)
    time: int
    what: int | str  # a signal, or full: from here on the disk is
    rank: int = 0
    everyone: bool = False  # the signal is sent to the workers of the loader too, as a terminal or a scheduler does


def inject(fault: Fault | None, rank: int, run: int) -> None:
    """Patches this process so that the fault will happen, and the training's batches are noted down."""
    passed: dict[str, int] = {}

    def happens(point: str) -> bool:
        passed[point] = passed.get(point, 0) + 1
        return fault is not None and (fault.point, fault.time, fault.rank) == (point, passed[point], rank)

    def act() -> None:
        if fault.what == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif fault.everyone:
            workers = [str(child.pid) for child in multiprocessing.active_children()]
            assert workers
            subprocess.run(["kill", f"-{fault.what}", *workers, str(os.getpid())], check=True)
            time.sleep(0.3)  # a worker that the signal ends is seen now
        else:
            os.kill(os.getpid(), fault.what)

    def wrap(owner: Any, name: str, point: str, note: Callable[..., None] = lambda *_: None) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def patched(*arguments: Any, **named: Any) -> Any:
            note(*arguments)
            if happens(point):
                act()
            return function(*arguments, **named)

        setattr(owner, name, patched)

    def note(lit: LitLM, batch: Any) -> None:
        with Path("order").open("a") as file:
            file.write(f"{lit.tokens} {run} {rank} {hashlib.blake2b(batch.inputs.numpy().tobytes()).hexdigest()[:12]}\n")

    wrap(LitLM, "training_step", "micro_batch", note)
    wrap(LitLM, "validation_step", "validation")
    wrap(torch.optim.AdamW, "step", "optimizer")
    save, replace = torch.save, intact.replace

    def torn(content: Any, file: Any) -> None:
        if happens("write"):
            if fault.what == "full":
                act()
            else:
                whole = io.BytesIO()
                save(content, whole)
                file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
                file.flush()
                act()
        save(content, file)

    def renamed(part: Path, target: Path) -> None:
        if happens("before_rename"):
            act()
        replace(part, target)
        if happens("after_rename"):
            act()

    rename = Path.rename

    def moved(self: Path, to: Path) -> Path:
        done = rename(self, to)
        if done.name.endswith(".old.ckpt") and happens("between_renames"):
            act()
        return done

    torch.save, intact.replace, Path.rename = torch.save if fault is None else torn, renamed, moved


class Ran(NamedTuple):
    codes: list[int]  # of the ranks; -9: killed by SIGKILL
    said: str  # by rank 0


def fit(folder: Path, *arguments: str, fault: Fault | None = None, world: int = 1, after: tuple[int, float] | None = None, **env: str) -> Ran:
    """Runs `fit` in a folder on `world` processes, and kills it after so many micro-batches and seconds if asked to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os.chdir(folder)
            log = os.open(f"log{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(log, 1), os.dup2(log, 2)
            os.environ.update(env)
            if world > 1:  # as torchrun does
                names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ.update({name: str(value) for name, value in names.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="x")
            rank_zero_only.rank = rank
            inject(fault, rank, port)
            try:
                code = main(["fit", "--config=config.yaml", f"--trainer.devices={world}", *arguments])
            except BaseException as error:
                print(repr(error))
                code = 99
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.append(child)
    if after is not None:
        batches, seconds = after
        while not (folder / "order").exists() or (folder / "order").read_text().count("\n") < batches:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(children[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return Ran(codes, (folder / "log0").read_text())


def runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/config/*"), key=lambda run: (run / "config.yaml").stat().st_mtime_ns)


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of all runs' metrics.csv by step and kind, without times. Rows of a step that two runs have must be the same."""
    found: dict[str, dict[str, str]] = {}
    for run in runs(folder):
        text = (run / "metrics.csv").read_text() if (run / "metrics.csv").exists() else ""
        for row in csv.DictReader(text.splitlines()):
            kept = {key: value for key, value in row.items() if value and key not in TIMES}
            key = f"{row['step']} {'val' if row.get('val/loss') else 'train'}"
            assert found.setdefault(key, kept) == kept, (key, found[key], kept)
    return found


def order(folder: Path) -> dict[str, list[list[str]]]:
    """The batches of every step by the tokens before it, in sample order; one list for each time that it was begun."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for line in (folder / "order").read_text().splitlines():
        tokens, run, rank, batch = line.split()
        found.setdefault(tokens, {}).setdefault(run, {}).setdefault(rank, []).append(batch)
    return {tokens: [[b for dealt in zip(*(ranks[rank] for rank in sorted(ranks)), strict=False) for b in dealt] for ranks in begun.values()]
            for tokens, begun in found.items()}  # fmt: skip


def last(folder: Path) -> dict[str, Any]:
    """The newest last.ckpt. A training that was killed behind its last checkpoint leaves nothing to do for the next one."""
    newest = [file for run in runs(folder) if (file := run / "checkpoints" / "last.ckpt").exists()][-1]
    return read_sharded(newest, str(newest)) if newest.is_dir() else read_checkpoint(newest)


def differences(whole: Path, cut: Path) -> list[str]:
    """In what the end of some runs differs from that of an uninterrupted one."""
    one, other = last(whole), last(cut)
    wrong = [name for name in one["state_dict"] if not torch.equal(one["state_dict"][name], other["state_dict"][name])]
    states = [content["optimizer_states"][0] for content in (one, other)]
    for number, state in states[0]["state"].items():
        wrong += [f"{number}.{key}" for key, value in state.items() if not torch.equal(value, states[1]["state"][number][key])]
    wrong += ["groups"] if states[0]["param_groups"] != states[1]["param_groups"] else []
    for key in ("global_step", "lightning_mixers", "PackedText", "validated_step"):
        wrong += [key] if one[key] != other[key] else []
    wrong += ["curve"] if one["callbacks"]["RunSummary"] != other["callbacks"]["RunSummary"] else []
    wrong += ["rows"] if rows(whole) != rows(cut) else []
    again = order(cut)
    for tokens, (expected,) in order(whole).items():
        begun = again.get(tokens, [[]])
        wrong += [f"order at {tokens}"] if begun[-1] != expected or any(one != expected[: len(one)] for one in begun) else []
    return wrong


def make(folder: Path, *settings: dict[str, Any]) -> Path:
    """A folder with data and a config."""
    folder.mkdir()
    fill(folder)
    config = merge(CONFIG, BASE)
    for more in settings:
        config = merge(config, more)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if not (folder.parent / "shards").exists():
        (folder.parent / "source").mkdir()
        prepared(folder.parent / "shards", write_jsonl(folder.parent / "source", 60), SETTINGS)
    (folder / "shards").symlink_to(folder.parent / "shards")
    return folder


def say(name: str, **found: Any) -> None:
    print(json.dumps({"name": name, **found}), flush=True)


def cut(
    root: Path, name: str, whole: Path, settings: list[dict[str, Any]], *faults: Fault, after: tuple[int, float] | None = None, world: int = 1
) -> None:
    """A training that ends with each of the faults in turn and is gone on with, up to its end."""
    folder = make(root / name.replace(" ", "_"), *settings)
    codes, said = [], []
    for fault in [None] if after is not None else faults:
        ran = fit(folder, "--ckpt_path=auto", fault=fault, after=after, world=world)
        codes.append(ran.codes)
        said.append(ran.said)
    ran = fit(folder, "--ckpt_path=auto", world=world)
    parts = [str(part) for part in folder.rglob("*.part") if part.parent.parent == runs(folder)[-1]]
    say(name, codes=codes, said=said, end=ran.codes, end_said=ran.said[-2000:], left=parts, differences=differences(whole, folder))


KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
FAULTS = {
    "killed in an accumulation": [Fault("micro_batch", 6, KILL)],
    "killed in a validation": [Fault("validation", 1, KILL)],
    "killed in the last validation": [Fault("validation", 2, KILL)],
    "killed while a checkpoint is written": [Fault("write", 3, KILL)],
    "killed before a checkpoint is renamed": [Fault("before_rename", 4, KILL)],
    "killed after a checkpoint is renamed": [Fault("after_rename", 5, KILL)],
    "killed again and again": [Fault("micro_batch", 7, KILL), Fault("validation", 1, KILL), Fault("optimizer", 2, KILL)],
    "SIGTERM in a step": [Fault("optimizer", 3, TERM)],
    "SIGTERM in an accumulation": [Fault("micro_batch", 7, TERM)],
    "SIGTERM in a validation": [Fault("validation", 1, TERM)],
    "SIGUSR1": [Fault("micro_batch", 4, USR1)],
    "Ctrl-C": [Fault("micro_batch", 5, INT)],
    "disk full": [Fault("write", 4, "full")],
}
EVERYONE = {  # where the loader has a worker
    "SIGTERM to all processes": [Fault("micro_batch", 7, TERM, everyone=True)],
    "Ctrl-C to all processes": [Fault("micro_batch", 5, INT, everyone=True)],
}
TWO = {  # strategies of two processes, and what happens to one of them
    "ddp": {
        "SIGTERM to one of two": Fault("micro_batch", 3, TERM, 1),
        "one of two killed": Fault("micro_batch", 4, KILL, 1),
        "disk full": Fault("write", 4, "full"),
    },
    "fsdp2_sharded_checkpoint": {
        "killed before a checkpoint is renamed": Fault("before_rename", 4, KILL),
        "killed between the renames": Fault("between_renames", 2, KILL),
        "disk full": Fault("micro_batch", 4, "full", 1),
    },
}
SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "77", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}


def one_process(root: Path, seed: int) -> None:
    draw = random.Random(seed)
    some = dict([*FAULTS.items()][:4])
    for kind, settings, faults in (("shards", [SHARDS], FAULTS), ("text", [TEXT], some | EVERYONE)):
        whole = make(root / f"whole_{kind}", *settings)
        ran = fit(whole)
        say(f"{kind}: whole", codes=[ran.codes], said=[ran.said], rows=sorted(rows(whole)), steps=len(order(whole)))
        for name, its in faults.items():
            cut(root, f"{kind}: {name}", whole, settings, *its)
        for number in range(RANDOM):
            cut(root, f"{kind}: killed at random {number}", whole, settings, after=(draw.randint(1, 2 * STEPS - 1), draw.uniform(0, 0.03)))


def slurm(root: Path) -> None:
    """Under SLURM, with an `scontrol` that writes down what it is asked for."""
    folder = make(root / "slurm", SHARDS)
    (folder / "bin").mkdir()
    (folder / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" >> scontrol.said\n')
    (folder / "bin" / "scontrol").chmod(0o755)
    env = {**SLURM, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    ran = [fit(folder, "--ckpt_path=auto", fault=Fault("micro_batch", n, what), **env) for n, what in ((4, USR1), (3, TERM))]
    ran.append(fit(folder, "--ckpt_path=auto", **env))
    asked = (folder / "scontrol.said").read_text()
    say("slurm", codes=[r.codes for r in ran], said=[r.said for r in ran], asked=asked, differences=differences(root / "whole_shards", folder))


def more_processes(root: Path) -> None:
    """1 -> 2 -> 1 processes with the same tokens a step, in two precisions; and faults on one of two."""
    for precision in ("64-true", "32-true"):
        folders, steps = [], 20
        for name, parts in (("whole", [(1, steps)]), ("changed", [(1, 7), (2, 14), (1, steps)])):
            folder = make(root / f"{name}_{precision}", SHARDS, {"model": {"lm": {"layout": ["gdn2", "swa"]}}})
            for world, until in parts:
                arguments = [f"--trainer.accumulate_grad_batches={4 // world}", f"--trainer.max_steps={until}", f"--trainer.precision={precision}"]
                arguments += ["--ckpt_path=auto", *(["--trainer.strategy=ddp"] if world > 1 else [])]
                ran = fit(folder, *arguments, world=world)
                assert not any(ran.codes), ran
            folders.append(folder)
        losses = [[float(row["train/loss"]) for key, row in rows(folder).items() if key.endswith("train")] for folder in folders]
        say(f"processes: {precision}", losses=losses, same_order=order(folders[0]) == order(folders[1]))
    folder = root / "changed_32-true"
    ran = fit(folder, "--trainer.accumulate_grad_batches=4", "--trainer.max_steps=22", "--trainer.strategy=ddp", "--ckpt_path=last", world=2)
    say("processes: other batch", codes=[ran.codes], said=[ran.said])
    for strategy, faults in TWO.items():
        settings = [SHARDS, {"trainer": {"strategy": strategy, "accumulate_grad_batches": 1}}]
        whole = make(root / f"whole_{strategy}", *settings)
        fit(whole, world=2)
        for name, fault in faults.items():
            cut(root, f"{strategy}: {name}", whole, settings, fault, world=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["resume_worker"] = sys.modules["__main__"]
    one_process(Path(sys.argv[1]), int(sys.argv[2]))
    slurm(Path(sys.argv[1]))
    more_processes(Path(sys.argv[1]))
