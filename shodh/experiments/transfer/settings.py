"""The study file: a base run, mixes of regimes, and the axes along which its cells differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from shodh.config import RegimeConfig, RunConfig, Section, apply_overrides, config_from_dict, load_config, to_dict
from shodh.config.base import PositiveInt, Seeds, Width
from shodh.config.reading import section_from_dict
from shodh.config.routers import ROUTERS
from shodh.core.errors import ConfigError
from shodh.core.reading import read_settings

ModelName = Literal[
    "sparse",
    "dense_active",
    "dense_router",
    "dpot",
    "dense_total",
    "specialist",
    "specialist_share",
    "sparse_hash",
    "sparse_frozen",
    "sparse_oracle",
]


def _learned(kind: str) -> str:
    """A kind of router that a study may compare: no control."""
    kinds = [name for name, traits in ROUTERS.items() if traits.trained and not traits.labelled]
    if kind not in kinds:
        raise ValueError(f"expected a kind of router that learns: one of {', '.join(kinds)}")
    return kind


RouterName = Annotated[str, AfterValidator(_learned)]
BalanceName = Literal["switch", "information", "both", "none"]
ScaleName = Literal["tiny", "small", "paper"]


class PlasticityConfig(Section):
    """How fast a trained model learns a regime that it never saw, beside a fresh one."""

    regime: str
    steps: PositiveInt = 50
    lr: PositiveFloat = 1e-3


class ScaleConfig(Section):
    """What a preset changes in a study."""

    base: Path | None = Field(None, description="another base run, in place of the study's and its `set`")
    set: tuple[str, ...] = Field((), description="key=value changes of the base run, after those of the study")
    regimes: tuple[RegimeConfig, ...] = Field((), description="in place of the study's")
    seeds: Seeds | None = None


class ScalesConfig(Section):
    """Presets of ``--scale``; null: the study is not defined at it."""

    tiny: ScaleConfig | None = ScaleConfig()
    small: ScaleConfig | None = None
    paper: ScaleConfig | None = None


class StudyConfig(Section):
    """A grid of runs: ``models`` and variants of ``sparse`` on every mix, with every seed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = Field(min_length=1, description="what the study is for, in one line; printed on the report")
    out: Path = Field(Path("runs"), description="folder of the study's folder")
    base: Path = Field(description="configuration of the run that all cells start from")
    set: tuple[str, ...] = Field((), description="key=value changes of the base run")
    regimes: tuple[RegimeConfig, ...] = Field((), description="in place of those of the base run")
    mixes: dict[str, tuple[str, ...]] = Field(min_length=1, description="name -> regimes, in order")
    models: tuple[ModelName, ...] = Field(min_length=1)
    routers: tuple[RouterName, ...] = Field((), description="kinds of the sparse model; none: the base run's")
    balances: tuple[BalanceName, ...] = Field((), description="balance terms of the sparse model; none: the base's")
    experts: tuple[Width, ...] = Field((), description="routed experts; none: the base run's")
    groups: tuple[Width, ...] = Field((), description="groups of two_level routers; none: the base run's")
    seeds: Seeds = 3
    checkpoints: PositiveInt = Field(5, description="points of the error curves, evenly over training")
    gradient_samples: PositiveInt = Field(16, description="windows a regime for the cosine between gradients")
    plasticity: PlasticityConfig | None = None
    scales: ScalesConfig = ScalesConfig()

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        for name, regimes in self.mixes.items():
            if not regimes or len(set(regimes)) < len(regimes):
                raise ValueError(f"mix {name!r} has no, or repeated regimes: {list(regimes)}")
        if self.groups and "two_level" not in self.routers:
            raise ValueError("groups are of two_level routers; add it to routers")
        variants = self.routers + self.balances + self.experts
        if variants and "sparse" not in self.models:
            raise ValueError("routers, balances and experts are of the model sparse; add it to models")
        return self

    @property
    def folder(self) -> Path:
        """Folder of the study: configs, cells and report."""
        return self.out / self.name

    def base_config(self) -> RunConfig:
        """The base run with the changes of the study; raises `ConfigError` for what does not fit."""
        tree = to_dict(load_config(self.base, self.set))
        if self.regimes:
            tree["data"]["regimes"] = [to_dict(regime) for regime in self.regimes]
        config = config_from_dict(tree, str(self.base))
        known = [r.name for r in config.data.regimes]
        named = {r for mix in self.mixes.values() for r in mix}
        named |= {self.plasticity.regime} if self.plasticity else set()
        if unknown := sorted(named - set(known)):
            raise ConfigError(f"study {self.name}: unknown regimes {unknown}; {self.base} and the study have {known}")
        return config


def load_study(
    path: Path,
    scale: ScaleName = "tiny",
    *,
    name: str | None = None,
    out: Path | None = None,
    seeds: int | None = None,
    overrides: Sequence[str] = (),
) -> StudyConfig:
    """Read a study file at a scale.

    Parameters
    ----------
    name, out, seeds
        In place of the file's.
    overrides : sequence of str
        ``key=value`` changes of the base run, after those of file and scale.

    Raises
    ------
    ConfigError
        The file cannot be read, has unknown, missing or impossible settings, or is not defined at the scale.
    """
    tree = read_settings(path)
    study = section_from_dict(StudyConfig, tree, str(path))
    preset: ScaleConfig | None = getattr(study.scales, scale)
    if preset is None:
        known = [s for s in ("tiny", "small", "paper") if getattr(study.scales, s) is not None]
        raise ConfigError(f"{path} is not defined at scale {scale}; it has {known}")
    changed = apply_overrides(to_dict(study), [])
    own = study.set if preset.base is None else ()
    changed["set"] = [*own, *preset.set, *overrides]
    changed["base"] = str(preset.base or study.base)
    if preset.regimes:
        changed["regimes"] = [to_dict(r) for r in preset.regimes]
    changed["seeds"] = seeds or preset.seeds or study.seeds
    changed["out"] = str(out or study.out)
    changed["name"] = name or (study.name if scale == "tiny" else f"{study.name}-{scale}")
    return section_from_dict(StudyConfig, changed, str(path))
