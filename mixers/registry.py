"""Mixers by name: the built-in ones, plug-ins from entry points (group `lightning_mixers`), and dotted paths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple, get_args, get_type_hints

from mixers.base import SequenceMixer
from mixers.errors import ConfigError, unknown

GROUP = "lightning_mixers"

Settings = Mapping[str, Any]


class Source(NamedTuple):
    """Where a mixer comes from."""

    target: str  # "module:Class"
    preset: dict[str, Any]  # settings that the name itself stands for
    origin: str  # "built in", "entry point of <distribution>" or "dotted path"


BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "gdn2": ("mixers.gdn2:GatedDeltaNet2", {}),
    "kda": ("mixers.kda:KimiDeltaAttention", {}),
    "gdn": ("mixers.gdn:GatedDeltaNet", {}),
    "deltanet": ("mixers.deltanet:DeltaNet", {}),
    "gla": ("mixers.gla:GatedLinearAttention", {}),
    "linear_attention": ("mixers.linear_attention:LinearAttention", {}),
    "mamba2": ("mixers.mamba2:Mamba2", {}),
    "mamba3": ("mixers.mamba3:Mamba3", {}),
    "attention": ("mixers.attention:Attention", {}),
    "swa": ("mixers.attention:Attention", {"window": 2048}),
}


def available() -> dict[str, Source]:
    """Every name that needs no dotted path: built-in mixers first, then entry points by name."""
    found = {name: Source(target, preset, "built in") for name, (target, preset) in BUILT_IN.items()}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        origin = f"entry point of {point.dist.name if point.dist else point.module}"
        if point.name in found and found[point.name].target != point.value:
            raise ConfigError(f"mixer {point.name!r}: the {origin} takes the name of another mixer ({found[point.name].origin})")
        found[point.name] = Source(point.value, {}, origin)
    return found


def find(name: str, *, key: str = "layout") -> Source:
    """The source of `name`: an available mixer or a dotted path `package.module.Class`; ConfigError otherwise."""
    sources = available()
    if name in sources:
        return sources[name]
    if "." not in name:
        raise unknown(key, "mixer", name, [*sources, "a dotted path such as my_pkg.MyMixer", "an alias: a name in mixers with the key mixer"])
    module, _, cls = name.rpartition(".")
    return Source(f"{module}:{cls}", {}, "dotted path")


def load(source: Source, *, key: str) -> type[SequenceMixer[Any]]:
    """The class behind a source; ConfigError if it cannot be imported or is not a SequenceMixer."""
    module, _, name = source.target.partition(":")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}: cannot import {source.target.replace(':', '.')} ({source.origin}): {error}") from error
    if not (inspect.isclass(cls) and issubclass(cls, SequenceMixer)):
        raise ConfigError(f"{key}: {source.target.replace(':', '.')} is not a mixers.base.SequenceMixer")
    if inspect.isabstract(cls):
        raise ConfigError(f"{key}: {source.target.replace(':', '.')} is abstract (it lacks {', '.join(sorted(cls.__abstractmethods__))})")
    return cls


def settings_of(cls: type[SequenceMixer[Any]]) -> dict[str, inspect.Parameter]:
    """The settings of a mixer: its constructor's parameters behind d_model."""
    parameters = dict(inspect.signature(cls).parameters)
    parameters.pop("d_model", None)
    return parameters


def resolve(name: str, settings: Mapping[str, Settings], *, key: str = "layout") -> tuple[type[SequenceMixer[Any]], dict[str, Any]]:
    """The class and the checked settings that `name` in a layout stands for.

    An entry of `settings` with the key `mixer` is an alias: it takes the settings of the mixer it names and overrides them. `key` is the place
    that an error about the name itself points to.

    Raises:
        ConfigError: unknown mixer or setting, or a value of the wrong type.
    """
    own = _entry(settings, name)
    base = own.pop("mixer", None)
    if base is None:
        try:
            source = find(name, key=key)
        except ConfigError as error:
            if not own:
                raise
            raise ConfigError(f"{error}; mixers.{name} has no key mixer, but {', '.join(map(repr, own))}") from None
        cls = load(source, key=f"{key} {name}")
        return cls, _checked(cls, {**source.preset, **own}, f"mixers.{name}", source.preset)
    if name in available():
        raise ConfigError(f"mixers.{name}.mixer: an alias cannot take the name of a mixer")
    if not isinstance(base, str) or "mixer" in _entry(settings, base):
        raise ConfigError(f"mixers.{name}.mixer: must name a mixer, not {'an alias' if isinstance(base, str) else type(base).__name__}")
    source = find(base, key=f"mixers.{name}.mixer")
    cls = load(source, key=f"mixers.{name}.mixer")
    return cls, _checked(cls, {**source.preset, **_entry(settings, base), **own}, f"mixers.{name}", source.preset)


def _entry(settings: Mapping[str, Settings], name: str) -> dict[str, Any]:
    """The settings that stand under `name`; none if it is not there."""
    entry = settings.get(name)
    if entry is not None and not isinstance(entry, Mapping):
        raise ConfigError(f"mixers.{name}: must be a mapping of settings, got {entry!r}")
    return dict(entry or {})


def builder(name: str, settings: Mapping[str, Settings]) -> Callable[[int], SequenceMixer[Any]]:
    """What makes the mixer that `name` in a layout stands for, a new one a call, of d_model channels: its settings are looked at once.

    Raises:
        ConfigError: as `resolve`; and, when called, for sizes the mixer refuses: the message starts with `mixers.<name>`.
    """
    cls, arguments = resolve(name, settings)

    def make(d_model: int) -> SequenceMixer[Any]:
        try:
            return cls(d_model, **deepcopy(arguments))
        except ValueError as error:
            raise ConfigError(f"mixers.{name}.{error}") from error

    return make


def build(name: str, d_model: int, settings: Mapping[str, Settings]) -> SequenceMixer[Any]:
    """One mixer by `builder`."""
    return builder(name, settings)(d_model)


def check_unused(settings: Mapping[str, Settings], used: set[str]) -> None:
    """ConfigError for an entry of `settings` that could not be used; dotted paths that no layout names are not imported."""
    for name in settings:
        if name not in used and ("." not in name or "mixer" in _entry(settings, name)):
            resolve(name, settings, key="mixers")


def _checked(cls: type[SequenceMixer[Any]], settings: dict[str, Any], key: str, preset: Settings) -> dict[str, Any]:
    """`settings` with values of the declared types; ConfigError naming `key` and the setting."""
    from jsonargparse import ArgumentError, ArgumentParser

    legal = settings_of(cls)
    for name in settings:
        if name not in legal:
            raise unknown(f"{key}.{name}", "setting", name, legal)
    hints = get_type_hints(cls.__init__)
    for name, parameter in legal.items():
        needs_value = name in preset or type(None) not in get_args(hints[name])
        if name in settings and settings[name] is None and needs_value:
            raise ConfigError(f"{key}.{name}: must not be null")
        if parameter.default is parameter.empty and name not in settings:
            raise ConfigError(f"{key}.{name}: must be set, {cls.__name__} has no default for it")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None, skip={"d_model"}, sub_configs=False)
    try:
        parsed = parser.parse_object(settings).as_dict()
    except ArgumentError as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
    return {name: parsed[name] for name in legal}
