"""Mixers that are not in this repository: by entry point and by dotted path, listed, trained, and reported where they are broken."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch  # noqa: F401 (at once: it logs to what is stderr when it is imported, and a test's is closed after the test)
import pytest
import yaml
from lit_cases import one_thread  # noqa: F401

from recipes.__main__ import main

MIXER = '''
"""A package outside the repository."""
from typing import NamedTuple
import torch
from torch import Tensor
from mixers.base import SequenceMixer, linear_flops
from mixers.layers import Linear, normal


class Nothing(NamedTuple):
    seen: Tensor


class TokenWise(SequenceMixer[Nothing]):
    """Looks at no other token.

    Args:
        d_model: width of the input and the output.
        expand: width between, over d_model.
    """

    def __init__(self, d_model: int, expand: int = 2) -> None:
        super().__init__(d_model)
        self.up = Linear(d_model, expand * d_model, init=normal(0.02))
        self.down = Linear(expand * d_model, d_model, init=normal(0.02))

    def forward(self, x_BTD, state=None, *, cu_seqlens=None):
        self.check_input(x_BTD, state, cu_seqlens)
        return self.down(self.up(x_BTD).relu()), state

    def step(self, x_BD, state):
        return self.down(self.up(x_BD).relu()), state

    def init_state(self, batch_size, *, max_tokens=None, device=None, dtype=None):
        return Nothing(torch.zeros(batch_size, device=device))

    def state_numel(self, tokens: int) -> int:
        return 1

    def flops(self, tokens: int) -> int:
        return linear_flops(self, tokens)


class NoDefault(TokenWise):
    """Has a setting that must be given."""

    def __init__(self, d_model: int, expand: int) -> None:
        super().__init__(d_model, expand)
'''


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution with three mixers under entry points, two of them broken, in the current folder and on the path."""
    (tmp_path / "outside_pkg").mkdir()
    (tmp_path / "outside_pkg" / "__init__.py").write_text(MIXER)
    (tmp_path / "outside_broken.py").write_text("raise RuntimeError('this module [sic] does not\\nimport')\n")
    info = tmp_path / "outside_mixers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-mixers\nVersion: 1.0\n")
    points = ["tokenwise = outside_pkg:TokenWise", "broken = outside_broken:Broken", "missing = no_such_package:Mixer"]
    (info / "entry_points.txt").write_text("\n".join(["[lightning_mixers]", *points, ""]))
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat. " * 50)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


def config(layout: list[str], mixers: dict[str, dict[str, object]]) -> list[str]:
    """Arguments that train a small model for a step."""
    lm = {"vocab_size": 257, "d_model": 16, "n_layers": 2, "mlp_width": 16, "layout": layout, "mixers": mixers}
    data = {"path": "corpus.txt", "val_path": "corpus.txt", "seq_len": 32, "batch_size": 2}
    trainer = {"accelerator": "cpu", "fast_dev_run": True}
    content = {"model": {"lm": lm, "warmup_tokens": 0}, "data": data, "trainer": trainer, "summary": {"max_new_tokens": 2}}
    Path("config.yaml").write_text(yaml.safe_dump(content))
    return ["--config", "config.yaml"]


