"""Settings of a router, and the registry of its kinds: ``router.kind`` in a configuration is a key of `ROUTERS`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from shodh.config.base import Section, Weight, Width


@dataclass(frozen=True)
class RouterTraits:
    """What all others ask about a kind of router, so that nobody asks for its name.

    Attributes
    ----------
    where : str
        Its class, ``module:Class``. Named, not imported: settings do not need torch.
    trained : bool
        Whether it has weights that the optimiser moves.
    grouped : bool
        Whether a token meets the experts of one group of ``router.groups`` alone.
    labelled : bool
        Whether it is given the regime of each sample, with a group for each regime. For controls alone.
    noisy : bool
        Whether it is given a seed of noise for each sample in training.
    observes : bool
        Whether the model shows it what its groups make of the fingerprint of each sample
        (`shodh.moe.fingerprint`), which needs a history of two frames.
    problem : callable
        What else is wrong with its settings, in one line; empty if nothing.
    """

    where: str
    trained: bool = True
    grouped: bool = False
    labelled: bool = False
    noisy: bool = False
    observes: bool = False
    problem: Callable[[RouterConfig], str] = lambda config: ""


def _grouped_problem(config: RouterConfig) -> str:
    if config.normalise == "before":
        return ""
    return (
        f"kind {config.kind} with normalise after never weights an expert by its group, and the gate of the groups "
        "would get no gradient; use normalise before"
    )


def _two_level_problem(config: RouterConfig) -> str:
    return "" if config.groups == 1 else _grouped_problem(config)


def _noisy_problem(config: RouterConfig) -> str:
    if (config.score, config.normalise) == ("softmax", "after"):
        return ""
    return (
        "kind noisy_topk is a linear gate and a softmax over the top k: use score softmax, normalise after, and "
        "operator.experts.top_k of at least 2"
    )


def _hash_problem(config: RouterConfig) -> str:
    if config.granularity == "token":
        return ""
    return "kind hash goes by the token's position, so it needs granularity token; use kind frozen"


#: Kinds by name. To add one: its class in a file of ``shodh/moe/routers/``, and its line here (docs/routers.md).
ROUTERS: dict[str, RouterTraits] = {
    "token": RouterTraits("shodh.moe.routers.token:TokenRouter"),
    "context": RouterTraits("shodh.moe.routers.context:ContextRouter"),
    "two_level": RouterTraits("shodh.moe.routers.two_level:TwoLevelRouter", grouped=True, problem=_two_level_problem),
    "operator": RouterTraits(
        "shodh.moe.routers.operator:OperatorRouter", grouped=True, observes=True, problem=_grouped_problem
    ),
    "noisy_topk": RouterTraits("shodh.moe.routers.noisy_topk:NoisyTopKRouter", noisy=True, problem=_noisy_problem),
    "hash": RouterTraits("shodh.moe.routers.hash:HashRouter", trained=False, problem=_hash_problem),
    "frozen": RouterTraits("shodh.moe.routers.frozen:FrozenRouter", trained=False),
    "oracle": RouterTraits("shodh.moe.routers.oracle:OracleRouter", grouped=True, labelled=True),
}


class TemperatureSchedule(Section):
    """Temperature that divides the router's logits: ``max(end, start * decay^steps)`` after so many optimiser steps."""

    start: PositiveFloat = 2.0
    end: PositiveFloat = 0.5
    decay: PositiveFloat = Field(0.99, le=1.0, description="factor of one optimiser step")

    @model_validator(mode="after")
    def _check(self) -> TemperatureSchedule:
        if self.end > self.start:
            raise ValueError(f"end={self.end} is above start={self.start}; the temperature falls")
        return self


class RouterConfig(Section):
    """How a token finds its experts."""

    kind: str = Field(
        "token",
        description=f"one of {', '.join(ROUTERS)}; hash, frozen and oracle are controls: by position, random and "
        "untrained, by regime label",
    )
    score: Literal["cosine", "softmax"] = "cosine"
    gate: Literal["linear", "conv"] = Field("linear", description="conv: MoE-POT's gate network; needs score softmax")
    normalise: Literal["before", "after"] = Field(
        "before", description="softmax over all experts before the top-k, or over the chosen ones after it"
    )
    temperature_schedule: TemperatureSchedule | None = Field(None, description="null: logits are not divided")
    granularity: Literal["token", "sample"] = "token"
    semantic_dim: Width = Field(
        16, ge=2, description="width of the space in which tokens meet expert prototypes; of one, a cosine is a sign"
    )
    temperature: PositiveFloat = Field(8.0, description="initial inverse temperature of cosine scores, learned")
    context_weight: Weight = Field(4.0, description="kind context: weight of the sample mean beside the token")
    groups: Width | None = Field(
        None,
        description="expert groups: two_level chooses one by the sample mean, operator by the fingerprint; oracle has "
        "one for each regime; null: 2, and of operator as many as leave each top_k experts",
    )
    groups_by: Literal["mlp", "clusters"] = Field(
        "clusters",
        description="kind operator: the group of a fingerprint by the nearest of the clusters that training finds "
        "(k-medians), or by a learned gate of two layers",
    )
    cluster_samples: Width = Field(
        1024, description="groups_by clusters: samples that clusters are found of; then they stay as they are"
    )

    @property
    def traits(self) -> RouterTraits:
        """What is known of its kind."""
        return ROUTERS[self.kind]

    @property
    def clustered(self) -> bool:
        """Whether its groups are clusters of fingerprints."""
        return self.traits.observes and self.groups_by == "clusters"

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        if kind not in ROUTERS:
            near = difflib.get_close_matches(kind, ROUTERS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no such kind of router; {hint}expected one of {', '.join(ROUTERS)}")
        return kind

    @model_validator(mode="after")
    def _check(self) -> RouterConfig:
        if self.gate == "conv" and self.score != "softmax":
            raise ValueError(f"gate conv gives logits; use score softmax with it, not {self.score}")
        if self.groups_by != "clusters" and not self.traits.observes:
            raise ValueError(f"groups_by={self.groups_by} is of kind operator; kind {self.kind} does not read it")
        if self.cluster_samples != 1024 and not self.clustered:
            raise ValueError(
                f"cluster_samples={self.cluster_samples} is of kind operator with groups_by clusters; nothing reads it "
                "here"
            )
        if problem := self.traits.problem(self):
            raise ValueError(problem)
        return self
