"""The file of a composition study: a family of flows with one parameter, the models trained on it, the methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PositiveFloat, model_validator

from shodh.config import RunConfig, Section, config_from_dict, load_config, to_dict
from shodh.config.base import PositiveInt, Seed
from shodh.core.errors import ConfigError
from shodh.core.topology import fitting_ep_size
from shodh.experiments.harness.settings import Preset, StudySettings, load_settings
from shodh.merge.coordinates import ParameterMap

MethodName = Literal[
    "persistence",
    "anchor",
    "low",
    "high",
    "average",
    "task_arithmetic",
    "ties",
    "dare",
    "coord",
    "coord_log",
    "scale",
    "scale_wide",
    "prefix",
    "prefix_each",
    "prefix_wide",
    "line_search",
    "gradient",
    "gradient_by_layer",
    "gradient_by_expert",
    "oracle",
    "wrong_sign",
    "random_direction",
    "ensemble",
    "prefix_finetune",
]
#: Every method of the report, in its order.
METHODS: tuple[MethodName, ...] = get_args(MethodName)
Member = Literal["anchor", "low", "high"]
MEMBERS: tuple[Member, ...] = get_args(Member)
Role = Literal["support", "interpolation", "extrapolation"]
ROLES: tuple[Role, ...] = get_args(Role)


class FamilySettings(Section):
    """A regime of `shodh.physics` over one of its parameters; every value has trajectories of its own."""

    regime: str = Field(description="name of the built-in regime, and of the one regime of the base run")
    parameter: str = Field(description="the regime's parameter that makes the family")
    fixed: dict[str, float] = Field({}, description="other parameters of the regime, the same for every value")
    frames: PositiveInt = Field(description="frames of a trajectory")
    train: PositiveInt = Field(description="training trajectories of a value of the support, or of an expert's")
    valid: PositiveInt = Field(4, description="validation trajectories of a value")
    test: PositiveInt = Field(4, description="test trajectories of a value")
    per_file: PositiveInt = Field(4, description="trajectories that are solved together and share a file")
    seed: Seed = Field(0, description="of the trajectories; the data are the same for every seed of the models")
    low: float = Field(description="value of the low expert")
    high: float = Field(description="value of the high expert")
    support: tuple[float, ...] = Field(min_length=2, description="values that the anchor is trained on")
    interpolation: tuple[float, ...] = Field((), description="tested values between those of the support")
    extrapolation: tuple[float, ...] = Field((), description="tested values outside the support")
    validation: tuple[float, ...] = Field(
        min_length=1, description="values on whose validation trajectories factors and maps are chosen"
    )

    @model_validator(mode="after")
    def _check(self) -> FamilySettings:
        for name in (*ROLES, "validation"):
            values = getattr(self, name)
            if repeated := sorted({v for v in values if values.count(v) > 1}):
                raise ValueError(f"{name} names {repeated} twice")
        if repeated := sorted({v for v in self.values if self.values.count(v) > 1}):
            raise ValueError(f"{repeated} stand in more than one of support, interpolation and extrapolation")
        for name in ("low", "high"):
            if getattr(self, name) not in self.support:
                raise ValueError(f"{name}={getattr(self, name)!r} is not in the support {list(self.support)}")
        if not self.low < self.high:
            raise ValueError(f"low={self.low!r} must be below high={self.high!r}")
        first, last = min(self.support), max(self.support)
        if bad := [v for v in self.interpolation if not first < v < last]:
            raise ValueError(f"interpolation: {bad} lie outside the support, {first!r} to {last!r}")
        if bad := [v for v in self.extrapolation if first <= v <= last]:
            raise ValueError(f"extrapolation: {bad} lie inside the support, {first!r} to {last!r}")
        seen = self.support + self.interpolation
        if bad := [v for v in self.validation if v not in seen]:
            raise ValueError(f"validation: {bad} are not in support or interpolation {list(seen)}")
        if self.parameter in self.fixed:
            raise ValueError(f"fixed: {self.parameter} is the parameter of the family")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """Every value that is tested, in ascending order."""
        return tuple(sorted(self.support + self.interpolation + self.extrapolation))

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value of the support."""
        return min(self.support), max(self.support)

    def role_of(self, value: float) -> Role:
        """What a tested value is to the anchor; raises `ConfigError` for one that the family does not name."""
        for role in ROLES:
            if value in getattr(self, role):
                return role
        raise ConfigError(f"{self.parameter}={value!r} is not in the family; it has {list(self.values)}")


class BackboneConfig(Section):
    """How a backbone changes the base run."""

    base: Path | None = Field(None, description="another base run, in place of the study's and its `set`")
    set: tuple[str, ...] = Field((), description="key=value changes of the base run, after those of the study")


