"""Swaps and overrides from the command line: nothing stale, nothing lost."""

from __future__ import annotations

import copy
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from lit_cases import one_thread  # noqa: F401

from lit_modules.decoder_lm import DecoderLM
from mixers import registry
from recipes.__main__ import main
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import collect, merge
from recipes.commands.plan import make_plan

# Two settings of each that differ from the defaults and from everybody else's.
SETTINGS: dict[str, dict[str, Any]] = {
    "gdn2": {"num_heads": 2, "head_dim": 4, "erase": "scalar"},
    "kda": {"num_heads": 3, "head_dim": 5, "conv_size": 3},
    "gdn": {"num_heads": 4, "head_dim": 6, "norm_eps": 1e-3},
    "deltanet": {"num_heads": 5, "head_dim": 7, "v_head_dim": 9},
    "gla": {"num_heads": 6, "head_dim": 8, "v_head_dim": 10, "gate_low_rank": 11},
    "linear_attention": {"num_heads": 7, "head_dim": 9},
    "mamba2": {"head_dim": 16, "d_state": 11, "num_groups": 2},
    "mamba3": {"head_dim": 2, "d_state": 14, "mimo_rank": 3},
    "attention": {"num_heads": 8, "head_dim": 10, "rope_theta": 500.0},
    "swa": {"num_heads": 9, "head_dim": 12, "window": 13},
}
PAIRS = list(permutations(SETTINGS, 2))
LM: dict[str, Any] = {"vocab_size": 257, "d_model": 16, "n_layers": 2, "mlp_width": 16}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, layout: list[str] | None, mixers: dict[str, Any] | None, **more: Any) -> str:
    """A config file with these settings of the model."""
    lm = {**LM, "layout": layout, "mixers": mixers, **more}
    Path(name).write_text(yaml.safe_dump({"model": {"lm": {key: value for key, value in lm.items() if value is not None}}}))
    return name


def build(*arguments: str) -> DecoderLM:
    """The model that `fit` with these arguments would train, on the meta device."""
    return make_plan(MixersCLI("fit", collect(list(arguments))).config, needs_tokenizer=True).model.lm


def defaults(name: str) -> dict[str, Any]:
    return registry.resolve(name, {})[1]


def size_of(name: str) -> str:
    """A setting that takes 1 and 2 at any width of the model."""
    return "num_heads" if "num_heads" in defaults(name) else "head_dim"


def assert_mixer(lm: DecoderLM, layer: int, name: str, settings: dict[str, Any]) -> None:
    """A layer holds the mixer `name` with `settings`, and its defaults where they say nothing."""
    expected = registry.build(name, lm.settings["d_model"], {name: settings}) if settings else registry.build(name, lm.settings["d_model"], {})
    mixer = lm.mixers()[layer]
    assert type(mixer) is type(expected)
    shapes = {key: value.shape for key, value in mixer.named_parameters()}
    assert shapes == {key: value.shape for key, value in expected.named_parameters()}
    plain = {key: value for key, value in vars(expected).items() if isinstance(value, int | float | str | bool | None)}
    assert plain == {key: vars(mixer)[key] for key in plain}


def test_all_built_in_mixers_are_here() -> None:
    assert set(SETTINGS) == set(registry.BUILT_IN)
    for name, settings in SETTINGS.items():
        assert not settings.items() & defaults(name).items()


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_swap(a: str, b: str) -> None:
    """A config with layout [A] that lists settings for all; --model.lm.layout [B] takes B's and leaves everything else as it is."""
    file = write("a.yaml", [a], SETTINGS)
    lm = build("--config", file, "--model.lm.layout", f"[{b}]")
    assert lm.layer_names == [b, b]
    assert_mixer(lm, 0, b, SETTINGS[b])
    assert lm.settings["mixers"] == SETTINGS


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_swap_takes_nothing_over(a: str, b: str) -> None:
    """A config that has settings for A alone: B comes with its defaults, and with what is given for B."""
    file = write("a.yaml", [a], {a: SETTINGS[a]}, d_model=64)
    lm = build("--config", file, f"--model.lm.layout=[{b}]", f"--model.lm.mixers.{b}.{size_of(b)}=2")
    assert_mixer(lm, 0, b, {size_of(b): 2})
    assert lm.settings["mixers"] == {a: SETTINGS[a], b: {size_of(b): 2}}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("joined", [True, False])
