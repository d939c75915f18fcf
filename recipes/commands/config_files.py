"""`--config` files and the command line become one mapping before the parser sees them.

The parser (jsonargparse) takes `mixers` as one value: a second file, or `--model.lm.mixers.gdn2.num_heads 8`, would replace all of
it, and settings that nobody touched would be lost without a word. So it is merged here, key by key: command line over files, a later
file over an earlier one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_modules.paths import given_path
from mixers.errors import ConfigError, unknown

RECIPES = Path(__file__).parents[1]
MIXERS = "model.lm.mixers"
GROUPS = ("model", "model.lm")  # options whose value may hold `mixers`
SECTIONS = ("model", "data", "trainer", "checkpoint", "summary")
LINKED = ("model.lm.seed", "data.seed")  # both follow seed_everything


class Request(NamedTuple):
    """What a command line asks for."""

    config: dict[str, Any]  # the merged files, and every setting of a mixer
    arguments: list[str]  # the rest of the command line, for the parser
    files: list[Path]

    def option(self, name: str) -> Any:
        """A top-level or dotted setting as the parser will see it, given by itself or in a group (--trainer '{...}', --trainer FILE); None if nobody
        gave it."""
        value = dig(self.config, name)
        for token, after in zip(self.arguments, [*self.arguments, None][1:], strict=True):
            option, equals, given = token.partition("=")
            text = given if equals else after
            key = option.removeprefix("--")
            if not option.startswith("--") or text is None:
                continue
            if key == name:
                value = text
            elif name.startswith(f"{key}."):
                value = _in_group(text, name.removeprefix(f"{key}."), value)
        return value


def _in_group(text: str, name: str, otherwise: Any) -> Any:
    """A setting in the value of a group of settings, a mapping or a file of one; `otherwise` if it says nothing about it."""
    group = parse_yaml(text, where="command line")
    if isinstance(group, str) and given_path(group, name).is_file():
        group = read_config(Path(group))
    *path, last = name.split(".")
    within = dig(group, ".".join(path)) if path else group
    return within[last] if isinstance(within, Mapping) and last in within else otherwise


def collect(argv: list[str]) -> Request:
    """Splits a command line (without the subcommand) into one merged config and the arguments that are left.

    Raises:
        ConfigError: a config that does not exist or cannot be read, or an option without its value.
    """
    files: list[Path] = []
    overrides: list[tuple[str, Any]] = []
    rest: list[str] = []
    for key, value in _options(argv):
        if key == "config":
            files.append(find_config(value))
        elif key in GROUPS:
            rest += [f"--{key}", _without_mixers(key, value, overrides)]
        elif key:
            overrides.append((key, parse_yaml(value, where=f"--{key}")))
        else:
            rest.append(_EXPONENT.sub(_whole, value))
    return Request(_merged(files, overrides), rest, files)


def _merged(files: list[Path], overrides: list[tuple[str, Any]]) -> dict[str, Any]:
    """The files in their order, then the settings of mixers from the command line in theirs."""
    config: dict[str, Any] = {}
    for file in files:
        config = merge(config, read_config(file))
    for key, value in overrides:
        config = merge(config, {"model": {"lm": {"mixers": _mixer_settings(key, value, config)}}})
    for section in SECTIONS:
        if not isinstance(config.get(section, {}), dict):
            raise not_settings(section, config[section])
    mixers = dig(config, MIXERS)
    if isinstance(mixers, dict):
        mixers.update({name: {} for name, settings in mixers.items() if settings is None})  # null: the defaults
    for key in LINKED:
        if dig(config, key) is not None:
            raise ConfigError(f"{key}: follows seed_everything; set that instead")
    return config


def not_settings(section: str, value: object) -> ConfigError:
    """The error for a section of a config that is no mapping."""
    return ConfigError(f"{section}: must hold settings (a mapping), got {json.dumps(value, default=str, ensure_ascii=False)[:80]}")


def _options(argv: list[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of the options that are merged here; ("", token) for every other token."""
    tokens = iter(argv)
    for token in tokens:
        option, equals, value = token.partition("=")
        key = "config" if option == "-c" else option[2:] if option.startswith("--") else ""
        if key not in ("config", MIXERS, *GROUPS) and not key.startswith(f"{MIXERS}."):
            yield "", token
            continue
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise ConfigError(f"{option}: expected a value")
        yield key, value


