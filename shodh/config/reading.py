"""From YAML to settings and back, with errors that name the nearest key."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from shodh.config.base import Section
from shodh.config.run import RunConfig
from shodh.core.errors import ConfigError
from shodh.core.reading import MAX_DEPTH, parse_yaml, read_settings

MAX_MESSAGES = 10  # of one configuration
#: Settings of a latent transformer as they were before there was a key for them, where that is not the default.
FORMER = {"metric": "whitened"}


def _suggest(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"


def _section_of(annotation: Any) -> type[Section] | None:
    """The settings class behind an annotation (through Optional and tuples), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        for argument in typing.get_args(annotation):
            if (found := _section_of(argument)) is not None:
                return found
    return None


def _section_at(root: type[Section], location: tuple[int | str, ...]) -> type[Section]:
    section = root
    for part in location:
        if isinstance(part, int):
            continue
        found = _section_of(section.model_fields[part].annotation)
        if found is None:
            break
        section = found
    return section


def _shown(value: Any) -> str:
    """A value, shortened; a number of thousands of digits has no decimal form in Python."""
    try:
        text = repr(value)
    except ValueError:
        return f"a number of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _explain(error: ValidationError, root: type[Section], source: str) -> ConfigError:
    messages, problems = [], error.errors()
    for problem in problems:
        location = problem["loc"]
        # A list whose items failed counts as short of them: their own errors say why.
        below = [p for p in problems if len(p["loc"]) > len(location) and p["loc"][: len(location)] == location]
        if problem["type"] == "too_short" and below:
            continue
        where = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            known = _section_at(root, location[:-1]).model_fields
            messages.append(f"unknown key {where!r}: {_suggest(str(location[-1]), known)}")
        elif problem["type"] == "missing":
            messages.append(f"missing key {where!r}")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], Mapping) else f" (given {_shown(problem['input'])})"
            messages.append(f"{where}: {text}{given}" if where else text)
    more = len(messages) - MAX_MESSAGES
    tail = [f"and {more} more"] if more > 0 else []
    return ConfigError(f"{source}: {'; '.join(messages[:MAX_MESSAGES] + tail)}")


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set ``a.b=value`` pairs in a nested dict; values are read as YAML, list items are addressed by index.

    Raises
    ------
    ConfigError
        For an item without ``=``, a value that is not YAML, or a path through something that has no keys.
    """
    tree = copy.deepcopy(tree)
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {item!r}: expected key=value, for example --set operator.train.steps=100")
        value = parse_yaml(text, f"--set {item!r}: the value")
        node: Any = tree
        *parents, last = path.split(".")
        if len(parents) > MAX_DEPTH:
            raise ConfigError(f"--set {path[:80]!r} ...: there is no such place in the configuration")
        try:
            for part in parents:
                if isinstance(node, list):
                    node = node[int(part)]
                    continue
                if node.get(part) is None:  # A group that is null, as in the config.yaml of a run, is as one left out.
                    node[part] = {}
                node = node[part]
            if isinstance(node, list):
                node[int(last)] = value
            else:
                node[last] = value
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"--set {item!r}: there is no such place in the configuration") from error
    return tree


def merge_trees(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` put over ``tree``, nested mappings key by key."""
    merged = dict(tree)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_trees(merged[key], value) if nested else value
    return merged


SectionType = typing.TypeVar("SectionType", bound=Section)


def section_from_dict(kind: type[SectionType], tree: Any, source: str) -> SectionType:
    """Validate a plain dict; raises `ConfigError` that names every bad key, with the nearest known one."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of settings at the top, got {type(tree).__name__}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, kind, source) from error


def config_from_dict(tree: Any, source: str = "configuration") -> RunConfig:
    """`section_from_dict` of a run."""
    return section_from_dict(RunConfig, tree, source)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file or the packaged one of that name, apply ``--set`` overrides and validate.

    Raises
    ------
    ConfigError
        The file cannot be read, is not YAML, or has unknown, missing or impossible settings.
    """
    tree = read_settings(path)
    if isinstance(tree, dict):
        tree = apply_overrides(tree, overrides)
    return config_from_dict(tree, str(path))


def load_kept_config(path: Path) -> RunConfig:
    """The configuration that a run wrote, with every default: what it lacks was as `FORMER` in its version.

    Raises
    ------
    ConfigError
        As `load_config`.
    """
    tree = read_settings(path)
    operator = tree.get("operator") if isinstance(tree, dict) else None
    if isinstance(operator, dict) and operator.get("kind") == "latent_transformer":
        tree["operator"] = {**FORMER, **operator}
    return config_from_dict(tree, str(path))


def to_dict(config: Section) -> dict[str, Any]:
    """Plain JSON-able values of a configuration, every default written out."""
    return config.model_dump(mode="json")


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal object."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
