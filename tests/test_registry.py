"""Names, aliases, settings and their errors."""

from __future__ import annotations

import pytest

from mixers import registry
from mixers.attention import Attention
from mixers.errors import ConfigError


def test_every_built_in_mixer_builds_with_its_own_defaults() -> None:
    for name in registry.BUILT_IN:
        assert registry.build(name, 2048, {}).d_model == 2048


def test_swa_is_attention_with_a_window() -> None:
    cls, settings = registry.resolve("swa", {})
    assert cls is Attention
    assert settings["window"] == 2048
    assert registry.resolve("attention", {})[1]["window"] is None


def test_alias_takes_the_settings_it_names_and_overrides_them() -> None:
    mixers = {"swa": {"num_heads": 18, "window": 64}, "local": {"mixer": "swa", "window": 8}}
    assert registry.resolve("local", mixers)[1] == {**registry.resolve("swa", mixers)[1], "window": 8}
    assert registry.resolve("swa", mixers)[1]["window"] == 64


def test_dotted_path_finds_a_class() -> None:
    mixer = registry.build("mixers.gdn2.GatedDeltaNet2", 32, {"mixers.gdn2.GatedDeltaNet2": {"num_heads": 2, "head_dim": 8}})
    assert mixer.num_heads == 2


def test_yaml_numbers_are_read_as_declared() -> None:
    assert registry.resolve("gdn2", {"gdn2": {"norm_eps": 1}})[1]["norm_eps"] == 1.0


BAD = [
    ("gdn3", {}, "unknown mixer 'gdn3'; did you mean"),
    ("gdn2", {"gdn2": {"num_head": 3}}, "mixers.gdn2.num_head: unknown setting 'num_head'; did you mean 'num_heads'"),
    ("gdn2", {"gdn2": {"num_heads": "x"}}, 'mixers.gdn2: Parser key "num_heads"'),
    ("gdn2", {"gdn2": {"num_heads": 0}}, "mixers.gdn2.num_heads: must be an integer >= 1"),
    ("gdn2", {"gdn2": {"num_heads": True}}, "num_heads"),
    ("gdn2", {"gdn2": {"num_v_heads": 5, "num_heads": 2}}, "mixers.gdn2.num_v_heads: must be a multiple of num_heads = 2, got 5"),
    ("gdn2", {"gdn2": {"erase": "head"}}, "erase"),
    ("gdn2", {"gdn2": {"erase": None}}, "mixers.gdn2.erase: must not be null"),
    ("gdn2", {"gdn2": {"conv_size": 1}}, "conv_size"),
    ("swa", {"swa": {"window": 0}}, "mixers.swa.window: must be an integer >= 1"),
    ("attention", {"attention": {"num_heads": 7}}, "7 heads do not divide 32 channels"),
    ("attention", {"attention": {"num_heads": 4, "num_kv_heads": 3}}, "must be a multiple of num_kv_heads = 3"),
    ("attention", {"attention": {"num_heads": 4, "head_dim": 7}}, "head_dim"),
    ("local", {"local": {"mixer": "swaa"}}, "mixers.local.mixer: unknown mixer 'swaa'; did you mean 'swa'"),
    ("b", {"a": {"mixer": "swa"}, "b": {"mixer": "a"}}, "not an alias"),
    ("gdn2", {"gdn2": {"mixer": "kda"}}, "an alias cannot take the name of a mixer"),
    ("gdn2", {"gdn2": 5}, "mixers.gdn2: must be a mapping"),
    ("swa", {"swa": {"window": None}}, "mixers.swa.window: must not be null"),
    ("local", {"local": {"window": 3}}, "an alias: a name in mixers with the key mixer"),
    ("local", {"local": {"mixer:swa": None}}, "; mixers.local has no key mixer, but 'mixer:swa'"),
    ("mixers.base.SequenceMixer", {}, "is abstract"),
    ("no_such_pkg.Mixer", {}, "cannot import no_such_pkg.Mixer"),
    ("mixers.gdn2.Nothing", {}, "cannot import"),
    ("mixers.delta.Gates", {}, "is not a mixers.base.SequenceMixer"),
]


@pytest.mark.parametrize(("name", "mixers", "message"), BAD)
def test_errors_are_one_line_that_names_the_key(name: str, mixers: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.build(name, 32, mixers)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unused_entries_are_checked_too() -> None:
    registry.check_unused({"gdn2": {"num_heads": 2}, "not.imported.Mixer": {"x": 1}}, set())
    with pytest.raises(ConfigError, match="unknown mixer 'gdn3'"):
        registry.check_unused({"gdn3": {}}, set())
    with pytest.raises(ConfigError, match="unknown setting"):
        registry.check_unused({"gdn": {"window": 3}}, {"gdn2"})
