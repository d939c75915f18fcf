"""Checkpoints that a command line names: found, and read before Lightning sees them.

Lightning starts from scratch, with a mere warning, where `last` finds nothing; and its `LightningCLI` lets the settings in a checkpoint
override all others.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_modules.autopsy import FILE as AUTOPSY
from lit_modules.callbacks import CURVE, RunSummary
from lit_modules.checkpoint import check_same_model, check_tensors, read_checkpoint, read_header
from lit_modules.data import PackedText
from lit_modules.data.loaders import SHARED, STEP_TOKENS, changes, saved_settings
from lit_modules.decoder_lm import DecoderLM
from lit_modules.intact import check_intact, last_good
from lit_modules.parallel import FSDP2
from lit_modules.paths import given_path
from lit_modules.saving import DIVERGED
from lit_modules.sharded import read_index
from mixers.errors import ConfigError, unknown
from recipes.commands.config_files import Request, merge
from recipes.commands.newest import AUTO, LAST, beside, check_there, find_checkpoint, newest_run, saved_by, saved_in
from recipes.commands.plan import Plan
from recipes.commands.receipt import read_receipt
from recipes.commands.run_folder import CONFIG, default_root

BATCH = "batch"  # the tokens an optimizer step, among what may change
TRAINING = ("optimizer_states", "lr_schedulers", "loops", "global_step")  # what Lightning needs to go on


def model_settings(path: Path) -> dict[str, Any]:
    """The settings of the model in a checkpoint, without its seed.

    Raises:
        ConfigError: the checkpoint is damaged or none of ours.
    """
    settings, _ = read_header(_content(path), f"ckpt_path: {path}")
    return {name: value for name, value in settings.items() if name != "seed"}


def _content(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; of a sharded one everything but the tensors, which is in one file."""
    if not path.is_dir():
        return read_checkpoint(path)
    file = path / "meta.pt"
    if not file.is_file():
        raise ConfigError(f"ckpt_path: the folder {path} is no sharded checkpoint (it holds no {file.name})")
    return {"state_dict": {}, **read_checkpoint(file)}


def with_checkpoint(request: Request, *, any_run: bool = False) -> tuple[Request, Path | None]:
    """The request with the model of its checkpoint beneath its own settings, and the checkpoint (None if it names none).

    Args:
        request: what the command line asks for.
        any_run: `last` without a config or a root is the newest of all in runs/.

    Raises:
        ConfigError: the checkpoint is missing, damaged or none of ours; the newest that is whole is named.
    """
    given = request.option("ckpt_path")
    if given in (None, "null"):
        return request, None
    root = request.option("trainer.default_root_dir")
    roots = (
        [*Path("runs").glob("*")]
        if any_run and not root and not request.files
        else [given_path(root or default_root(request.files), "trainer.default_root_dir")]
    )
    given_place = request.option("checkpoint.dirpath")
    place = None if given_place in (None, "null") else given_path(given_place, "checkpoint.dirpath")
    if given in (LAST, AUTO):
        check_there(roots, place)
    if given == AUTO and not (saved_by(*roots) if place is None else saved_in(place)):
        rank_zero_only(print)(f"checkpoint: none in {place or roots[0]} yet, so training starts at the beginning", flush=True)
        _say_if_diverged(None, [*roots[0].glob("*")])
        return request, None
    path = find_checkpoint(str(given), *roots, place=place)
    try:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            check_intact(path, f"ckpt_path: {path}")
        settings = model_settings(path)
    except ConfigError as error:
        raise ConfigError(f"{error}{last_good(beside(path))}") from error
    newest = newest_run(roots)
    passed = given in (LAST, AUTO) and place is None and newest not in (None, *path.parents)
    if newest is not None and passed and not (newest / AUTOPSY).is_file():  # of one that diverged more is said
        rank_zero_only(print)(f"checkpoint: the newest run, {newest}, has none; going on from {path}", flush=True)
    if not any_run:
        _say_if_diverged(path, [*roots[0].glob("*")] if given in (LAST, AUTO) else list(path.absolute().parents[1:2]))
    return request._replace(config=merge({"model": {"lm": settings}}, request.config)), path


@rank_zero_only
def _say_if_diverged(path: Path | None, runs: list[Path]) -> None:
    """Says that a run has diverged since the checkpoint was saved, for what goes on from there is the same training.

    Args:
        path: what is gone on from; None: the beginning.
        runs: the folders of runs that may have.
    """
    found = {file: file.stat().st_mtime for run in runs if (file := run / AUTOPSY).is_file()}
    newest = max(found, key=lambda file: found[file], default=None)
    if newest is None or (path is not None and (path.name == DIVERGED or found[newest] <= path.stat().st_mtime)):
        return
    try:
        where = f"diverged at step {json.loads(newest.read_bytes())['step']:,}"
    except (OSError, ValueError, KeyError, TypeError):
        where = "diverged"
    start = "the beginning" if path is None else f"step {step_of(path):,}"
    print(
        f"checkpoint: the run before {where} ({newest}); going on from {start}, which with the same data and settings diverges there again: "
        "lower model.lr or trainer.gradient_clip_val, or set model.max_skipped_steps",
        flush=True,
    )


def check_model(path: Path, lm: DecoderLM) -> None:
    """ConfigError unless the checkpoint holds the parameters of `lm`. A sharded one is looked at no further than whether all of it is there."""
    check_same_model({**model_settings(path), "seed": None}, lm.settings, f"the checkpoint {path}")
    if path.is_dir():
        read_index(path, f"ckpt_path: {path}")
    else:
        check_tensors(_content(path)["state_dict"], lm, f"ckpt_path: {path}")


