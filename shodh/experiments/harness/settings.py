"""What the file of every study has: a name, a question, changes of the base run, seeds, and presets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import Field

from shodh.config import Section, apply_overrides
from shodh.config.base import RunName, Seeds
from shodh.config.reading import merge_trees, section_from_dict
from shodh.core.errors import ConfigError
from shodh.core.reading import read_settings

Preset = Literal["tiny", "small", "paper"]
PRESETS: tuple[Preset, ...] = get_args(Preset)


class StudySettings(Section):
    """Settings that mean the same in every study."""

    name: RunName
    question: str = Field(min_length=1, description="what the study is for, in one line; printed on the report")
    out: Path = Field(Path("runs"), description="folder of the study's folder")
    set: tuple[str, ...] = Field((), description="key=value changes of the base run")
    overrides: tuple[str, ...] = Field((), description="key=value changes after all others: those of --set")
    seeds: Seeds = 3
    scales: dict[Preset, dict[str, Any] | None] = Field(
        {},
        description="presets of --scale: settings that go over those of the file, group by group; `set` is added to "
        "the file's, unless the preset has a base run of its own; null: the study is not defined at this preset",
    )

    @property
    def folder(self) -> Path:
        """Folder of the study: jobs, runs and report."""
        return self.out / self.name


Settings = TypeVar("Settings", bound=StudySettings)


def load_settings(
    kind: type[Settings], path: Path | None, scale: Preset = "tiny", overrides: Sequence[str] = (), **changes: Any
) -> Settings:
    """Read the file of a study at a preset.

    Parameters
    ----------
    path : Path, optional
        None: the settings are ``changes`` alone.
    overrides : sequence of str
        ``key=value`` changes: of the study where the key begins with ``study.``, of the base run else.
    changes
        Those that are not None stand in place of the file's settings. The preset is added to a name of the file.

    Raises
    ------
    ConfigError
        The file cannot be read, has unknown, missing or impossible settings, in whatever preset, or is not defined at
        this one.
    """
    source = "command line" if path is None else str(path)
    tree = {} if path is None else read_settings(path)
    if not isinstance(tree, dict):
        section_from_dict(kind, tree, source)
    own = [item.removeprefix("study.") for item in overrides if item.startswith("study.")]
    given = {key: value for key, value in changes.items() if value is not None}
    given["overrides"] = [item for item in overrides if not item.startswith("study.")]
    needed = {key: value for key, value in given.items() if kind.model_fields[key].is_required()}
    tree = {**needed, **tree}
    file = section_from_dict(kind, tree, source)
    presets = {"tiny": {}, **file.scales}
    known = [name for name in PRESETS if presets.get(name) is not None]
    if scale not in known:
        raise ConfigError(f"{source} is not defined at scale {scale}; it has {known}")
    trees = {name: _at_preset(tree, name, presets[name] or {}) for name in known}
    trees[scale] = apply_overrides({**trees[scale], **given}, own)
    sources = {name: f"{source} at scale {name}" if presets[name] else source for name in known}
    return {name: section_from_dict(kind, trees[name], sources[name]) for name in known}[scale]


def _at_preset(tree: dict[str, Any], name: str, preset: dict[str, Any]) -> dict[str, Any]:
    merged = merge_trees(tree, preset)
    own = [] if {"base", "run"} & set(preset) else tree.get("set", [])
    added = preset.get("set", [])
    merged["set"] = [*own, *added] if isinstance(added, list) else added
    if name != "tiny" and "name" in tree:
        merged["name"] = f"{tree['name']}-{name}"
    return merged
