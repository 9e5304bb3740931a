"""Where in a family a model lies: from physical parameters to coordinates in weight space.

The coordinate is -1 at the low expert, +1 at the high one and 0 half way between. It may differ by layer and by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from shodh.config import Section
from shodh.core.errors import ConfigError
from shodh.core.reading import read_yaml
from shodh.core.weights import LazyWeights
from shodh.merge.components import ROUTED_EXPERTS, component

ParameterMap = Literal["linear", "log"]
MAPS: Mapping[str, Callable[[float], float]] = {"linear": float, "log": math.log}
#: Largest coordinate that a read-out gives; the bank of the prefix read-out ends there too.
LIMIT = 1.5

Alpha = float | Sequence[float]


def mapped(value: float, scale: ParameterMap) -> float:
    """A parameter on the scale in which the direction is taken to be straight; raises `ConfigError`."""
    if scale not in MAPS:
        raise ConfigError(f"map {scale!r}: expected one of {sorted(MAPS)}")
    if not math.isfinite(value) or (scale == "log" and value <= 0):
        expected = "a positive number on a logarithmic scale" if scale == "log" else "a finite number"
        raise ConfigError(f"parameter value {value:g}: expected {expected}")
    return MAPS[scale](value)


def coordinate(value: float, low: float, high: float, scale: ParameterMap = "linear") -> float:
    """``2 (f(value) - mid) / (f(high) - f(low))``, with ``f`` the identity or the logarithm (arXiv 2605.14546).

    Exactly -1 at ``low`` and +1 at ``high``; not clipped.

    Raises
    ------
    ConfigError
        The experts have equal parameters, or a value does not lie on the scale.
    """
    here, start, end = (mapped(v, scale) for v in (value, low, high))
    if start == end:
        raise ConfigError(f"both experts were trained at {low:g}; they span no direction")
    return -1.0 + 2.0 * (here - start) / (end - start)


def clip(alpha: float, limit: float = LIMIT) -> float:
    """The nearest coordinate of ``[-limit, limit]``."""
    return min(max(alpha, -limit), limit)


def extrapolation(value: float, low: float, high: float, scale: ParameterMap = "linear") -> float:
    """How far a parameter lies outside ``[low, high]``, over the length of that range; 0 inside."""
    return max(abs(coordinate(value, low, high, scale)) - 1.0, 0.0) / 2.0


class Rule(Section):
    """Coordinates of some tensors: ``alpha`` where the name matches, of stacked experts for those listed alone."""

    match: str = Field(description="pattern of tensor names, such as operator.blocks.0.*")
    alpha: float | tuple[float, ...]
    experts: tuple[int, ...] | None = Field(None, description="indices of routed experts; null: the whole tensor")


class CoordinateFile(Section):
    """What a YAML file of coordinates holds."""

    default: float | tuple[float, ...] | None = None
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Coordinates:
    """A coordinate for every tensor; later rules go before earlier ones.

    Attributes
    ----------
    default : tuple of float
        One number on a line or curve, two on a plane.
    """

    default: tuple[float, ...]
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for alpha in (self.default, *(_as_tuple(rule.alpha) for rule in self.rules)):
            if len(alpha) != len(self.default):
                raise ConfigError(f"coordinate {list(alpha)}: expected {len(self.default)} numbers as in the default")
            if not all(math.isfinite(a) for a in alpha):
                raise ConfigError(f"coordinate {list(alpha)}: expected finite numbers")

    def at(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """Coordinates of a tensor: ``[d]``, or ``[d, E]`` where its stacked experts differ."""
        alpha = np.array(self.default, dtype=np.float64)
        for rule in self.rules:
            if not fnmatchcase(name, rule.match):
                continue
            value = np.array(_as_tuple(rule.alpha), dtype=np.float64)
            if rule.experts is None:
                alpha = value
            elif component(name) == ROUTED_EXPERTS:
                alpha = np.repeat(alpha[:, None], shape[0], 1) if alpha.ndim == 1 else alpha.copy()
                alpha[:, list(rule.experts)] = value[:, None]
        return alpha

    def negated(self) -> Coordinates:
        """The opposite coordinate everywhere."""
        rules = (rule.model_copy(update={"alpha": _negative(rule.alpha)}) for rule in self.rules)
        return Coordinates(tuple(-a for a in self.default), tuple(rules))

    def check(self, weights: LazyWeights) -> None:
        """Refuse rules that match nothing, or name experts that are not there; raises `ConfigError`."""
        for rule in self.rules:
            names = [name for name in weights if fnmatchcase(name, rule.match)]
            if not names:
                raise ConfigError(f"no tensor matches {rule.match!r}; names are like {', '.join(sorted(weights)[:2])}")
            if rule.experts is None:
                continue
            counts = {weights[name].shape[0] for name in names if component(name) == ROUTED_EXPERTS}
            if not counts:
                raise ConfigError(f"{rule.match!r} lists experts and matches no tensor of routed experts")
            wrong = [e for e in rule.experts if not 0 <= e < min(counts)]
            if wrong:
                raise ConfigError(f"{rule.match!r}: no experts {wrong}; there are {min(counts)}, counted from 0")


def _as_tuple(alpha: Alpha) -> tuple[float, ...]:
    return tuple(float(a) for a in alpha) if isinstance(alpha, Sequence) else (float(alpha),)


def _negative(alpha: float | tuple[float, ...]) -> float | tuple[float, ...]:
    return tuple(-a for a in alpha) if isinstance(alpha, tuple) else -alpha


def as_coordinates(alpha: Alpha | Coordinates) -> Coordinates:
    """One coordinate for all tensors, unless it is given by tensor already."""
    return alpha if isinstance(alpha, Coordinates) else Coordinates(_as_tuple(alpha))


def read_coordinates(path: Path, default: Alpha | None = None) -> Coordinates:
    """Coordinates by layer and expert from a YAML file; ``default`` serves where the file has none.

    Raises
    ------
    ConfigError
        The file cannot be read, or holds something else.
    """
    tree = read_yaml(path, "coordinates")
    try:
        content = CoordinateFile.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}; expected default and rules of match, alpha") from error
    chosen = default if content.default is None else content.default
    if chosen is None:
        raise ConfigError(f"{path} has no default, and none was given")
    return Coordinates(_as_tuple(chosen), content.rules)