def test_one_setting_leaves_the_others(name: str, joined: bool) -> None:
    file = write("a.yaml", [name], SETTINGS)
    option = f"--model.lm.mixers.{name}.{size_of(name)}"
    lm = build("--config", file, *([f"{option}=1"] if joined else [option, "1"]))
    expected = copy.deepcopy(SETTINGS)
    expected[name][size_of(name)] = 1
    assert lm.settings["mixers"] == expected
    assert_mixer(lm, 1, name, expected[name])


def test_second_config_overrides_key_by_key() -> None:
    first = write("a.yaml", ["gdn2", "swa"], SETTINGS)
    Path("b.yaml").write_text("model: {lm: {d_model: 24, mixers: {gdn2: {num_heads: 1}, kda: {norm_eps: 1e-3}}}}")
    lm = build("--config", first, "--config=b.yaml")
    assert lm.layer_names == ["gdn2", "swa"]
    assert lm.settings["d_model"] == 24
    assert lm.settings["mixers"] == merge(SETTINGS, {"gdn2": {"num_heads": 1}, "kda": {"norm_eps": 1e-3}})


def test_command_line_over_files_wherever_it_stands() -> None:
    first = write("a.yaml", ["gdn2"], SETTINGS)
    Path("b.yaml").write_text("model: {lr: 1e-5, lm: {mixers: {gdn2: {num_heads: 1}}}}")
    cli = MixersCLI(
        "fit", collect(["--model.lr=2e-5", "--model.lm.mixers.gdn2.num_heads=3", "-c", first, "--model.max_tokens", "3e9", "-c", "b.yaml"])
    )
    assert cli.config.model.lr == 2e-5
    assert cli.config.model.max_tokens == 3_000_000_000
    assert cli.config.model.lm.mixers["gdn2"] == {**SETTINGS["gdn2"], "num_heads": 3}


def test_settings_in_mappings() -> None:
    """--model.lm.mixers, --model.lm and --model take mappings; they merge too, in the order they are given."""
    file = write("a.yaml", ["gdn2"], SETTINGS)
    lm = build(
        "--config",
        file,
        "--model.lm.mixers={gdn2: {num_heads: 1}, kda: {num_heads: 1}}",
        "--model.lm.mixers.gdn2",
        "{head_dim: 8}",
        "--model.lm={mlp_width: 8, mixers: {gdn2: {conv_size: 2}}}",
        "--model={lr: 0.1, lm: {norm_eps: 1e-4, mixers: {kda: {num_heads: 2}}}}",
    )
    expected = merge(SETTINGS, {"gdn2": {"num_heads": 1, "head_dim": 8, "conv_size": 2}, "kda": {"num_heads": 2}})
    assert lm.settings["mixers"] == expected
    assert (lm.settings["mlp_width"], lm.settings["norm_eps"]) == (8, 1e-4)


def test_null_goes_back_to_the_defaults() -> None:
    file = write("a.yaml", ["swa"], SETTINGS, d_model=32)
    lm = build("--config", file, "--model.lm.mixers.swa=null")
    assert_mixer(lm, 0, "swa", {})
    assert lm.settings["mixers"]["kda"] == SETTINGS["kda"]


def test_mix_of_layouts() -> None:
    file = write("a.yaml", ["gdn2"], SETTINGS, n_layers=8)
    lm = build("--config", file, "--model.lm.layout=[kda, kda, gla, attention]")
    assert lm.layer_names == ["kda", "kda", "gla", "attention"] * 2
    for layer, name in enumerate(lm.layer_names):
        assert_mixer(lm, layer, name, SETTINGS[name])