def rows(text: str) -> dict[str, str]:
    """The rows of the table by the name of the mixer, each on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            name = cells[0] or name
            found[name] = f"{found.get(name, '')} {'  '.join(cells[1:])}"
    return {name: re.sub(r"\s+", " ", row) for name, row in found.items()}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixers", "--tokens", "16,4096", "--d_model", "64"]) == 0
    table = rows(capsys.readouterr().out)
    assert set(table) >= {"gdn2", "kda", "gdn", "deltanet", "gla", "linear_attention", "attention", "swa", "tokenwise", "broken", "missing"}
    assert "entry point of outside-mixers" in table["tokenwise"]
    assert "expand: int = 2" in table["tokenwise"]
    assert "built in" in table["gdn2"]
    assert "num_heads: int = 16" in table["gdn2"]
    assert f"{2 * 16 * 64:,} {2 * 2048 * 64:,}" in table["swa"]
    assert "window: int | None = 2048" in table["swa"]


def test_broken_plugins_stand_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixers"]) == 0
    table = rows(capsys.readouterr().out)
    assert "RuntimeError: this module [sic] does not import" in table["broken"]
    assert "no_such_package" in table["missing"]
    assert "cannot be used" in table["missing"]


def test_table_of_a_config_and_of_names(capsys: pytest.CaptureFixture[str]) -> None:
    mixers = {"outside_pkg.TokenWise": {"expand": 3}, "local": {"mixer": "swa", "window": 5, "num_heads": 2}, "kda": {"num_heads": 3}}
    arguments = config(["local", "outside_pkg.TokenWise"], mixers)
    assert main(["mixers", *arguments, "--tokens=16", "outside_pkg.NoDefault", "outside_pkg.Nothing"]) == 0
    table = rows(capsys.readouterr().out)
    assert "alias of swa" in table["local"]
    assert "window: int | None = 5" in table["local"]
    assert f" {2 * 5 * 16} " in table["local"]  # at the config's d_model
    assert "num_heads: int = 3" in table["kda"]
    assert "expand: int = 3" in table["outside_pkg.TokenWise"]
    assert "dotted path" in table["outside_pkg.TokenWise"]
    assert "expand" in table["outside_pkg.NoDefault"]
    assert "must be set" in table["outside_pkg.NoDefault"]
    assert "outside_pkg.Nothing is not a" in table["outside_pkg.Nothing"]


def test_table_without_lightning() -> None:
    code = "import sys; from recipes.__main__ import main; main(['mixers']); print(*sys.modules, file=sys.stderr)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "gdn2" in done.stdout
    assert not {"lightning", "lit_modules.lit_lm"} & set(done.stderr.split())


@pytest.mark.parametrize("name", ["tokenwise", "outside_pkg.TokenWise"])
def test_plugin_trains(name: str) -> None:
    arguments = config([name, "gdn2"], {name: {"expand": 3}, "gdn2": {"num_heads": 2, "head_dim": 4}})
    assert main(["fit", *arguments]) == 0
    assert main(["fit", *arguments, f"--model.lm.mixers.{name}.expand=1", "--model.lm.layout", f"[{name}]"]) == 0
    assert main(["fit", *arguments, "--model.lm.layout=[a]", f"--model.lm.mixers={{a: {{mixer: {name}, expand: 4}}}}"]) == 0


def test_settings_of_a_dotted_path_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = config(["gdn2"], {"gdn2": {"num_heads": 2, "head_dim": 4}})
    layout = "--model.lm.layout=[outside_pkg.NoDefault]"
    assert main(["preflight", *arguments, layout]) == 2
    assert "model.lm.mixers.outside_pkg.NoDefault.expand: must be set" in capsys.readouterr().err
    for setting in ("--model.lm.mixers.outside_pkg.NoDefault.expand=5", "--model.lm.mixers.outside_pkg.NoDefault={expand: 5}"):
        assert main(["preflight", *arguments, layout, setting]) == 0
        assert f"{2 * 16 * 5 * 16:,}" in capsys.readouterr().out  # parameters of a layer's mixer


def test_broken_plugin_in_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *config(["missing"], {})]) == 2
    error = capsys.readouterr().err
    assert "no_such_package" in error
    assert "entry point of outside-mixers" in error
    with pytest.raises(RuntimeError, match="does not"):  # an error of the plug-in's own keeps its traceback
        main(["fit", *config(["broken"], {})])


def test_name_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outside_mixers-1.0.dist-info" / "entry_points.txt").write_text("[lightning_mixers]\ngdn2 = outside_pkg:TokenWise\n")
    assert main(["mixers"]) == 2
    assert "'gdn2'" in capsys.readouterr().err