class CCMConfig(StudySettings):
    """A study of composition: a family, a backbone, the members trained for each seed, and the methods compared."""

    out: Path = Field(Path("runs/ccm"), description="folder of the study's folder")
    data: Path = Field(description="folder of the family's data; studies with one family, grid and seed can share it")
    base: Path = Field(description="configuration of the run that anchor and experts start from; it has one regime")
    backbone: str = Field("fno", description="which of the backbones")
    backbones: dict[str, BackboneConfig] = Field(min_length=1)
    family: FamilySettings
    anchor_steps: PositiveInt
    expert_steps: PositiveInt
    expert_lr: PositiveFloat = Field(description="highest learning rate of the experts' fine-tuning")
    prefix: PositiveInt = Field(4, description="observed steps after the history, which no error counts")
    rollout: PositiveInt = Field(description="counted steps, after history and prefix")
    maps: tuple[ParameterMap, ...] = Field(
        ("linear", "log"), min_length=1, description="of the parameter; one is chosen on validation"
    )
    methods: tuple[MethodName, ...] = Field(METHODS, min_length=1)
    published_improvement: float | None = Field(
        None, description="lower extrapolation error than the anchor's, in per cent, of the published method"
    )

    @model_validator(mode="after")
    def _check(self) -> CCMConfig:
        if self.backbone not in self.backbones:
            raise ValueError(f"backbone {self.backbone!r}: the study has {list(self.backbones)}")
        if repeated := sorted({m for m in self.methods if self.methods.count(m) > 1}):
            raise ValueError(f"methods names {repeated} twice")
        if "anchor" not in self.methods:
            raise ValueError("methods need 'anchor': every other is compared with it")
        return self

    def folder_of(self, seed: int, member: Member) -> Path:
        """Converted folder of a member, as `shodh.merge.experts.open_expert` reads it."""
        return self.folder / "converted" / f"seed{seed}" / member

    def results_file(self, seed: int) -> Path:
        """What the evaluation of a seed leaves behind."""
        return self.folder / "results" / f"seed{seed}.json"

    def value_folder(self, value: float) -> Path:
        """Folder of the trajectories of one value, with ``data/{train,valid,test}``."""
        return self.data / repr(float(value)) / self.family.regime

    @property
    def anchor_folder(self) -> Path:
        """Folder of the trajectories of all values of the support, laid out as `value_folder`."""
        return self.data / "support" / self.family.regime

    def base_config(self) -> RunConfig:
        """The base run with the changes of study and backbone; raises `ConfigError` for what does not fit."""
        chosen = self.backbones[self.backbone]
        own = self.set if chosen.base is None else ()
        base = chosen.base or self.base
        config = load_config(base, (*own, *chosen.set, *self.overrides))
        names = [r.name for r in config.data.regimes]
        if names != [self.family.regime]:
            raise ConfigError(f"{base}: a study of composition has the one regime {self.family.regime!r}, not {names}")
        if config.has_tokenizer:
            raise ConfigError(f"{base}: operator.kind {config.operator.kind} needs a tokenizer; use one on fields")
        needed = config.data.history + self.prefix + self.rollout
        if config.operator.conditions:
            raise ConfigError(f"{base}: experts of a family are not told its parameter; leave out operator.conditions")
        if config.data.stride != 1 or config.data.strides:
            raise ConfigError(f"{base}: data.stride must be 1; choose the family's frame interval instead")
        if self.family.frames < needed:
            raise ConfigError(
                f"study {self.name}: trajectories have {self.family.frames} frames, and history {config.data.history}, "
                f"prefix {self.prefix} and rollout {self.rollout} need {needed}"
            )
        return config

    def run_config(self, seed: int, member: Member, world_size: int = 1) -> RunConfig:
        """The run that trains a member for a seed on so many ranks; raises `ConfigError` for what does not fit."""
        base = self.base_config()
        num_experts = base.operator.experts.num_experts
        tree = to_dict(base)
        family = self.family
        anchor = member == "anchor"
        value = family.low if member == "low" else family.high
        train = tree["operator"]["train"]
        train["steps"] = self.anchor_steps if anchor else self.expert_steps
        if not anchor:
            train["lr"] = self.expert_lr
            train["warmup"] = train["warmup"] * self.expert_steps // self.anchor_steps
        tree["data"]["regimes"][0]["path"] = str(self.anchor_folder if anchor else self.value_folder(value))
        parameters = {family.parameter: list(family.range) if anchor else value}
        tree |= {
            "name": f"seed{seed}-{member}",
            "seed": seed,
            "out": str(self.folder / "runs"),
            "parallel": {"ep_size": fitting_ep_size(world_size, base.parallel.ep_size, num_experts)},
            "family": {"name": f"{family.regime}-{family.parameter}", "parameters": parameters},
        }
        return config_from_dict(tree, f"study {self.name}, {member} of seed {seed}")


def load_ccm(path: Path, scale: Preset = "tiny", *, backbone: str | None = None, **changes: Any) -> CCMConfig:
    """`load_settings` with another ``backbone`` than the file's, which is then added to the name."""
    study = load_settings(CCMConfig, path, scale, backbone=backbone, **changes)
    own = load_settings(CCMConfig, path, scale).backbone
    if changes.get("name") is None and study.backbone != own:
        study = study.model_copy(update={"name": f"{study.name}-{study.backbone}"})
    return study
