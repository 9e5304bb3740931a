"""Results of finished seeds: errors by method, value and role, and what they are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from shodh.experiments.composition.runs import expand
from shodh.experiments.composition.settings import METHODS, ROLES, CCMConfig, Role
from shodh.experiments.harness.results import ERROR, SEED, mean, tidy
from shodh.experiments.harness.results import read_results as read_values
from shodh.merge.coordinates import ParameterMap, extrapolation
from shodh.report.statistics import Comparison, Interval, bootstrap_by_seed, compare, holm

#: The better of both experts at each value and seed, in hindsight.
BEST_ENDPOINT = "best_endpoint"
OUT: Role = "extrapolation"
#: Read-outs that answer for composition: the first that was measured. None is chosen by its test error.
ASKED = ("prefix", "scale", "coord")
#: What composition is set beside, in words.
RIVALS = {
    "anchor": "the anchor",
    BEST_ENDPOINT: "the better expert at each value",
    "average": "the plain average",
    "prefix_finetune": "the anchor fine-tuned on the prefix",
    "ensemble": "the ensemble of both experts",
}


class Claim(NamedTuple):
    """The error of one method against another's, the mean over the values of a role."""

    role: Role
    method: str
    other: str


@dataclass(frozen=True)
class SeedResult:
    """One seed; ``values`` is its ``seedN.json``."""

    values: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.values["run"]["seed"])

    @property
    def diagnostics(self) -> dict[str, Any]:
        found: dict[str, Any] = self.values["diagnostics"]
        return found

    def at(self, value: float) -> dict[str, Any]:
        """Everything of one value of the parameter."""
        entry: dict[str, Any] = next(v for v in self.values["values"] if v["value"] == value)
        return entry

    def error(self, method: str, value: float) -> float | None:
        """Mean over trajectories and counted steps; None where a rollout is not finite, or the method not there."""
        methods = self.at(value)["methods"]
        if method == BEST_ENDPOINT:
            ends = [methods[end]["error"] for end in ("low", "high") if end in methods]
            return min((e for e in ends if e is not None), default=None)
        error: float | None = methods[method]["error"] if method in methods else None
        return error


