"""Samples that are solved when they are asked for: no file, no epoch, and the same sample whenever and wherever.

A sample is named by (seed, regime, step, number). Its noise and its parameters are drawn from that name by the
counter-based generator of `shodh.core.noise`, so it depends neither on the batch it comes in, nor on ranks or devices,
nor on what was drawn before: a run that is resumed at a step, or that learns some of the regimes alone, meets the same.
States are equal to rounding: a transform of many fields at once may round otherwise than one of few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from shodh.core.devices import send
from shodh.core.errors import ConfigError
from shodh.core.noise import fold, normal
from shodh.core.seeding import Key, stable_seed
from shodh.physics.opposed import EQUATIONS, coloured
from shodh.physics.solvers.exponential import Waves

CALIBRATION = 256  # samples of a regime that its constants are measured with
MOST_PARAMETERS = 4


class Constants(NamedTuple):
    """Of one regime as it is solved: mean, standard deviation, and the root mean square of a change in one step."""

    mean: float
    deviation: float
    change: float


@dataclass(frozen=True)
class FreshRegime:
    """Trajectories of one equation of `shodh.physics.opposed` on an ``n x n`` grid.

    Parameters
    ----------
    name : str
        A key of `EQUATIONS`.
    frames : int
        Of a trajectory.
    unit : float, optional
        Standard deviation of the field as it is given, and mean zero; None: as it is solved.
    noise : float
        Standard deviation, over the field's, of white noise on all frames but the last: on what a model is given, not
        on what it is asked for. It follows from the name of the sample as well.

    Raises
    ------
    ConfigError
        There is no such equation.
    """

    name: str
    n: int = 32
    frames: int = 3
    unit: float | None = 1.0
    noise: float = 0.0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.name not in EQUATIONS:
            raise ConfigError(f"unknown regime {self.name!r}; expected one of {', '.join(EQUATIONS)}")

    @cached_property
    def waves(self) -> Waves:
        return Waves(self.n, self.device)

    @cached_property
    def constants(self) -> Constants:
        """Measured with samples of their own, the same in every run."""
        solved = self._solve([("calibration", number) for number in range(CALIBRATION)]).double()
        change = (solved[:, -1] - solved[:, -2]).square().mean().sqrt()
        return Constants(float(solved.mean()), float(solved.std()), float(change))

    @property
    def change(self) -> float:
        """Mean square error of persistence, of the field as it is given: a change in one step, and the noise."""
        given = self.constants.change**2 + (self.noise * self.constants.deviation) ** 2
        return given * self._factor**2

    @property
    def _factor(self) -> float:
        return 1.0 if self.unit is None else self.unit / self.constants.deviation

    def samples(self, keys: Sequence[tuple[Key, ...]]) -> Tensor:
        """Trajectories ``[B, frames, 1, n, n]`` by name, float32; a key is (seed, step, number) or any other."""
        solved = self._solve(keys)
        if self.noise:
            white = normal(fold(self._seeds(keys), 1), (self.frames - 1, self.n, self.n))
            solved[:, :-1] += self.noise * self.constants.deviation * white
        if self.unit is not None:
            solved = (solved - self.constants.mean) * self._factor
        return solved.unsqueeze(2)

    def _seeds(self, keys: Sequence[tuple[Key, ...]]) -> Tensor:
        return send([stable_seed("fresh", self.name, *key) for key in keys], torch.device(self.device))

    def _solve(self, keys: Sequence[tuple[Key, ...]]) -> Tensor:
        equation, seeds = EQUATIONS[self.name], self._seeds(keys)
        uniform = torch.special.ndtr(normal(fold(seeds, 0), (MOST_PARAMETERS,)))
        field = coloured(self.waves, normal(seeds, (self.n, self.n)))
        return equation.solve(self.waves, field, equation.draw(uniform), self.frames)
