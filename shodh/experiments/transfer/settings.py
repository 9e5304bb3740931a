"""The study file: a base run, mixes of regimes, and the axes along which its runs differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from shodh.config import RegimeConfig, RunConfig, Section, config_from_dict, load_config, to_dict
from shodh.config.base import PositiveInt, Width
from shodh.config.routers import ROUTERS
from shodh.core.errors import ConfigError
from shodh.experiments.harness.settings import StudySettings

ModelName = Literal[
    "sparse",
    "dense_active",
    "dense_router",
    "dpot",
    "dense_total",
    "specialist",
    "specialist_share",
    "specialist_batch",
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


#: Kinds whose groups are an axis of a study.
GROUPED = tuple(kind for kind, traits in ROUTERS.items() if traits.grouped and not traits.labelled)
RouterName = Annotated[str, AfterValidator(_learned)]
BalanceName = Literal["switch", "information", "both", "none"]


class PlasticityConfig(Section):
    """How fast a trained model learns a regime that it never saw, beside a fresh one."""

    regime: str
    steps: PositiveInt = 50
    lr: PositiveFloat = 1e-3


class StudyConfig(StudySettings):
    """A grid of runs: ``models`` and variants of ``sparse`` on every mix, with every seed."""

    base: Path = Field(description="configuration of the run that all others are changes of")
    regimes: tuple[RegimeConfig, ...] = Field((), description="in place of those of the base run")
    mixes: dict[str, tuple[str, ...]] = Field(min_length=1, description="name -> regimes, in order")
    models: tuple[ModelName, ...] = Field(
        min_length=1,
        description="specialists have all steps; _share: as many as the mix gives a regime; _batch: all steps, each of "
        "as many samples as the mix gives a regime",
    )
    routers: tuple[RouterName, ...] = Field((), description="kinds of the sparse model; none: the base run's")
    balances: tuple[BalanceName, ...] = Field((), description="balance terms of the sparse model; none: the base's")
    experts: tuple[Width, ...] = Field((), description="routed experts; none: the base run's")
    groups: tuple[Width, ...] = Field((), description="groups of two_level and operator routers; none: the base run's")
    checkpoints: PositiveInt = Field(5, description="points of the error curves, evenly over training")
    gradient_samples: PositiveInt = Field(16, description="windows a regime for the cosine between gradients")
    plasticity: PlasticityConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        for name, regimes in self.mixes.items():
            if not regimes or len(set(regimes)) < len(regimes):
                raise ValueError(f"mix {name!r} has no, or repeated regimes: {list(regimes)}")
        if self.groups and not set(GROUPED) & set(self.routers):
            raise ValueError(f"groups are of {' and '.join(GROUPED)} routers; add one to routers")
        variants = self.routers + self.balances + self.experts
        if variants and "sparse" not in self.models:
            raise ValueError("routers, balances and experts are of the model sparse; add it to models")
        return self

    def base_config(self) -> RunConfig:
        """The base run with the changes of the study; raises `ConfigError` for what does not fit."""
        tree = to_dict(load_config(self.base, (*self.set, *self.overrides)))
        if self.regimes:
            tree["data"]["regimes"] = [to_dict(regime) for regime in self.regimes]
        config = config_from_dict(tree, str(self.base))
        known = [r.name for r in config.data.regimes]
        named = {r for mix in self.mixes.values() for r in mix}
        named |= {self.plasticity.regime} if self.plasticity else set()
        if unknown := sorted(named - set(known)):
            raise ConfigError(f"study {self.name}: unknown regimes {unknown}; {self.base} and the study have {known}")
        return config
