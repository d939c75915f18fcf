"""`bench train`: its refusals, a real training on a CPU, trainings that fail, the table of the page."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from bench_cases import MACHINE

from mixers.errors import ConfigError
from recipes.__main__ import main
from recipes.commands import bench_plot, bench_rows, bench_train
from recipes.commands.bench_train import TRAINING, Training, devices_of, row_of

REFUSED = {
    "devices": (["--on", "ddp"], "on: must be STRATEGY:DEVICES"),
    "devices of 0": (["--on", "auto:0"], "on: must be STRATEGY:DEVICES"),
    "devices that are no number": (["--on", "ddp:two"], "on: must be STRATEGY:DEVICES"),
    "strategy": (["--on", "fsdp:2"], "unknown strategy 'fsdp'; did you mean 'fsdp2'"),
    "shapes": (["--shapes", "4"], "shapes: must be batch x tokens"),
    "accumulate": (["--accumulate", "0"], "accumulate: must be an integer >= 1"),
    "no recipe": (["--config", ","], "config: must name at least one recipe"),
    "recipe": (["--config", "quickstart+tiniest"], "config: unknown file or recipe 'tiniest'; did you mean 'tiny'"),
    "no GPU": (["--config", "quickstart"], "bench: needs a GPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = REFUSED[case]
    assert main(["bench", "train", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_devices() -> None:
    assert devices_of("auto:1,ddp:2,fsdp2:8") == [("auto", 1), ("ddp", 2), ("fsdp2", 8)]
    with pytest.raises(ConfigError, match="'ddp:2,'"):
        devices_of("ddp:2,")


def test_a_training_and_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first has a row, with figures of its own metrics; of the other the user reads why it has none."""
    monkeypatch.setattr(bench_train, "needs_gpu", lambda: None)
    recipes = "quickstart+tiny,tiny"  # the second has no layout
    code = main(["bench", "train", "--config", recipes, "--shapes", "2x32", "--accumulate", "2", "--out", str(tmp_path), "--commit", "abc"])
    assert code == 1
    said = capsys.readouterr()
    assert "quickstart+tiny, 2 x 32 tokens, 2 micro-batches a step" in said.out
    assert "no figure: tiny, 2 x 32 tokens, 2 micro-batches a step, auto on 1: exit code 2: model.lm.layout: must be set" in said.err
    (row,) = bench_rows.read(tmp_path, TRAINING, Training)
    assert row[:6] == ("quickstart+tiny", "auto", 1, 2, 32, 2)
    assert float(row.tokens_per_second) > 10
    assert row.ratio == "1.000"
    assert (row.gpu, row.commit) == ("cpu", "abc")


def test_all_but_the_data_of_a_recipe_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's recipes name shards and a tokenizer that no machine has; everything else of them is trained as it is."""
    seen: list[list[str]] = []

    class Done:
        returncode, stderr = 0, ""

    def fake(command: list[str], **_: object) -> Done:
        seen.append(command)
        root = next(word for word in command if word.startswith("--trainer.default_root_dir=")).partition("=")[2]
        folder = Path(root) / "run"
        folder.mkdir()
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["step", "tokens_per_second", "mfu"], [0, "", ""], [1, 50, 0.1], [2, 100, 0.4], [3, "", ""]])
        return Done()

    monkeypatch.setattr(bench_train.subprocess, "run", fake)
    found = bench_train.train("paper/gdn2_hybrid_1.3b", "fsdp2", 2, 4, 4096, 3)
    assert found == {"step": 2, "tokens_per_second": 100, "mfu": 0.4}
    (command,) = seen
    assert command[1:6] == ["-m", "recipes", "fit", "--config", "paper/gdn2_hybrid_1.3b"]
    assert {"--data.path=null", "--trainer.devices=2", "--trainer.strategy=fsdp2", "--trainer.accumulate_grad_batches=3"} < set(command)
    assert not any(word.startswith("--model.lm") for word in command)


def test_the_page_shows_the_newest_training(tmp_path: Path) -> None:
    def row(rate: float, devices: int) -> Training:
        return row_of(
            ("quickstart", "ddp", devices, 4, 4096, 4), {"tokens_per_second": rate, "mfu": 0.25, "peak_memory_gib": 50.123}, 1000.0, MACHINE
        )

    bench_rows.append(tmp_path, TRAINING, [row(1000.0, 1), row(1500.0, 2)])
    bench_rows.append(tmp_path, TRAINING, [row(1900.0, 2)])
    text = bench_plot.write(tmp_path, tmp_path / "page.md").read_text()
    assert "## Whole trainings, NVIDIA H100" in text
    assert "| quickstart | ddp | 2 | 4 x 4,096, 4 | 1,900 | 1.900 |  | 25.0% | 50.12 |" in text
    assert "1,500" not in text
