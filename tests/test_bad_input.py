"""What a user gets wrong is said in one line that names it, with exit code 2, before any data are read."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 (at once: it logs to what is stderr when it is imported, and a test's is closed after the test)
import pytest
import torch
import yaml
from cli_cases import CONFIG as SMALL
from lit_cases import one_thread  # noqa: F401

from mixers.errors import ConfigError
from recipes.__main__ import find_command, main

Run = Callable[..., str]

CONFIG: dict[str, Any] = {
    "model": {
        "lm": copy.deepcopy(SMALL["model"]["lm"]),
        "max_tokens": 64,
        "warmup_tokens": 0,
    },
    "data": {"seq_len": 32, "batch_size": 1},
    "trainer": {"accelerator": "cpu", "devices": 1},
    "summary": {"max_new_tokens": 0},
}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that the command lines below name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("corpus.txt").write_text("the cat sat on the mat. " * 20)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    def refused(command: str, *arguments: str) -> str:
        """The line that a command line is refused with."""
        capsys.readouterr()
        assert main([command, *arguments]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1, said
        assert said[0].startswith("error: ")
        assert not Path("runs").exists()  # a run that did not begin leaves no folder
        return said[0]

    return refused


LM = "--model.lm."
CASES = {
    "unknown mixer": ([f"{LM}layout=[gdn3]"], ["model.lm.layout", "'gdn3'", "did you mean 'gdn", "linear_attention"]),
    "unknown setting": ([f"{LM}mixers.gdn2.num_head=2"], ["model.lm.mixers.gdn2.num_head", "did you mean 'num_heads'"]),
    "setting of an unused mixer": ([f"{LM}mixers.kda.num_head=2"], ["model.lm.mixers.kda.num_head", "did you mean 'num_heads'"]),
    "setting below a setting": ([f"{LM}mixers.gdn2.num_heads.x=2"], ["model.lm.mixers.gdn2.num_heads.x"]),
    "settings of an unknown mixer": ([f"{LM}mixers.gdnn.num_heads=2"], ["unknown mixer 'gdnn'", "did you mean 'gdn"]),
    "settings that are none": ([f"{LM}mixers.gdn2=2"], ["model.lm.mixers.gdn2: expected dict, got 2"]),
    "wrong type of a mixer's setting": ([f"{LM}mixers.gdn2.num_heads=two"], ["model.lm.mixers.gdn2.num_heads: expected int, got two"]),
    "heads do not divide": ([f"{LM}mixers.swa.num_heads=3"], ["model.lm.mixers.swa.num_heads", "3 heads", "16"]),
    "value heads do not divide": ([f"{LM}mixers.gdn2.num_v_heads=3"], ["model.lm.mixers.gdn2.num_v_heads", "multiple"]),
    "window 0": ([f"{LM}mixers.swa.window=0"], ["model.lm.mixers.swa.window", ">= 1", "0"]),
    "alias of an alias": ([f"{LM}mixers={{a: {{mixer: b}}, b: {{mixer: gdn}}}}", f"{LM}layout=[a]"], ["model.lm.mixers.a.mixer", "alias"]),
    "d_model 0": ([f"{LM}d_model=0"], ["model.lm.d_model", ">= 1"]),
    "layers 0": ([f"{LM}n_layers=0"], ["model.lm.n_layers", ">= 1"]),
    "layout too long": ([f"{LM}layout=[gdn2, swa, gdn2]"], ["model.lm.layout", "3 entries", "n_layers = 2"]),
    "empty layout": ([f"{LM}layout=[]"], ["model.lm.layout", "at least one"]),
    "layout of numbers": ([f"{LM}layout=[1]"], ["model.lm.layout", "1"]),
    "layout that is no list": ([f"{LM}layout=gdn2"], ["model.lm.layout", "list", "gdn2"]),
    "dotted path to nothing": ([f"{LM}layout=[no.such.Mixer]"], ["model.lm.layout", "no.such.Mixer"]),
    "dotted path to no mixer": ([f"{LM}layout=[pathlib.Path]"], ["model.lm.layout", "pathlib.Path", "SequenceMixer"]),
    "vocabulary too small": ([f"{LM}vocab_size=256"], ["model.lm.vocab_size", "256", "257", "bytes"]),
    "learning rate": (["--model.lr=-1"], ["model.lr", "-1"]),
    "warm-up": (["--model.warmup_tokens=65"], ["model.warmup_tokens", "65"]),
    "wrong type": ([f"{LM}d_model=wide"], ["model.lm.d_model", "int", "wide"]),
    "wrong type in data": (["--data.seq_len=3.5"], ["data.seq_len", "int", "3.5"]),
    "wrong choice": (["--trainer.precision=bf17"], ["trainer.precision", "bf17", "bf16-mixed"]),
    "no such class": (["--trainer.callbacks=Nope"], ["trainer.callbacks", "Nope"]),
    "unknown argument": (["--model.lm.layut=[gdn2]"], ["model.lm.layut", "did you mean 'model.lm.layout'"]),
    "unknown argument and its value": (["--data.seqlen", "3"], ["data.seqlen", "did you mean 'data.seq_len'"]),
    "unknown argument, like no other": (["--data.zzz", "3"], ["data.zzz", "unknown key", "seq_len"]),
    "stray argument": (["stray"], ["stray"]),
    "argument without a value": (["--model.lm.d_model"], ["model.lm.d_model", "expected one argument"]),
    "mixer's setting without a value": ([f"{LM}mixers.gdn2.num_heads"], ["model.lm.mixers.gdn2.num_heads", "expected a value"]),
    "seed of the model": ([f"{LM}seed=3"], ["model.lm.seed", "seed_everything"]),
    "trainer": (["--trainer.accelerator=gpus"], ["trainer", "gpus"]),
    "fsdp": (["--trainer.strategy=fsdp"], ["trainer.strategy", "did you mean 'fsdp2'", "legal: auto, ddp, fsdp2,"]),
    "strategy misspelt": (["--trainer.strategy=fdsp2"], ["trainer.strategy", "did you mean 'fsdp2'"]),
    "another strategy misspelt": (["--trainer.strategy=ddpp"], ["trainer.strategy", "did you mean 'ddp'"]),
    "deepspeed": (["--trainer.strategy=deepspeed_stage_2"], ["trainer.strategy", "'deepspeed_stage_2'", "legal: auto"]),
    "processes that take the model with them": (["--trainer.strategy=ddp_spawn"], ["trainer.strategy", "did you mean 'ddp'"]),
    "float16 on a CPU": (["--trainer.precision=16-mixed"], ["trainer.precision", "needs a GPU", "bf16-mixed", "got 16-mixed"]),
    "float16 on a CPU, by its short name": (["--trainer.precision=16"], ["trainer.precision", "needs a GPU", "got 16"]),
    "float16 under ddp": (["--trainer.precision=16-mixed", "--trainer.strategy=ddp"], ["trainer.precision", "needs a GPU"]),
    "float16 under fsdp2": (
        ["--trainer.precision=16-mixed", "--trainer.strategy=fsdp2"],
        ["trainer.precision", "fsdp2 takes 32-true", "got 16-mixed"],
    ),
    "changes of nothing": (["--may_change=data"], ["may_change: is of a training that goes on"]),
    "accumulation 0": (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches", ">= 1"]),
    "checkpoint settings at odds": (["--checkpoint.every_n_train_steps=1", "--checkpoint.every_n_epochs=1"], ["every_n_train_steps"]),
    "tokenizer missing": (["--data.tokenizer=none.model"], ["data.tokenizer", "none.model", "does not exist"]),
    "sequence length 0": (["--data.seq_len=0"], ["data.seq_len", "at least 1"]),
    "monitor": (["--checkpoint.monitor=val/los"], ["checkpoint.monitor", "did you mean 'val/loss'"]),
    "clipping at -1": (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val", "-1"]),
    "clipping at NaN": (["--trainer.gradient_clip_val=.nan"], ["trainer.gradient_clip_val", "nan"]),
    "initial values 0": ([f"{LM}init_std=0"], ["model.lm.init_std", "above 0"]),
    "initial values infinite": ([f"{LM}init_std=.inf"], ["model.lm.init_std", "inf"]),
    "validation every 0 steps": (["--trainer.val_check_interval=0"], ["trainer.val_check_interval", "0"]),
    "validation every 0 epochs": (["--trainer.check_val_every_n_epoch=0"], ["trainer.check_val_every_n_epoch", "null or", "0"]),
    "rows every -1 steps": (["--trainer.log_every_n_steps=-1"], ["trainer.log_every_n_steps", "-1"]),
    "a trial of -2 batches": (["--trainer.num_sanity_val_steps=-2"], ["trainer.num_sanity_val_steps", "-2"]),
    "nothing to train on": (["--trainer.limit_train_batches=0"], ["trainer.limit_train_batches", "> 0"]),
    "more steps than all": (["--trainer.min_steps=5", "--trainer.max_steps=3"], ["trainer.min_steps", "at most trainer.max_steps", "got 5"]),
    "at least -2 epochs": (["--trainer.min_epochs=-2"], ["trainer.min_epochs", "-2"]),
    "runs nowhere": (["--trainer.default_root_dir=null"], ["trainer.default_root_dir: must be a folder", "None"]),
    "runs elsewhere": (["--trainer.default_root_dir=s3://a/b"], ["trainer.default_root_dir", "of this machine", "s3://a/b"]),
    "checkpoints nowhere": (["--checkpoint.dirpath="], ["checkpoint.dirpath", "null or a folder"]),
    "steps -2": (["--trainer.max_steps=-2"], ["trainer.max_steps", "-2"]),
    "devices": (["--trainer.devices=foo"], ["trainer.devices", "foo"]),
    "seed": (["--seed_everything=-1"], ["seed_everything", "-1"]),
    "large seed": (["--seed_everything=4294967296"], ["seed_everything", "4294967296"]),
    "no trainer": (["--trainer=null"], ["trainer", "null"]),
}


@pytest.mark.parametrize("case", CASES)
def test_fit_refuses(case: str, refused: Run) -> None:
    arguments, expected = CASES[case]
    # The corpus does not exist either: settings are checked before it is looked for.
    line = refused("fit", "--config", "config.yaml", "--data.path=no_such_corpus", *arguments)
    for text in expected:
        assert text in line


FILES = {
    "unknown key": ("model: {lm: {layut: [gdn2]}}", ["model.lm.layut", "did you mean 'model.lm.layout'"]),
    "unknown group": ("modle: {lr: 1}", ["modle.lr", "did you mean 'model.lr'"]),
    "unknown trainer setting": ("trainer: {max_stpes: 1}", ["trainer.max_stpes", "did you mean 'trainer.max_steps'"]),
    "wrong type": ("data: {seq_len: long}", ["data.seq_len", "int", "long"]),
    "settings that are none": ("model: {lm: {mixers: {gdn2: 3}}}", ["model.lm.mixers", "gdn2"]),
    "seed of the data": ("data: {seed: 3}", ["data.seed", "seed_everything"]),
    "malformed": ("model: {lm: [", ["bad.yaml", "line 1", "not valid YAML"]),
    "indented wrongly": ("model:\n  lr: 1\n lm: 3\n", ["bad.yaml", "line 3", "not valid YAML"]),
    "key twice": ("model:\n  lr: 1\n  lr: 2\n", ["bad.yaml", "line 3", "'lr' stands twice"]),
    "a list": ("- model", ["bad.yaml", "list"]),
    "empty": ("", ["bad.yaml", "must hold settings"]),
    "trainer: null": ("trainer: null", ["trainer: must hold settings", "null"]),
    "data: []": ("data: []", ["data: must hold settings", "[]"]),
    "summary: 3": ("summary: 3", ["summary: must hold settings", "3"]),
    "a date": ("model: {lr: 2026-01-02}", ["model.lr", "2026-01-02"]),
    "an alias of what it is in": ("model: &m {lm: *m}", ["bad.yaml", "Circular"]),
    "a set": ("data: {path: !!set {a}}", ["bad.yaml", "set"]),
    "a tag": ("model: !!python/object:os.system {}", ["bad.yaml", "not valid YAML"]),
}


@pytest.mark.parametrize("case", FILES)
def test_fit_refuses_a_file(case: str, refused: Run) -> None:
    text, expected = FILES[case]
    Path("bad.yaml").write_text(text)
    line = refused("fit", "--config", "config.yaml", "--config", "bad.yaml", "--data.path=no_such_corpus")
    for part in expected:
        assert part in line


def test_missing_config(refused: Run) -> None:
    assert "'no.yaml'" in refused("fit", "--config", "no.yaml")
    line = refused("fit", "--config", "quikstart")
    assert "did you mean 'quickstart'" in line
    assert "paper/gdn2_hybrid_1.3b" in line


def test_config_that_is_not_text(refused: Run) -> None:
    Path("config.bin").write_bytes(b"\xff\xfe\x00")
    assert "config.bin cannot be read" in refused("fit", "--config", "config.bin")


def test_no_config_at_all(refused: Run) -> None:
    line = refused("fit")
    assert "model.lm.vocab_size" in line
    assert "must be set" in line
    assert "--config" in line


CORPORA = {
    "missing": (None, ["no_such_corpus", "does not exist"]),
    "empty": (b"", ["corpus.bin", "no documents"]),
    "not UTF-8": (b"good text, then \xff\xfe", ["corpus.bin", "not UTF-8", "offset 16"]),
    "smaller than a sequence": (b"short", ["corpus.bin", "one sequence needs 33"]),
}


@pytest.mark.parametrize("case", CORPORA)
def test_corpus(case: str, refused: Run) -> None:
    content, expected = CORPORA[case]
    path = "no_such_corpus" if content is None else "corpus.bin"
    if content is not None:
        Path(path).write_bytes(content)
    line = refused("fit", "--config", "config.yaml", f"--data.path={path}")
    assert "data.path" in line
    for text in expected:
        assert text in line


def test_run_folder_that_cannot_be_written(refused: Run) -> None:
    Path("file").write_text("")
    line = refused("fit", "--config", "config.yaml", "--data.path=no_such_corpus", "--trainer.default_root_dir=file/runs")
    assert "trainer.default_root_dir" in line
    assert "file/runs" in line


# --- checkpoints ---


@pytest.fixture
def checkpoint(_workplace: None) -> Path:
    """A checkpoint of CONFIG's model, untrained."""
    from lit_modules.checkpoint import write_header
    from lit_modules.decoder_lm import DecoderLM

    lm = DecoderLM(**CONFIG["model"]["lm"])
    content: dict[str, object] = {"state_dict": {f"lm.{name}": value for name, value in lm.state_dict().items()}}
    write_header(content, lm, tokens=0)
    torch.save(content, "model.ckpt")
    return Path("model.ckpt")