def _without_mixers(key: str, value: str, overrides: list[tuple[str, Any]]) -> str:
    """Moves `mixers` from the value of --model or --model.lm to the overrides; the value without it."""
    settings = parse_yaml(value, where=f"--{key}")
    lm = settings.get("lm") if key == "model" and isinstance(settings, dict) else settings
    if not isinstance(lm, dict) or "mixers" not in lm:
        return value
    overrides.append((MIXERS, lm.pop("mixers")))
    return json.dumps(settings, ensure_ascii=False)


def _mixer_settings(key: str, value: Any, config: Mapping[str, Any]) -> Any:
    """What `--model.lm.mixers...` says, as a mapping of settings by mixer. Names of mixers may hold dots themselves."""
    from mixers.registry import available

    path = key.removeprefix(MIXERS).removeprefix(".")
    if not path:
        return value
    settings, layout = dig(config, MIXERS), dig(config, "model.lm.layout")
    names = {*available(), *(settings if isinstance(settings, dict) else ()), *(layout if isinstance(layout, list) else ())}
    name = max((n for n in names if path == n or path.startswith(f"{n}.")), key=len, default=None)
    if name is None:  # a dotted path: its last part is a setting, unless the value holds settings
        name = path if isinstance(value, dict) else path.rpartition(".")[0] or path
    setting = path.removeprefix(name).removeprefix(".")
    return {name: {setting: value} if setting else value}


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with the keys of `over`, at every depth. Lists are replaced; so is an object of another class, with all its arguments."""
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("class_path", old.get("class_path")) == old.get("class_path"):
            value = merge(old, value)
        merged[key] = value
    return merged


def dig(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None if it is not there."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def recipe_names() -> list[str]:
    """The names of the shipped recipes: `quickstart`, `paper/gdn2_1.3b`, ..."""
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """The file of a path or of a shipped recipe's name; ConfigError for anything else."""
    if (file := given_path(name, "config")).is_file():
        return file
    recipe = name.removeprefix("recipes/").removesuffix(".yaml")  # its path in a checkout works without one
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    raise unknown("config", "file or recipe", name, recipe_names())


def read_config(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError with the place for anything else."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {file} cannot be read: {error}") from error
    config = parse_yaml(text, where=f"config: {file}")
    if not isinstance(config, dict):
        raise ConfigError(f"config: {file} must hold settings (model:, data:, trainer:), got {type(config).__name__}")
    return config


_EXPONENT = re.compile(r"(?<![^=])[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")


def _whole(found: re.Match[str]) -> str:
    """1e9 as 1000000000: the parser takes no other notation where it wants an integer, and this one where it wants a float."""
    number = Decimal(found[0].replace("_", ""))
    return str(int(number)) if number == number.to_integral_value() else found[0]


class _Loader(yaml.SafeLoader):
    """YAML as the parser reads it, where 1e-5 is a number; 1e9 is an integer; and a key that stands twice is an error."""

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        number: float = super().construct_yaml_float(node)
        return int(number) if "e" in node.value.lower() and number.is_integer() else number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key in keys[:i] and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)  # no setting is a date


def parse_yaml(text: str, *, where: str) -> Any:
    """The value of a YAML text; ConfigError with line and column if it has none."""
    try:
        value = yaml.load(text, Loader=_Loader)
        json.dumps(value)  # as the parser is given it
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:  # a set, bytes; an alias of what it is in
        raise ConfigError(f"{where}: holds what is no setting: {error}") from error
    return value