def test_aliases() -> None:
    """An alias takes its mixer's settings beneath its own; both may be overridden; it may be given another mixer."""
    aliases = {"local": {"mixer": "swa", "window": 3}, "wide": {"mixer": "gdn2", "head_dim": 16}}
    file = write("a.yaml", ["wide", "local"], {**SETTINGS, **aliases})
    lm = build("--config", file)
    assert_mixer(lm, 0, "gdn2", {**SETTINGS["gdn2"], "head_dim": 16})
    assert_mixer(lm, 1, "swa", {**SETTINGS["swa"], "window": 3})
    lm = build("--config", file, "--model.lm.mixers.local.window=5", "--model.lm.mixers.swa.num_heads=1")
    assert_mixer(lm, 1, "swa", {**SETTINGS["swa"], "window": 5, "num_heads": 1})
    lm = build("--config", file, "--model.lm.mixers.wide.mixer=kda", "--model.lm.layout=[swa, wide]")
    assert_mixer(lm, 0, "swa", SETTINGS["swa"])
    assert_mixer(lm, 1, "kda", {**SETTINGS["kda"], "head_dim": 16})
    lm = build("--config", file, "--model.lm.mixers.new={mixer: attention, window: 7}", "--model.lm.layout=[new]")
    assert_mixer(lm, 0, "attention", {**SETTINGS["attention"], "window": 7})


def test_numbers_in_files_and_on_the_command_line() -> None:
    """1e-3 is a number in both, though YAML 1.1 would have it a string."""
    Path("b.yaml").write_text("model: {lm: {mixers: {gdn: {norm_eps: 1e-3}, attention: {rope_theta: 1e6}}}}")
    file = write("a.yaml", ["gdn"], {}, d_model=64)
    lm = build("--config", file, "--config", "b.yaml", "--model.lm.mixers.kda.norm_eps", "1e-3", "--model.lm.layout=[gdn, kda]")
    assert lm.settings["mixers"]["gdn"]["norm_eps"] == lm.settings["mixers"]["kda"]["norm_eps"] == 1e-3
    assert lm.mixers()[0].norm.norm.eps == 1e-3
    assert build("--config", file, "--config", "b.yaml", "--model.lm.layout=[attention]").mixers()[0].rope_theta == 1e6


def test_a_class_that_is_swapped_leaves_no_arguments_behind() -> None:
    """Callbacks and strategies are objects: another class brings its own arguments, the same class merges."""
    old = {"class_path": "A", "init_args": {"x": 1}}
    assert merge({"s": old}, {"s": {"class_path": "B", "init_args": {"y": 2}}}) == {"s": {"class_path": "B", "init_args": {"y": 2}}}
    assert merge({"s": old}, {"s": {"class_path": "A", "init_args": {"y": 2}}}) == {"s": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}
    assert merge({"s": old}, {"s": {"init_args": {"y": 2}}}) == {"s": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}
    assert old == {"class_path": "A", "init_args": {"x": 1}}


@pytest.mark.parametrize("layout", ["[gdn2]", "[kda, swa]", "[gdn, deltanet]", "[gla, attention]", "[linear_attention, local]", "[mamba2, mamba3]"])
def test_swaps_train(layout: str) -> None:
    Path("corpus.txt").write_text("the cat sat on the mat. " * 50)
    file = write("a.yaml", ["gdn2"], {**SETTINGS, "local": {"mixer": "swa", "window": 3}})
    data = ["--data.path=corpus.txt", "--data.val_path=corpus.txt", "--data.seq_len=32", "--data.batch_size=2"]
    more = ["--model.warmup_tokens=0", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=true", "--summary.max_new_tokens=2"]
    assert main(["fit", "--config", file, "--model.lm.layout", layout, *data, *more]) == 0
