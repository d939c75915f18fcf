"""The command line: light answers, every subcommand once as a user starts it, what a config may change, preflight."""

from __future__ import annotations

import csv
import errno
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from cli_cases import RUN_FILES, here_fixture, last, one_thread, plan_of, run_of, trained_fixture  # noqa: F401
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from mixers.errors import ConfigError
from recipes import __main__ as command_line
from recipes.__main__ import COMMANDS, main
from recipes.commands import bench_rows
from recipes.commands.bench_train import TRAINING, Training
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import RECIPES, collect, recipe_names
from recipes.commands.parser_errors import explain
from recipes.commands.run_folder import make_run_folder
from recipes.commands.sizes import PRECISIONS, precision_of, state_bytes, training_memory

ROOT = Path(__file__).parents[1]


# --- light answers ---


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), (["--version"], 0), ([], 0), (["fitt"], 2)])
def test_light_answers(arguments: list[str], code: int) -> None:
    """Without torch, and in a fifth of a second."""
    program = (
        "import sys, time; from recipes.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'numpy', 'yaml', 'rich', 'jsonargparse'} & set(sys.modules);"
        "print(code, heavy or 'light', time.process_time() < 0.2)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} light True"
    if arguments in (["--help"], []):
        assert all(re.search(rf"^  {command} ", done.stdout, re.MULTILINE) for command in COMMANDS)
    if code:
        assert done.stderr.startswith("error: command: unknown command 'fitt'; did you mean 'fit'?")


@pytest.mark.parametrize(("command", "unbuffered"), [("--help", ""), ("bench plot --help", ""), ("doctor", ""), ("doctor", "1")])
def test_an_output_that_cannot_be_written_is_one_line(command: str, unbuffered: str) -> None:
    """Found while something is printed, or when all is; a reader that has gone (head, less) needs no word."""
    run = partial(subprocess.run, [sys.executable, "-m", "recipes", *command.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = run(stdout=full, env=environment)
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = run(stdout=writer, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_error_that_is_not_of_the_output_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(command_line, "find_command", lambda _: full)
    with pytest.raises(OSError, match="somewhere"):
        main(["doctor"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m recipes {command}")
    assert "--config" in out or command in ("generate", "doctor", "bench", "prepare", "consolidate", "diff")


# --- every subcommand as a user starts it ---


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in another folder than the checkout's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "recipes", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_process_of_fit(here: Path) -> None:
    done = start(here, "fit", "--config", "small.yaml")
    assert done.returncode == 0, done.stderr
    run = run_of(here)
    said = done.stdout.splitlines()
    shown = run.relative_to(here).as_posix()
    assert sum(line.rstrip("/") == f"run folder: {shown}" for line in said) == 2  # at the start and at the end
    assert "model: [gdn2, swa] over 2 layers" in done.stdout
    assert "step 4/4" in done.stdout
    assert "bits per byte" in done.stdout
    assert "Tip" not in done.stderr
    assert "site-packages" not in done.stderr, done.stderr  # where Lightning's warnings say they are from
    assert {file.name for file in run.iterdir()} >= RUN_FILES


def test_two_processes_share_a_folder(here: Path) -> None:
    done = start(here, "fit", "--config=small.yaml", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert {file.name for file in run_of(here).iterdir()} >= RUN_FILES
    assert "128 a step" in done.stdout
    assert done.stdout.count("run folder: ") == 2


@pytest.mark.parametrize("command", ["validate", "test"])
def test_process_of_evaluation(command: str, trained: Path) -> None:
    before = sorted(trained.rglob("*"))
    done = start(trained, command, f"--ckpt_path={last(trained)}")  # the config is that of the run
    assert done.returncode == 0, done.stderr
    metric = {"validate": "val/loss", "test": "test/loss"}[command]
    assert 0 < float(re.search(rf"{metric}\s+│\s+([\d.]+)", done.stdout)[1]) < 6
    assert "site-packages" not in done.stderr, done.stderr
    assert sorted(trained.rglob("*")) == before  # nothing is written, the run's config least of all


def test_process_of_predict(trained: Path) -> None:
    done = start(trained, "predict", f"--ckpt_path={last(trained)}")
    assert done.returncode == 0, done.stderr
    lines = [yaml.safe_load(line) for line in done.stdout.splitlines()]
    assert sum(line["tokens"] for line in lines) == 64
    assert all(line["nll"] > 0 for line in lines)


def test_process_of_generate(trained: Path) -> None:
    done = start(trained, "generate", "--ckpt_path", "last", "--prompt", "the cat ", "--max_new_tokens=8", "--seed=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat ")
    assert len(done.stdout) > len("the cat ") + 1


def test_process_of_preflight_and_mixers(tmp_path: Path) -> None:
    done = start(tmp_path, "preflight", "--config", "paper/gdn2_hybrid_1.3b", "--trainer.devices=1")
    assert done.returncode == 0, done.stderr
    for text in ("1,300,314,384", "1,447,772,688", "524,288", "190,735", "gdn2", "swa", "[gdn2, swa] over 18 layers", "no decay", "bf16-mixed"):
        assert text in done.stdout
    done = start(tmp_path, "mixers")
    assert done.returncode == 0, done.stderr
    assert "gdn2" in done.stdout
    assert not list(tmp_path.iterdir())


def test_process_of_an_error(tmp_path: Path) -> None:
    done = start(tmp_path, "fit", "--config", "quickstart", "--model.lm.layout=[gdn3]")
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.lm.layout: unknown mixer 'gdn3'")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --- what the config may change ---


def built(*arguments: str, folder: Path | None = None) -> MixersCLI:
    cli = MixersCLI("fit", collect(["--config", "small.yaml", *arguments]))
    cli.build(folder)
    return cli


@pytest.mark.usefixtures("here")
def test_defaults() -> None:
    cli = built(folder=make_run_folder("runs").path)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names == ["Throughput", "ProgressBar", "RunSummary", "StopOnSignal", "Checkpoint"]
    assert [logger.log_dir.rstrip("/") for logger in cli.trainer.loggers] == [str(cli.run_folder)] * 2
    assert cli.trainer.checkpoint_callback.save_last is True
    assert cli.config.trainer.use_distributed_sampler is False
    assert cli.config.trainer.accelerator == "cpu"
    assert all(parameter.is_meta for parameter in cli.model.lm.parameters())
    assert MixersCLI("fit", collect(["--config", "quickstart"])).config.trainer.accelerator == "auto"


@pytest.mark.usefixtures("here")
def test_parts_may_be_turned_off() -> None:
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    cli = built(*off, folder=make_run_folder("runs").path)
    assert [type(callback).__name__ for callback in cli.trainer.callbacks] == ["Throughput", "RunSummary", "StopOnSignal"]
    assert not cli.trainer.loggers


@pytest.mark.usefixtures("here")
def test_parts_may_be_added() -> None:
    stop = "[{class_path: EarlyStopping, init_args: {monitor: val/loss}}]"
    log = "{class_path: TensorBoardLogger, init_args: {save_dir: elsewhere}}"
    cli = built(f"--trainer.callbacks={stop}", f"--trainer.logger={log}", "--checkpoint.save_top_k=-1", folder=make_run_folder("runs").path)
    assert any(isinstance(callback, EarlyStopping) for callback in cli.trainer.callbacks)
    assert any(isinstance(callback, ModelCheckpoint) and callback.save_top_k == -1 for callback in cli.trainer.callbacks)
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == ["Metrics", "TensorBoardLogger"]
    assert cli.trainer.log_dir.rstrip("/") == str(cli.run_folder)


@pytest.mark.usefixtures("here")
def test_one_seed_for_model_and_data() -> None:
    cli = built("--seed_everything=7")
    assert (cli.model.lm.settings["seed"], cli.datamodule.seed) == (7, 7)
    assert built().model.lm.settings["seed"] == 0


def test_print_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "small.yaml", "--model.lm.mixers.gdn2.head_dim=6", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["lm"]["mixers"]["gdn2"] == {"num_heads": 2, "head_dim": 6}
    assert not (here / "runs").exists()


@pytest.mark.usefixtures("here")
def test_recipes_by_name() -> None:
    assert collect(["--config", "quickstart"]).files == [RECIPES / "quickstart.yaml"]
    assert collect(["-c", "paper/gdn2_1.3b"]).files == [RECIPES / "paper" / "gdn2_1.3b.yaml"]
    assert collect(["--config=recipes/paper/gdn2_1.3b.yaml"]).files == [RECIPES / "paper" / "gdn2_1.3b.yaml"]
    Path("quickstart").write_text("seed_everything: 3")  # a file of the user's own comes first
    assert collect(["--config", "quickstart"]).config == {"seed_everything": 3}
    assert set(recipe_names()) >= {"quickstart", "tiny", "paper/gdn2_1.3b"}


# --- preflight ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.default_root_dir=a"], "a"),
        (["--trainer", '{"default_root_dir": "a"}'], "a"),
        (["--trainer={default_root_dir: a}"], "a"),
        (["--trainer", "group.yaml"], "a"),
        (["--trainer=group"], "a"),
        (["--trainer={default_root_dir: b}", "--trainer.default_root_dir", "a"], "a"),
        (["--trainer.default_root_dir", "a", "--trainer={max_steps: 3}"], "a"),
        (["--trainer={default_root_dir: a}", "--trainer={default_root_dir: null}"], None),
        (["--trainer={max_steps: 3}"], "of the file"),
    ],
    ids=str,
)
def test_a_setting_in_a_group_counts(arguments: list[str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the parser takes it: where runs are looked for is where they are."""
    monkeypatch.chdir(tmp_path)
    for name in ("group.yaml", "group"):
        Path(name).write_text("default_root_dir: a")
    Path("file.yaml").write_text("trainer: {default_root_dir: of the file}")
    assert collect(["--config=file.yaml", *arguments]).option("trainer.default_root_dir") == expected


def test_preflight_reports(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("corpus.txt").unlink()  # no data are needed
    assert main(["preflight", "--config", "small.yaml", "--trainer.accumulate_grad_batches=3", "--trainer.devices=2"]) == 0
    out = capsys.readouterr().out
    plan = plan_of("--config=small.yaml", needs_tokenizer=True)
    lm = plan.model.lm
    numbers = [
        sum(p.numel() for p in lm.parameters()),
        sum(p.numel() for p in lm.layers.parameters()),
        lm.embedding.weight.numel(),
        sum(p.numel() for p in lm.mixers()[0].parameters()),
    ]
    for number in numbers:
        assert f"{number:,}" in out
    assert "384 = 2 x 32 x 3 (accumulated) x 2 (devices)" in out
    assert "steps            1 to 256 tokens" in out
    assert " FLOPs to 256 tokens (no GPU here: GPU-hours are not known)" in out
    assert "activations" in out
    assert "decay" in out
    assert not (here / "runs").exists()


@pytest.mark.usefixtures("here")
def test_preflight_knows_the_state() -> None:
    """Recurrent states are float32 whatever the precision; caches are in the precision of the computation."""
    lm = plan_of("--config=small.yaml", needs_tokenizer=True).model.lm
    gdn2, swa = state_bytes(lm, 100, precision_of("bf16-mixed").computed)
    assert gdn2 == 2 * 4 * 4 * 4 + 3 * 3 * 8 * 2  # S, and three tokens of q, k, v
    assert swa == 2 * 8 * 16 * 2 + 8  # a window of keys and values, and the position
    assert sum(state_bytes(lm, 100, 4)) == 4 * (lm.state_numel(100)) + 8


@pytest.mark.usefixtures("here")
def test_preflight_memory() -> None:
    lm = plan_of("--config=small.yaml", needs_tokenizer=True).model.lm
    numbers = sum(p.numel() for p in lm.parameters())
    full, mixed, true = (training_memory(lm, (2, 32), PRECISIONS[name]) for name in ("32-true", "bf16-mixed", "bf16-true"))
    assert (full.weights, full.gradients, full.optimizer, full.copies) == (4 * numbers, 4 * numbers, 8 * numbers, 0)
    assert mixed.weights == full.weights
    assert mixed.copies > 0
    assert mixed.activations < full.activations
    fp32 = sum(p.numel() for name, p in lm.named_parameters() if name in lm.parameter_groups().fp32)
    assert true.weights == 2 * numbers + 2 * fp32


def seen_peaks() -> dict[str, tuple[tuple[int, int], float]]:
    """Shape of a micro-batch and highest peak memory in GiB of each training on one GPU whose figures are in docs/benchmarks."""
    found: dict[str, tuple[tuple[int, int], float]] = {}
    folder = Path(__file__).parents[1] / "docs" / "benchmarks"
    for file in sorted(folder.glob("train_*.csv")):
        with file.open(encoding="utf-8", newline="") as table:
            for row in csv.DictReader(table):
                peak = max(float(row["peak_memory_gib"] or 0), found.get(row["recipe"], ((0, 0), 0.0))[1])
                found[row["recipe"]] = (int(row["batch"]), int(row["seq_len"])), peak
    for row in bench_rows.read(folder, TRAINING, Training):  # newer
        if row.devices == 1:
            found[row.recipe] = (row.batch, row.seq_len), float(row.peak_memory_gib)
    return found


@pytest.mark.parametrize("recipe", seen_peaks())
def test_preflight_memory_beside_what_was_seen(recipe: str) -> None:
    shape, peak = seen_peaks()[recipe]
    lm = plan_of(f"--config={recipe}").model.lm
    estimate = training_memory(lm, shape, PRECISIONS["bf16-mixed"]).total / 2**30
    assert peak < estimate < 1.06 * peak


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("rank", "guessed"), [(64, False), (65, True)])
def test_preflight_says_whose_activations_are_guessed(rank: int, guessed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels take 64 ranks, and the reference reads lengths."""
    mixers = f"{{mamba3: {{head_dim: 8, d_state: 4, mimo_rank: {rank}}}}}"
    assert main(["preflight", "--config=small.yaml", "--model.lm.layout=[mamba3]", f"--model.lm.mixers={mixers}"]) == 0
    assert ("activations (of mamba3 guessed from the projections: likely more)" in capsys.readouterr().out) == guessed


@pytest.mark.usefixtures("here")
def test_preflight_memory_of_a_mixer_that_looks_at_values(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = plan_of("--config=small.yaml", needs_tokenizer=True).model.lm
    counted = training_memory(lm, (2, 32), PRECISIONS["32-true"])
    for mixer in lm.mixers():
        monkeypatch.setattr(mixer, "forward", lambda x, state, cu_seqlens: (x * float(x.detach().sum()), state))  # noqa: ARG005
    roughly = training_memory(lm, (2, 32), PRECISIONS["32-true"])
    assert roughly._replace(activations=counted.activations, guessed=()) == counted
    assert (counted.guessed, roughly.guessed) == ((), tuple(dict.fromkeys(lm.layer_names)))
    assert 0 < roughly.activations < counted.activations


# --- errors of the parser ---


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Group 'model' does not accept option 'lm.layut'", "model.lm.layut: unknown key; did you mean 'model.lm.layout'?"),
        ("unrecognized arguments: --modle.lr 3", "modle.lr: unknown key; did you mean 'model.lr'?"),
        ("Option 'x' is not accepted", "x: unknown key (legal: model)"),
        ("Parser key \"model.lr\":\n  Expected a <class 'float'>. Got value: fast", "model.lr: expected float, got fast"),
        ("argument --model.lr: expected one argument", "model.lr: expected one argument"),
        ("the following arguments are required: model.lr, data.path", "model.lr: must be set, and so must data.path; give a --config"),
        ("something\n   else", "something else"),
    ],
)
def test_parser_errors(message: str, expected: str) -> None:
    error = explain(message, ["model.lm.layout", "model.lr"])
    assert isinstance(error, ConfigError)
    assert str(error) == expected
