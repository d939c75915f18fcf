"""Paths that a user gives: `~` is the home folder everywhere, and what the system takes for no path is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import here_fixture  # noqa: F401

from lit_modules.paths import given_path
from mixers.errors import ConfigError
from recipes.__main__ import main

SETTINGS = ("config", "data.path", "data.val_path", "data.test_path", "data.tokenizer", "trainer.default_root_dir", "checkpoint.dirpath", "ckpt_path")
COMMANDS = {
    **{f"fit --{name}": (["fit", *(() if name == "config" else ("--config", "quickstart")), f"--{name}"], name) for name in SETTINGS},
    "validate": (["validate", "--ckpt_path"], "ckpt_path"),
    "generate": (["generate", "--ckpt_path"], "ckpt_path"),
    "consolidate": (["consolidate"], "folder"),
    "diff": (["diff"], "a"),
    "prepare --source": (["prepare", "--out", "there", "--tokenizer", "bytes", "--source"], "source"),
    "prepare --tokenizer": (["prepare", "--out", "there", "--source", "x.txt", "--tokenizer"], "tokenizer"),
    "prepare --out": (["prepare", "--source", "x.txt", "--tokenizer", "bytes", "--out"], "out"),
}
NO_PATHS = {"of nobody": ("~nobody_here/a", "Could not determine home directory"), "too long": ("a" * 5000, "File name too long")}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", NO_PATHS)
def test_what_is_no_path_is_one_line(
    command: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("a text")
    arguments, key = COMMANDS[command]
    path, why = NO_PATHS[what]
    assert main([*arguments, path, *(["b"] if command == "diff" else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {key}: {path[:20]}")
    assert line.endswith(f"cannot be looked up: {why}")
    assert len(line) < 250
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given_path("~/runs", "key") == tmp_path / "runs"
    assert given_path(tmp_path, "key") == tmp_path


def test_runs_below_home_are_gone_on_with(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`~` in a config, where no shell resolves it: `auto` looks where the runs are."""
    monkeypatch.setenv("HOME", str(here))
    fit = ["fit", "--config", "small.yaml", "--trainer.default_root_dir", "~/home_runs", "--ckpt_path", "auto", "--trainer.max_steps"]
    assert main([*fit, "2"]) == 0
    assert "training starts at the beginning" in capsys.readouterr().out
    assert main([*fit, "3"]) == 0
    assert "training starts at the beginning" not in capsys.readouterr().out
    assert len(list((here / "home_runs").iterdir())) == 2


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(ConfigError, match=r"data\.path: .* cannot be looked up: Permission denied"):
        given_path(tmp_path / "a", "data.path")
