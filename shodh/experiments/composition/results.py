"""Results of finished seeds: errors by method, value and role, and what they are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shodh.core.errors import ConfigError
from shodh.core.reading import read_object
from shodh.core.strict_json import to_json
from shodh.experiments.composition.evaluate import measured_settings
from shodh.experiments.composition.settings import METHODS, ROLES, CCMConfig, Role
from shodh.merge.coordinates import ParameterMap, extrapolation
from shodh.report.comparison import Comparison, compare

#: The better of both experts at each value and seed, in hindsight.
BEST_ENDPOINT = "best_endpoint"


@dataclass(frozen=True)
class SeedResult:
    """One seed; ``values`` is its ``seedN.json``."""

    values: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.values["seed"])

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
            return lowest(methods[end]["error"] for end in ("low", "high") if end in methods)
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
        """A method against another over the seeds where both are finite; None without any."""
        pairs = zip(self.role_errors(method, role), self.role_errors(other, role), strict=True)
        known = [(a, b) for a, b in pairs if a and b]
        return compare([a for a, _ in known], [b for _, b in known]) if known else None

    def alphas(self, method: str) -> list[tuple[float, int, float]]:
        """(value, seed, coordinate) of a method with one coordinate a value."""
        found = []
        for value, _ in self.values:
            for seed in self.seeds:
                alpha = seed.at(value)["methods"].get(method, {}).get("alpha")
                if isinstance(alpha, float):
                    found.append((value, seed.seed, alpha))
        return found

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

    def mean_of(self, figure: Callable[[SeedResult], float | None]) -> float | None:
        """Mean over seeds of some figure."""
        return mean(figure(seed) for seed in self.seeds)


def mean(values: Iterable[float | None]) -> float | None:
    """None if there is none, or one of them is None."""
    found = list(values)
    known = [v for v in found if v is not None]
    return statistics.fmean(known) if known and len(known) == len(found) else None


def spread(values: Iterable[float | None]) -> float | None:
    """Standard deviation over seeds; None of fewer than two, or where one is None."""
    found = list(values)
    known = [v for v in found if v is not None]
    return statistics.stdev(known) if len(known) > 1 and len(known) == len(found) else None


def lowest(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [v for v in values if v is not None]
    return min(known, default=None)


def read_results(study: CCMConfig) -> Results:
    """The seeds of a study that are evaluated.

    Raises
    ------
    ConfigError
        A result is of other settings than the study's: it could not be compared with the others.
    """
    wanted = to_json(measured_settings(study))
    found = []
    for seed in range(study.seeds):
        path = study.results_file(seed)
        if not path.exists():
            continue
        values = read_object(path)
        other = [key for key in wanted if values.get("settings", {}).get(key) != wanted[key]]
        if other:
            raise ConfigError(
                f"{path} was measured with other settings of {' and '.join(other)}; remove it to measure anew, or "
                "choose another --name"
            )
        found.append(SeedResult(values))
    return Results(found)