COMMANDS = ["fit", "validate", "test", "predict", "preflight"]


@pytest.mark.parametrize("command", [*COMMANDS, "generate"])
def test_checkpoint_missing(command: str, refused: Run) -> None:
    assert "none.ckpt does not exist" in refused(command, "--ckpt_path=none.ckpt")


@pytest.mark.parametrize("command", [*COMMANDS, "generate"])
def test_no_last_checkpoint(command: str, refused: Run) -> None:
    assert "last.ckpt" in refused(command, "--ckpt_path", "last")


@pytest.mark.parametrize("command", [*COMMANDS, "generate"])
def test_checkpoint_truncated(command: str, checkpoint: Path, refused: Run) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    assert "model.ckpt: is truncated" in refused(command, "--ckpt_path=model.ckpt")


@pytest.mark.parametrize("command", ["fit", "generate"])
def test_not_a_checkpoint(command: str, refused: Run) -> None:
    assert "config.yaml" in refused(command, "--ckpt_path=config.yaml")
    torch.save({"weights": torch.zeros(3)}, "other.ckpt")
    assert "is not a checkpoint of lightning-mixers" in refused(command, "--ckpt_path=other.ckpt")
    Path("folder").mkdir()
    assert "folder" in refused(command, "--ckpt_path=folder")


