"""The study file of kind ``map``: the axes of the map, and the operator at each of its points."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator

from shodh.config import OperatorConfig, apply_overrides
from shodh.config.base import Count, PositiveInt, Width
from shodh.config.reading import section_from_dict
from shodh.config.routers import ROUTERS
from shodh.core.errors import ConfigError
from shodh.experiments.harness.settings import StudySettings
from shodh.moe.routers import make_router
from shodh.moe.routers.operator import make_operator_gate
from shodh.physics.opposed import EQUATIONS, OPPOSED

DENSE, SPECIALIST = "dense", "specialist"
#: Controls: as many parameters as a sparse model has active or in all, or more steps of the dense model.
DENSE_ROUTER, DENSE_TOTAL, DENSE_LONGER = "dense_router", "dense_total", "dense_longer"
Scale = Literal["normalised", "raw"]
#: Channels and dimensions of the frames that a router of kind operator goes by: those of the fields.
OBSERVED = (1, 2)


class MapConfig(StudySettings):
    """``counts`` x ``dims`` x ``fields`` x seeds, with a dense model, controls and routers at each point."""

    kind: Literal["map"]
    regimes: tuple[str, ...] = Field(
        OPPOSED, description="equations of shodh.physics.opposed, in the order in which mixes grow"
    )
    counts: tuple[PositiveInt, ...] = Field(min_length=1, description="regimes of a mix: the first so many")
    dims: tuple[Width, ...] = Field(min_length=1, description="widths of the operator: its sizes")
    fields: tuple[Scale, ...] = Field(
        ("normalised",),
        description="normalised: unit variance, and each error over its regime's change in a step; raw: fields and "
        "errors as they are solved",
    )
    dense_router: bool = Field(
        True,
        description="also a dense model with as many parameters as the largest sparse one has active, router and all",
    )
    dense_total: bool = Field(True, description="also a dense model with as many parameters as a sparse one has in all")
    longer: float | None = Field(
        None,
        gt=1,
        allow_inf_nan=False,
        description="also a dense model that takes so many times the steps: at least as long as the routers, whose "
        "time over the dense model's is on the page",
    )
    apart: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(
        {},
        description="dense models, told the regime, some of whose parameters each has for itself: name -> patterns of "
        "these, such as blocks.*.attention.*",
    )
    routers: dict[str, dict[str, Any]] = Field(
        {}, description="sparse models: name -> settings of its router; groups are chosen by the number of regimes"
    )
    experts_per_regime: PositiveInt = 1
    expansion: PositiveFloat = Field(2.0, description="hidden width of one expert over the operator's width")
    grid: Width = Field(32, description="cells of a side")
    unfold: Width = Field(4, description="cells of a side that are the channels of one latent cell")
    history: PositiveInt = Field(2, description="frames that are given")
    noise: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="white noise on given frames, over the field's standard deviation"
    )
    samples: PositiveInt = Field(8, description="of a regime in one step")
    held_out: PositiveInt = Field(64, description="samples of a regime that errors are of, the same for all runs")
    unseen: bool = Field(
        False,
        description="also errors on the opposed equations that a mix leaves out, and where their fingerprints lie",
    )
    plasticity: Count = Field(
        0,
        description="steps in which a trained model and a new one of its kind learn each opposed equation that the mix "
        "leaves out; 0: none",
    )
    gradient_samples: Count = Field(64, description="of a regime, for cosines and norms of gradients; 0: none")
    stream: PositiveInt = Field(8, description="steps whose data are solved at once")
    operator: dict[str, Any] = Field(description="settings of the operator; its width and experts are set by the axes")

    @model_validator(mode="after")
    def _check(self) -> MapConfig:
        if unknown := [name for name in self.regimes if name not in EQUATIONS]:
            raise ValueError(f"unknown regimes {unknown}; expected some of {', '.join(EQUATIONS)}")
        if len(set(self.regimes)) < len(self.regimes):
            raise ValueError(f"regimes are repeated: {list(self.regimes)}")
        if max(self.counts) > len(self.regimes):
            raise ValueError(f"counts up to {max(self.counts)}, and there are {len(self.regimes)} regimes")
        if self.grid % self.unfold:
            raise ValueError(f"grid={self.grid} is not divisible by unfold={self.unfold}")
        own = {DENSE, DENSE_ROUTER, DENSE_TOTAL, DENSE_LONGER, SPECIALIST}
        if taken := (own | set(self.apart)) & set(self.routers) or own & set(self.apart):
            raise ValueError(f"{', '.join(sorted(taken))}: there is such a model; give another name")
        for dim in self.dims:
            if int(self.expansion * dim) % 8:
                raise ValueError(
                    f"expansion={self.expansion}: a hidden width of {self.expansion * dim:g} is no multiple of 8"
                )
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """Models of a mix of several regimes."""
        controls = {
            DENSE_ROUTER: self.dense_router and bool(self.routers),
            DENSE_TOTAL: self.dense_total,
            DENSE_LONGER: self.longer is not None,
        }
        return (DENSE, *(arm for arm, asked in controls.items() if asked), *self.apart, *self.routers)

    def learns(self, arm: str) -> bool:
        """Whether an arm has a router that is trained and given no label: no control."""
        traits = ROUTERS[self.routers[arm].get("kind", "token")] if arm in self.routers else None
        return traits is not None and traits.trained and not traits.labelled

    def operator_config(self, arm: str, count: int, dim: int) -> OperatorConfig:
        """The operator of an arm on so many regimes.

        Raises
        ------
        ConfigError
            Its settings do not fit.
        """
        tree = apply_overrides({"operator": dict(self.operator)}, (*self.set, *self.overrides))["operator"]
        if (kind := tree.setdefault("kind", "latent_transformer")) != "latent_transformer":
            raise ConfigError(f"operator.kind={kind}: the map is of the latent_transformer, on unfolded fields")
        experts = {"num_shared": 0, **tree.get("experts", {})}
        number, hidden = count * self.experts_per_regime, int(self.expansion * dim)
        if arm in self.routers:
            experts |= {"num_experts": number, "router": {**experts.get("router", {}), **self._router(arm, count)}}
        else:
            hidden *= number if arm == DENSE_TOTAL else 1
            if arm == DENSE_ROUTER:
                sparse = [self.operator_config(router, count, dim) for router in self.routers]
                hidden += round(max(map(_router_size, sparse)) / (3 * dim * sparse[0].depth))
            experts |= {"num_experts": 0}
        tree |= {"dim": dim, "experts": {**experts, "hidden": hidden}, "random_shifts": False}
        tree["train"] = {**tree.get("train", {}), "global_batch": self.samples * (1 if arm == SPECIALIST else count)}
        config = section_from_dict(OperatorConfig, tree, f"study {self.name}, operator of {arm}")
        if arm != DENSE_LONGER or self.longer is None:
            return config
        train = config.train.model_copy(update={"steps": math.ceil(self.longer * config.train.steps)})
        return config.model_copy(update={"train": train})

    def _router(self, arm: str, count: int) -> dict[str, Any]:
        """Settings of an arm's router, with a group for each regime where it has groups and says nothing else."""
        given = self.routers[arm]
        grouped = ROUTERS.get(given.get("kind", "token"), ROUTERS["token"]).grouped
        return {**({"groups": count} if grouped else {}), **given}

    def checked(self) -> MapConfig:
        """Itself, with every operator built as settings; raises `ConfigError` for one that does not fit."""
        for dim in self.dims:
            for count in self.counts:
                for arm in self.arms if count > 1 else (SPECIALIST,):
                    self.operator_config(arm, count, dim)
        return self


def _router_size(config: OperatorConfig) -> int:
    """Parameters of the routers of an operator: of each layer, and of the gate that they share."""
    with torch.device("meta"):
        layer, shared = make_router(config.experts, config.dim), make_operator_gate(config.experts, *OBSERVED)
    own, common = (sum(p.numel() for p in part.parameters()) if part else 0 for part in (layer, shared))
    return config.depth * own + common
