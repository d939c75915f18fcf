"""`match`: widths against models that are built, the state beside the paper's, errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import here_fixture, one_thread  # noqa: F401
from lit_cases import make_lm

from mixers.errors import ConfigError
from recipes.__main__ import main
from recipes.commands.match import at_width, recurrent_numbers, solve, state_notes
from recipes.commands.sizes import parameters_in_blocks

LAYOUTS = [["attention"], ["gdn2", "swa"], ["mamba2"], ["linear_attention", "gla", "deltanet"]]
MIXERS = {
    "attention": {"num_heads": 2},
    "swa": {"num_heads": 2, "window": 4},
    "gdn2": {"num_heads": 2, "head_dim": 4},
    "mamba2": {"head_dim": 4, "d_state": 3},
    "deltanet": {"num_heads": 2, "head_dim": 4},
    "gla": {"num_heads": 2},
    "linear_attention": {"num_heads": 2},
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """What `match` prints, by the first word of each line, with its blanks squeezed."""
    capsys.readouterr()
    assert main(["match", *arguments]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    return {words[0]: " ".join(words[1:]) for words in lines if words}


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which `match` refuses."""
    capsys.readouterr()
    assert main(["match", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize("layout", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("width", [64, 128, 1024])
def test_widths_are_those_of_models_that_are_built(layout: list[str], width: int) -> None:
    lm = make_lm(layout=layout, mixers=MIXERS, n_layers=3)
    blocks = parameters_in_blocks(make_lm(layout=layout, mixers=MIXERS, n_layers=3, mlp_width=width))
    assert at_width(lm, width, 10**6).parameters == blocks
    assert solve(lm, blocks) == (width, blocks, blocks)
    assert solve(lm, int(blocks / 1.004)).width == width
    assert solve(lm, int(blocks / 0.996)).width == width


def test_no_width_fits() -> None:
    lm = make_lm(n_layers=3)
    fixed = at_width(lm, 0, 1).parameters
    with pytest.raises(ConfigError, match=rf"to: 100 is less than the {fixed} parameters that the blocks have without their MLPs"):
        solve(lm, 100)
    with pytest.raises(ConfigError, match=r"no multiple of 64 comes within 0.5 % of 1,000: mlp_width 64 gives .*, mlp_width 128 gives"):
        solve(lm, 1000)
    least, more = at_width(lm, 64, 1).parameters, at_width(lm, 128, 1).parameters
    with pytest.raises(ConfigError, match=r"mlp_width 128 gives [\d,]+ \(\+\d+\.\d\d %\), mlp_width 64 gives [\d,]+ \(-\d+\.\d\d %\)"):
        solve(lm, (least + 2 * more) // 3)
    with pytest.raises(ConfigError, match=r"mlp_width 64 gives [\d,]+ \(-\d+\.\d\d %\), mlp_width 128 gives [\d,]+ \(\+\d+\.\d\d %\)"):
        solve(lm, (2 * least + more) // 3)


def test_recurrent_numbers_leave_out_convolutions_and_caches() -> None:
    lm = make_lm(layout=list(MIXERS), mixers=MIXERS, n_layers=7)
    assert recurrent_numbers(lm) == {
        "attention": None,
        "swa": None,
        "gdn2": 2 * 4 * 4,
        "mamba2": 16 * 3,
        "deltanet": 2 * 4 * 4,
        "gla": 2 * 2 * 4,
        "linear_attention": 2 * 4 * 5,
    }
    assert "note: mamba2 carries 48 numbers at d_model 8, not 262,144" in state_notes(lm)


def test_report_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "--config", "paper/gdn2_hybrid_1.3b", "--to", "1.3e9")
    assert found["target"] == "1,300,000,000 parameters in the blocks"
    assert found["mlp_width"] == "6,784 (a multiple of 64) gives 1,300,314,384 (+0.02 %)"
    assert found["now"] == "the same"
    assert found["gdn2"] == "262,144 equal 262,144 18,432"
    assert found["swa"] == "- - - 9,437,184"
    assert "note:" not in found


def test_report_does_not_hide_the_state_of_mamba(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "--config=paper/gdn2_1.3b", "--to=1_300_000_000", "--model.lm.layout", "[mamba2]")
    assert found["mlp_width"].startswith("5,760 ")
    assert found["now"] == "6,208 gives 1,354,573,872 (+4.20 %)"
    assert found["mamba2"] == "294,912 +12.5 % 262,144 14,208"
    assert found["note:"] == "mamba2 carries 294,912 numbers at d_model 2,304, not 262,144; at d_model 2,048 it is equal"


@pytest.mark.parametrize(("recipe", "rest"), [("mamba3_siso", "10,440"), ("mamba3_mimo_hybrid", "24,264")])
def test_report_does_not_hide_the_state_of_mamba3(recipe: str, rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside it the last token's keys, values, weight and angles."""
    found = run(capsys, "--config", f"paper/{recipe}_1.3b", "--to=1.3e9")
    assert found["now"] == "the same"
    assert found["mamba3"] == f"294,912 +12.5 % 262,144 {rest}"
    assert found["note:"] == "mamba3 carries 294,912 numbers at d_model 2,304, not 262,144; at d_model 2,048 it is equal"


def test_a_config_without_a_width_and_heads_that_do_not_fit_the_papers_width(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "model: {lm: {vocab_size: 257, d_model: 48, n_layers: 2, layout: [mamba2], mixers: {mamba2: {head_dim: 3, d_state: 4}}}}"
    (here / "no_width.yaml").write_text(text)
    found = run(capsys, "-c", "no_width.yaml", "--to", "0.0995e6", "--model.lm.n_layers=1")
    assert found["mlp_width"].startswith("576 ")
    assert found["now"].startswith("64 gives ")
    assert found["mamba2"].split()[-2:] == ["-", "312"]
    assert found["note:"].endswith("not 262,144")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=small.yaml"], "to: must be set"),
        (["--config=small.yaml", "--to"], "to: expected one argument"),
        (["--config=small.yaml", "--to=many"], "to: must be a number of parameters such as 1.3e9 (at most 1e+14), got 'many'"),
        (["--config=small.yaml", "--to=1e999999999"], "to: must be a number"),
        (["--config=small.yaml", "--to=1e9", f"--model.lm.mlp_width={10**20}"], "model.lm: a size is too large for any tensor: "),
        (["--config=small.yaml", "--to=1e9", f"--model.lm.mlp_width={10**15}"], "model.lm: must have at most 1e+14 parameters, got "),
        (["--config=small.yaml", "--to=-1e9"], "to: must be a number"),
        (["--config=small.yaml", "--to=0"], "to: must be a number"),
        (["--config=small.yaml", "--to=1.5"], "to: must be a number"),
        (["--config=small.yaml", "--to=inf"], "to: must be a number"),
        (["--config=small.yaml", "--to=nan"], "to: must be a number"),
        (["--config=small.yaml", "--to=1000"], "to: 1,000 is less than"),
        (["--config=small.yaml", "--to=20000"], "to: no multiple of 64 comes within 0.5 % of 20,000"),
        (["--config=none.yaml", "--to=1e9"], "config: unknown file or recipe 'none.yaml'"),
        (["--to=1e9"], "must be set"),
        (["--config=small.yaml", "--to=1e6", "--model.lm.mlp_width=wide"], "model.lm.mlp_width: expected int, got wide"),
        (["--config=small.yaml", "--to=1e6", "--model.lm.layout=[mamba4]"], "unknown mixer 'mamba4'; did you mean 'mamba"),
        (["--config=small.yaml", "--to=1e6", "--model.lm.layout=[mamba2]"], "model.lm.mixers.mamba2.head_dim: 64 does not divide"),
        (["--config=small.yaml", "--to=1e6", "--model.lm.depth=3"], "model.lm.depth: unknown key"),
        (["--config=small.yaml", "--to=1e6", "--ckpt_path=last"], "ckpt_path: match takes a config, not a checkpoint"),
    ],
    ids=str,
)
def test_refusals(arguments: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    assert expected in refuse(capsys, *arguments)