@pytest.mark.parametrize("command", COMMANDS)
def test_checkpoint_of_another_layout(command: str, checkpoint: Path, refused: Run) -> None:
    line = refused(command, "--config=config.yaml", f"--ckpt_path={checkpoint}", "--model.lm.layout=[kda, swa]")
    assert "model.lm.layout" in line
    assert "model.ckpt" in line


def test_checkpoint_of_another_size(checkpoint: Path, refused: Run) -> None:
    assert "model.lm.d_model" in refused("fit", "--config=config.yaml", f"--ckpt_path={checkpoint}", "--model.lm.d_model=32")
    line = refused("fit", "--config=config.yaml", f"--ckpt_path={checkpoint}", "--model.lm.mixers.swa.window=4")
    assert "model.lm.mixers.swa.window" in line


HEADERS = {
    "no format": ("lightning_mixers", {"tokens": 0}, "lightning_mixers.format"),
    "no tokens": ("lightning_mixers", {"format": 1}, "lightning_mixers.tokens"),
    "tokens that are none": ("lightning_mixers", {"format": 1, "tokens": "many"}, "'many'"),
    "no layout": ("lm", {k: v for k, v in CONFIG["model"]["lm"].items() if k != "layout"}, "lm.layout is missing"),
    "layout of numbers": ("lm", {**CONFIG["model"]["lm"], "layout": [1]}, "lm.layout is [1]"),
    "size that is no number": ("lm", {**CONFIG["model"]["lm"], "d_model": "16"}, "lm.d_model is '16'"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_checkpoint_with_a_damaged_header(case: str, checkpoint: Path, refused: Run) -> None:
    key, value, expected = HEADERS[case]
    torch.save({**torch.load(checkpoint), key: value}, checkpoint)
    for command in ("fit", "validate", "generate"):
        line = refused(command, f"--ckpt_path={checkpoint}")
        assert "model.ckpt" in line
        assert expected in line


def test_checkpoint_with_damaged_tensors(checkpoint: Path, refused: Run) -> None:
    content = torch.load(checkpoint)
    state = content["state_dict"]
    first = next(iter(state))
    for damaged, expected in (
        ({name: value for name, value in state.items() if name != first}, f"it has no tensor {first}"),
        ({**state, first: torch.zeros(2, 3)}, f"{first} has the shape [2, 3]"),
        ({**state, "lm.more": torch.zeros(1)}, "has the tensor lm.more"),
    ):
        torch.save({**content, "state_dict": damaged}, checkpoint)
        for command in ("fit", "validate"):
            assert expected in refused(command, "--config=config.yaml", "--data.path=corpus.txt", f"--ckpt_path={checkpoint}")


def test_checkpoint_that_training_cannot_go_on_from(checkpoint: Path, refused: Run) -> None:
    arguments = ("--config=config.yaml", "--data.path=corpus.txt", f"--ckpt_path={checkpoint}")
    content = torch.load(checkpoint)
    for command in ("fit", "preflight"):
        assert "has no optimizer_states" in refused(command, *arguments)
    torch.save({**content, "lightning_mixers": {"format": 1, "tokens": 64}}, checkpoint)
    for command in ("fit", "preflight"):
        assert "already seen 64 of 64 tokens; raise model.max_tokens" in refused(command, *arguments)


def test_precision_of_a_package_that_is_not_there(refused: Run) -> None:
    line = refused("fit", "--config=config.yaml", "--data.path=corpus.txt", "--trainer.precision=transformer-engine")
    assert "trainer: " in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, RuntimeError])