def check_strategy(path: Path, strategy: object) -> None:
    """ConfigError unless a strategy can read the checkpoint."""
    if path.is_dir() and not isinstance(strategy, FSDP2):
        raise ConfigError(
            f"ckpt_path: {path} is a sharded checkpoint, which only fsdp2 reads; make it one file: python -m recipes consolidate {path}"
        )


def step_of(path: Path | None) -> int:
    """The optimizer steps that were taken before a checkpoint; None: the beginning."""
    return 0 if path is None else int(_content(path).get("global_step", 0))


def is_finished(request: Request, path: Path, plan: Plan) -> bool:
    """Whether `auto` has nothing left to do, and says so: a job that is queued again then has done its work. For `last` or a path it is an error."""
    if request.option("ckpt_path") != AUTO:
        return False
    content = _content(path)
    done = _limit_reached(path, content, plan)
    if done is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(f"checkpoint: {path}: already finished: {done} to go on{_finish(path, content)}", flush=True)
    return done is not None


def _limit_reached(path: Path, content: dict[str, Any], plan: Plan) -> str | None:
    """The limit at which the training of a checkpoint stands, and the setting to raise; None: it can go on."""
    _, tokens = read_header(content, f"ckpt_path: {path}")
    step, limit = content.get("global_step", 0), plan.model.max_tokens
    if tokens >= limit:
        return f"{tokens:,} of {limit:,} tokens; raise model.max_tokens"
    return f"{step:,} of {plan.max_steps:,} steps; raise trainer.max_steps" if step >= plan.max_steps > -1 else None


def _finish(path: Path, content: dict[str, Any]) -> str:
    """Draws the loss curve of a run that has all its steps and was ended before its last lines, and says what else to do about it; empty for one that
    was not, or is not known."""
    run = path.absolute().parent.parent
    try:
        state = read_receipt(run, "ckpt_path")["outcome"].get("state")
    except ConfigError:
        return ""
    if state == "finished":
        return ""
    with suppress(OSError, KeyError):  # a plain `Trainer` may have had no summary
        if not (run / CURVE).exists():
            summary = RunSummary()
            summary.load_state_dict(content["callbacks"][summary.state_key])
            summary.draw(run)
    validate, generate = (f"python -m recipes {command} --ckpt_path {path}" for command in ("validate", "generate"))
    return f"; its run did not get to its end (it is {state}): for the loss on the validation set {validate}, for a sample {generate}"


def check_resumable(path: Path, plan: Plan) -> None:
    """ConfigError unless training can go on from the checkpoint, up to the limits of `plan`."""
    content = _content(path)
    if done := _limit_reached(path, content, plan):
        raise ConfigError(f"ckpt_path: the checkpoint has already seen {done}")
    for key in TRAINING if not path.is_dir() else ():
        if key not in content:
            raise ConfigError(f"ckpt_path: {path} has no {key}: it holds weights only, training cannot go on from it")


def changeable(names: str) -> set[str]:
    """What `--may_change` lists; ConfigError for a name that is none."""
    listed = {name.strip() for name in names.split(",")} - {""}
    for name in sorted(listed - {BATCH, *SHARED}):
        raise unknown("may_change", "name", name, [BATCH, *SHARED])
    return listed


def check_changes(path: Path, plan: Plan, may_change: set[str], data: PackedText | None = None) -> dict[str, tuple[Any, Any]]:
    """What a training would not share with that of the checkpoint: the old and the new value by name.

    Args:
        path: the checkpoint.
        plan: of the training that would go on.
        may_change: the names of what may differ.
        data: what it would go on with, once that has been read. Without it only settings are compared.

    Raises:
        ConfigError: something else differs too.
    """
    state = _content(path).get(PackedText.__qualname__, {})
    try:
        saved = saved_settings(state)
    except ConfigError as error:
        raise ConfigError(f"ckpt_path: {path}: {error}") from error
    now = {name: getattr(plan.data, name) for name in ("seq_len", "seed", "document_boundaries")} if data is None else data.shared()
    tokens = plan.tokens_a_step
    changed = changes({BATCH: state.get(STEP_TOKENS, tokens), **saved}, {BATCH: tokens, **now})
    refused = {name: values for name, values in changed.items() if name not in may_change}
    if refused.keys() == {BATCH}:
        raise ConfigError(_another_batch(path, plan, int(refused[BATCH][0])))
    if refused:
        what = {BATCH: "tokens an optimizer step", **SHARED}
        differs = "; ".join(f"{what[name]}: {old} there, {new} here" for name, (old, new) in refused.items())
        allow = f"--may_change {','.join(name for name in what if name in changed)}"
        raise ConfigError(f"ckpt_path: the checkpoint {path} was trained otherwise: {differs}. Keep what was, or go on with {allow}")
    return changed


def _another_batch(path: Path, plan: Plan, saved: int) -> str:
    """The line for a checkpoint that was trained with another number of tokens an optimizer step."""
    a_round = plan.micro_batch * plan.replicas
    keep = f"set it to {saved // a_round}" if saved % a_round == 0 else f"no number of them makes that of {a_round:,} each: lower data.batch_size"
    return (
        f"trainer.accumulate_grad_batches: {plan.accumulate} on {plan.replicas} devices make {plan.tokens_a_step:,} tokens an optimizer step, "
        f"the checkpoint {path} was trained with {saved:,}: {keep}, or --may_change {BATCH}"
    )


def run_config(path: Path) -> Path | None:
    """The config of the run that wrote a checkpoint, while it lies where that run left it."""
    folders = list(path.absolute().parents)[:2]
    return next((folder / CONFIG for folder in folders if (folder / CONFIG).is_file()), None)