class Results:
    """The finished seeds of a study, of the same values and methods."""

    def __init__(self, seeds: Sequence[SeedResult]) -> None:
        self.seeds = list(seeds)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def values(self) -> list[tuple[float, Role]]:
        """Values and their roles, ascending."""
        return [(v["value"], v["role"]) for v in self.seeds[0].values["values"]]

    @property
    def roles(self) -> list[Role]:
        """Roles that have values, outermost last."""
        found = {role for _, role in self.values}
        return [role for role in ROLES if role in found]

    @property
    def methods(self) -> list[str]:
        """Methods that were measured, in the order of the report, and the better endpoint after the experts."""
        found = {m for v in self.seeds[0].values["values"] for m in v["methods"]}
        ordered: list[str] = []
        for method in METHODS:
            if method in found:
                ordered.append(method)
            if method == "high" and found >= {"low", "high"}:
                ordered.append(BEST_ENDPOINT)
        return ordered

    def of_role(self, role: Role) -> list[float]:
        return [value for value, r in self.values if r == role]

    def errors(self, method: str, value: float) -> list[float | None]:
        """Of each seed."""
        return [seed.error(method, value) for seed in self.seeds]

    def role_errors(self, method: str, role: Role) -> list[float | None]:
        """Mean over the values of a role, of each seed; None where one of them is not finite."""
        return [mean(seed.error(method, value) for value in self.of_role(role)) for seed in self.seeds]

    def improvements(self, method: str, role: Role) -> list[float | None]:
        """By how many per cent the error lies below the anchor's, of each seed."""
        pairs = zip(self.role_errors(method, role), self.role_errors("anchor", role), strict=True)
        return [None if error is None or not anchor else 100 * (1 - error / anchor) for error, anchor in pairs]

    def paired(self, method: str, other: str, role: Role) -> Comparison | None:
        """A method against another over seeds; None where none has two finite errors."""
        found = compare(self.role_errors(method, role), self.role_errors(other, role))
        return found if found.logs else None

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The tidy table: method, value, role, seed, error, coordinate and cost."""
        keys = ("forward", "backward", "networks")
        return tidy(
            {"method": method, "value": at["value"], "role": at["role"], SEED: seed.seed, ERROR: m["error"]}
            | {"alpha": m["alpha"] if isinstance(m["alpha"], float) else None, **{key: m[key] for key in keys}}
            for seed in self.seeds
            for at in seed.values["values"]
            for method, m in at["methods"].items()
        )

    @property
    def far_role(self) -> Role:
        """Extrapolation, or what a study without it has farthest out."""
        return OUT if OUT in self.roles else self.roles[-1]

    @property
    def asked(self) -> str | None:
        """The read-out that answers for composition."""
        return next((m for m in ASKED if m in self.methods), None)

    @cached_property
    def claims(self) -> dict[Claim, Comparison]:
        """Everything that the page calls lower, higher or equal, with p adjusted for all of it."""
        if not self.seeds or self.asked is None:
            return {}
        asked = [Claim(self.far_role, self.asked, other) for other in RIVALS if other in self.methods]
        found = {claim: self.paired(claim.method, claim.other, claim.role) for claim in asked}
        return holm({claim: c for claim, c in found.items() if c is not None})

    def bootstrap(self, claim: Claim) -> Interval | None:
        """Interval of a claim's ratio over seeds and test trajectories."""
        places = [[seed.at(value)["methods"] for value in self.of_role(claim.role)] for seed in self.seeds]
        sides = (
            {
                seed: [methods.get(m, {}).get("by_trajectory") for methods in values]
                for seed, values in enumerate(places)
            }
            for m in (claim.method, claim.other)
        )
        return bootstrap_by_seed(*sides, joint=True)

    def at_value(self, value: float) -> list[dict[str, Any]]:
        """`SeedResult.at` of every seed."""
        return [seed.at(value) for seed in self.seeds]

    def alphas(self, method: str) -> list[tuple[float, int, float]]:
        """(value, seed, coordinate) of a method with one coordinate a value."""
        known = self.frame[(self.frame["method"] == method) & self.frame["alpha"].notna()].sort_values(["value", SEED])
        return [(float(v), int(s), float(a)) for v, s, a in known[["value", SEED, "alpha"]].values]

    @property
    def map(self) -> ParameterMap:
        """The map of the parameter that validation chose in most seeds."""
        return statistics.mode(seed.values["chosen"]["line"]["scale"] for seed in self.seeds)

    @property
    def ends(self) -> tuple[float, float]:
        """Values of the low and the high expert."""
        parameter = self.seeds[0].values["parameter"]
        return parameter["low"], parameter["high"]

    @property
    def parameter(self) -> str:
        return str(self.seeds[0].values["parameter"]["name"])

    @property
    def sparse(self) -> bool:
        return self.seeds[0].diagnostics["routing"] is not None

    def outside(self, value: float) -> float:
        """How far a value lies outside the experts' range on `map`, over that range's length."""
        return extrapolation(value, *self.ends, self.map)

    def has(self, method: str, value: float) -> bool:
        """Whether a method was measured at a value; some make no sense at all of them."""
        return method == BEST_ENDPOINT or method in self.seeds[0].at(value)["methods"]


def deviation(values: Iterable[float | None]) -> float | None:
    """Standard deviation over seeds; None of fewer than two, or where one has diverged."""
    every = list(values)
    known = [v for v in every if v is not None]
    return statistics.stdev(known) if len(known) > 1 and len(known) == len(every) else None


def read_results(study: CCMConfig) -> Results:
    """The seeds of a study that are evaluated. Errors as `shodh.experiments.harness.run.Run.read`."""
    return Results([SeedResult(v) for v in read_values([run for run in expand(study) if not run.trains])])
