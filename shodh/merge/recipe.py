"""How experts are to be merged: the method, and where along the direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shodh.core.errors import ConfigError
from shodh.merge.coordinates import LIMIT, Coordinates, ParameterMap, as_coordinates, coordinate, read_coordinates
from shodh.merge.experts import Expert, family_range
from shodh.merge.readout import Range, read_coord
from shodh.merge.span import CurveKind

Method = Literal["compose", "wrong_sign", "random_direction", "average", "task_arithmetic", "ties", "dare"]
#: Methods that need a coordinate.
ALONG = ("compose", "wrong_sign", "random_direction")


@dataclass(frozen=True)
class Recipe:
    """How experts are merged; stored in the merged folder.

    Attributes
    ----------
    method : str
        ``compose``, or what it is compared with (`shodh.merge.baselines`; ``wrong_sign``: minus the coordinate).
    coordinates : Coordinates, optional
        Where to compose: one number on a line or curve, two on a plane.
    positions : tuple, optional
        Coordinates of the experts, the default -1 and 1 for two: one number each for a curve, corners for a plane of
        three experts; four experts without positions span a bilinear patch.
    curve : {"piecewise", "polynomial"}
    density, scaling : float, optional
        Of TIES, DARE and task arithmetic; the default is what their papers recommend.
    seed : int
        Of DARE and the random direction.
    about : dict
        Whatever explains the choice, such as the physical parameter.
    """

    method: Method = "compose"
    coordinates: Coordinates | None = None
    positions: tuple[Any, ...] | None = None
    curve: CurveKind = "piecewise"
    density: float | None = None
    scaling: float | None = None
    seed: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without what was not used."""
        found: dict[str, Any] = {"method": self.method}
        if self.coordinates is not None:
            rules = [rule.model_dump(mode="json", exclude_none=True) for rule in self.coordinates.rules]
            found["coordinates"] = {"default": list(self.coordinates.default), "rules": rules}
        if self.positions is not None:
            found |= {"positions": list(self.positions), "curve": self.curve}
        found |= {key: value for key in ("density", "scaling") if (value := getattr(self, key)) is not None}
        if self.method in ("random_direction", "dare"):
            found["seed"] = self.seed
        return {**found, **self.about}

    def describe(self) -> str:
        """The coordinate, for a line of text."""
        if self.coordinates is None:
            return "no coordinate"
        text = ", ".join(f"{a:.6g}" for a in self.coordinates.default)
        rules = len(self.coordinates.rules)
        return f"alpha {text}" + (f" and {rules} rules by layer or expert" if rules else "")


def make_recipe(
    experts: Sequence[Expert],
    method: Method = "compose",
    *,
    alpha: Sequence[float] | None = None,
    value: float | None = None,
    values: Sequence[float | None] = (),
    parameter: str | None = None,
    given: Sequence[float] | None = None,
    scale: ParameterMap = "linear",
    gamma: float = 1.0,
    limit: float = LIMIT,
    coordinates: Path | None = None,
    curve: CurveKind = "piecewise",
    density: float | None = None,
    scaling: float | None = None,
    seed: int = 0,
) -> Recipe:
    """A recipe from what a user says: a coordinate, a physical parameter, or a file of coordinates.

    Parameters
    ----------
    experts : sequence of Expert
        Low, between, high; or the four corners of a plane.
    alpha : sequence of float, optional
        One number, or two on a plane.
    value : float, optional
        Physical parameter in place of ``alpha``; warns outside the range of the experts.
    values : sequence of float, optional
        Parameters of the experts between; None: of their configurations.
    given : (low, high), optional
        Parameters of the outer experts, in place of those of their configurations.
    gamma, limit : float
        ``alpha = clip(gamma s(value))``, see `shodh.merge.read_coord`.

    Raises
    ------
    ConfigError
        Contradictions, and metadata that are needed and missing.
    """
    settings: dict[str, Any] = {"density": density, "scaling": scaling, "seed": seed}
    if method not in ALONG:
        if alpha is not None or value is not None or coordinates is not None:
            raise ConfigError(f"method {method} has no coordinate; leave out alpha, value and coordinates")
        return Recipe(method, **settings)
    if density is not None or scaling is not None:
        raise ConfigError(f"method {method} has no density and no scaling; ties, dare and task_arithmetic have")
    on_plane = alpha is not None and len(alpha) == 2
    about: dict[str, Any] = {}
    if value is not None or (len(experts) > 2 and not on_plane):
        family = family_range(
            experts[0], experts[-1], parameter, None if given is None else (given[0], given[1]), scale
        )
        if value is not None:
            alpha = [float(read_coord(value, family, gamma, limit).alpha)]  # type: ignore[arg-type]
            about = {"parameter": {**vars(family), "value": value, "gamma": gamma, "limit": limit}}
        if len(experts) > 2:
            settings |= {"positions": _positions(experts[1:-1], values, family), "curve": curve}
    if coordinates is not None:
        found = read_coordinates(coordinates, alpha)
    elif alpha is not None:
        found = as_coordinates(tuple(alpha))
    else:
        raise ConfigError("where along the direction? give a coordinate, a value of the parameter, or coordinates")
    return Recipe(method, found, about=about, **settings)


def _positions(between: Sequence[Expert], values: Sequence[float | None], family: Range) -> tuple[float, ...]:
    """Coordinates of all experts on the line of the parameter."""
    positions = [-1.0]
    for expert, value in zip(between, values, strict=True):
        if value is None:
            own = expert.parameter(family.name)
            if own is None:
                raise ConfigError(f"{expert.path}: its configuration gives no {family.name}; write DIR=VALUE")
            value = own[1]
        position = coordinate(value, family.low, family.high, family.scale)
        if not positions[-1] < position < 1.0:
            raise ConfigError(
                f"{expert.path}: {family.name} = {value:g} does not lie between the experts before and after it; name "
                "the experts between in their order from low to high"
            )
        positions.append(position)
    return (*positions, 1.0)