def test_training_that_breaks_off_keeps_what_it_learned(error: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_modules.checkpoint import read_checkpoint
    from lit_modules.lit_lm import LitLM

    step = LitLM.training_step

    def breaks(self: LitLM, batch: Any) -> torch.Tensor:
        if self.trainer.global_step == 1:
            raise error("loss is nan")
        return step(self, batch)

    monkeypatch.setattr(LitLM, "training_step", breaks)
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores Ctrl-C from the first one on
    arguments = ["fit", "--config=config.yaml", "--data.path=corpus.txt", "--data.val_path=corpus.txt"]
    try:
        if error is RuntimeError:
            with pytest.raises(RuntimeError):
                main(arguments)
        else:
            assert main(arguments) == {KeyboardInterrupt: 130, FloatingPointError: 1}[error]
    finally:
        signal.signal(signal.SIGINT, handler)
    said = capsys.readouterr()
    name = "diverged.ckpt" if error is FloatingPointError else "last.ckpt"
    (file,) = Path("runs").glob("*/*/checkpoints/*.ckpt")
    assert file.name == name
    content = read_checkpoint(file)
    assert (content["global_step"], content["lightning_mixers"]["tokens"]) == (1, 32)
    assert f"/checkpoints/{name} (step 1)" in said.out
    if error is not RuntimeError:
        assert said.err.splitlines()[-1] == {KeyboardInterrupt: "interrupted", FloatingPointError: "error: loss is nan"}[error]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_last_without_a_config_is_the_newest_of_all_runs(command: str) -> None:
    folder = Path("runs/some/2026/checkpoints")
    folder.mkdir(parents=True)
    torch.save({"weights": 1}, folder / "last.ckpt")
    with pytest.raises(ConfigError, match=r"runs/some/2026/checkpoints/last.ckpt: is not a checkpoint"):
        find_command(command)(["--ckpt_path=last"])


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_without_a_checkpoint(command: str, refused: Run) -> None:
    assert f"ckpt_path: must be set, {command} needs a trained model" in refused(command, "--config=config.yaml")


# --- the small commands ---


def test_generate_refuses(checkpoint: Path, refused: Run) -> None:
    assert "ckpt_path: must be set" in refused("generate")
    assert "tokenizer: expected one argument" in refused("generate", f"--ckpt_path={checkpoint}", "--tokenizer")
    assert "tokenizer: must be set" in refused("generate", f"--ckpt_path={checkpoint}")  # its folder's config names none
    assert "did you mean 'prompt'" in refused("generate", f"--ckpt_path={checkpoint}", "--promt", "x")
    assert "max_new_tokens" in refused("generate", f"--ckpt_path={checkpoint}", "--max_new_tokens=0")
    assert "temperature" in refused("generate", f"--ckpt_path={checkpoint}", "--temperature=-1", "--tokenizer=bytes")
    for device in ("abacus", "meta", "cuda:99", "3.5", "cpu:x"):
        assert "device" in refused("generate", f"--ckpt_path={checkpoint}", f"--device={device}")
    for value in ("nan", "inf", "-inf"):
        assert "temperature" in refused("generate", f"--ckpt_path={checkpoint}", f"--temperature={value}")
    assert "top_p" in refused("generate", f"--ckpt_path={checkpoint}", "--top_p=nan")
    for seed in (-1, 2**64):
        assert "seed" in refused("generate", f"--ckpt_path={checkpoint}", f"--seed={seed}")


def test_mixers_refuses(refused: Run) -> None:
    assert "tokens" in refused("mixers", "--tokens=many")
    assert "tokens" in refused("mixers", "--tokens=0")
    assert "d_model" in refused("mixers", "--d_model=0")


def test_unknown_command(refused: Run) -> None:
    assert "did you mean 'fit'" in refused("fitt")
