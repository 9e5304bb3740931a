"""What a physical regime is, and the checks, fields and noise that built-in regimes share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import ConfigError, NonFiniteError
from shodh.core.seeding import generator
from shodh.physics.bounds import Bounds
from shodh.schema.fields import Boundary, Field, RegimeSchema, Trajectories

Progress = Callable[[float], None]

FIELDS = (
    Field("velocity", kind="vector", placement="face", solenoidal=True),
    Field("tracer"),
    Field("solid", static=True),
)


@dataclass(frozen=True)
class Regime(ABC):
    """One physical regime: a schema and a batched solver. Parameters are the dataclass fields of the regime.

    A regime is one frozen dataclass in `shodh.physics.regimes`. The time between frames is the parameter
    ``frame_interval``.

    Attributes
    ----------
    name : str
    ranges : mapping
        For the parameters that a study would vary, the interval in which the solver was checked.
    check : str
        In one line, the analytic or published result that its test compares with.
    fields, boundary : tuple
        Of the schema.
    """

    name: ClassVar[str]
    ranges: ClassVar[Mapping[str, tuple[float, float]]]
    check: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    boundary: ClassVar[tuple[Boundary, ...]]

    @property
    def schema(self) -> RegimeSchema:
        """Fields and boundaries of the trajectories."""
        return RegimeSchema(self.name, self.fields, self.boundary)

    @property
    @abstractmethod
    def bounds(self) -> Bounds:
        """What no solution does; see `shodh.physics.bounds`."""

    def simulate(
        self,
        seeds: Sequence[int],
        grid: tuple[int, ...],
        frames: int,
        *,
        device: str = "cpu",
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Trajectories:
        """Solve ``len(seeds)`` trajectories; trajectory ``b`` depends on ``seeds[b]`` and the parameters alone."""
        if parameters:
            return replace(self, **parameters).simulate(seeds, grid, frames, device=device, progress=progress)
        check_request(self.name, seeds, grid, frames, ndim=self.schema.ndim)
        return self._solve(seeds, grid, frames, device, progress)

    @abstractmethod
    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        """Solve a request that was checked."""

    def require(self, key: str, fits: bool, what: str) -> None:
        """Refuse a parameter that does not fit: it "must ``what``"; raises `ConfigError`."""
        if not fits:
            raise ConfigError(f"{self.name}.{key}={getattr(self, key)} must {what}")

    def require_positive(self, *keys: str) -> None:
        """Refuse parameters that are not finite and positive."""
        check_positive(self.name, **self.values_of(*keys))

    def require_not_negative(self, *keys: str) -> None:
        """Refuse parameters that are not finite, or below zero."""
        for key in keys:
            self.require(key, 0 <= getattr(self, key) < math.inf, "be a number >= 0")

    def values_of(self, *keys: str) -> dict[str, float]:
        """Parameters by their names."""
        return {key: getattr(self, key) for key in keys}

    def trajectories(
        self,
        lengths: tuple[float, ...],
        values: dict[str, np.ndarray],
        parameters: Mapping[str, float | np.ndarray],
        diagnostics: Mapping[str, np.ndarray],
    ) -> Trajectories:
        """What was solved, with its frames ``frame_interval`` apart."""
        frames = values[self.schema.dynamic[0].name].shape[1]
        time = np.arange(frames) * self.frame_interval  # type: ignore[attr-defined]
        return Trajectories(self.schema, lengths, time, values, parameters, diagnostics)


def check_request(
    name: str, seeds: Sequence[int], grid: Sequence[int], frames: int, smallest: int = 4, ndim: int = 3
) -> None:
    """Refuse an empty batch, too small a grid, or no frame."""
    if not seeds:
        raise ConfigError(f"{name}: no seeds; ask for at least one trajectory")
    if len(grid) != ndim or min(grid) < smallest:
        numbers = {2: "two", 3: "three"}[ndim]
        raise ConfigError(f"{name}: grid {tuple(grid)} must be {numbers} numbers, each at least {smallest}")
    if frames < 1:
        raise ConfigError(f"{name}: frames={frames} must be at least 1")


def check_positive(name: str, **values: float) -> None:
    """Refuse parameters that are not finite and positive."""
    for key, value in values.items():
        if not (np.isfinite(value) and value > 0):
            raise ConfigError(f"{name}.{key}={value} must be a positive number")


def check_finite(name: str, seeds: Sequence[int], fields: Tensor, advice: str) -> None:
    """Refuse a blown-up state: ``fields [B, ...]`` must be finite; ``advice`` says what to change.

    Raises
    ------
    NonFiniteError
        Naming the regime and the first seed whose trajectory blew up.
    """
    bad = ~fields.flatten(1).isfinite().all(1)
    if bad.any():
        seed = seeds[int(bad.nonzero()[0])]
        raise NonFiniteError(f"{name}: the trajectory of seed {seed} blew up (NaN or infinity); {advice}")


def check_healthy(name: str, seeds: Sequence[int], healthy: Tensor, advice: str) -> None:
    """Refuse to go on when a trajectory is not ``healthy`` (bool ``[B]``); errors as `check_finite`."""
    good: list[bool] = healthy.tolist()
    if not all(good):
        seed = seeds[good.index(False)]
        raise NonFiniteError(f"{name}: the trajectory of seed {seed} blew up (no finite or sensible step); {advice}")


def smooth_noise(
    seed: int,
    purpose: str,
    shape: Sequence[int],
    lengths: Sequence[float],
    scales: Sequence[float],
    device: str | torch.device = "cpu",
) -> Tensor:
    """Periodic Gaussian noise of unit variance, fp64; drawn on the CPU, the same on any device to rounding.

    White noise on the grid, convolved with a Gaussian of standard deviation ``scales[i]`` along axis ``i`` (in the
    units of ``lengths``).
    """
    noise = torch.randn(*shape, generator=generator(seed, purpose), dtype=torch.float64).to(device)
    spectrum = torch.fft.fftn(noise)
    for axis, (n, length, scale) in enumerate(zip(shape, lengths, scales)):
        wavenumber = 2.0 * torch.pi * torch.fft.fftfreq(n, d=length / n, dtype=torch.float64, device=device)
        view = [1] * len(shape)
        view[axis] = n
        spectrum *= torch.exp(-0.5 * (scale * wavenumber) ** 2).view(view)
    spectrum.view(-1)[0] = 0.0
    smooth = torch.fft.ifftn(spectrum).real
    return smooth / smooth.std().clamp(min=1e-12)


def tracer_blobs(
    seed: int,
    shape: Sequence[int],
    lengths: Sequence[float],
    scales: Sequence[float],
    device: str | torch.device = "cpu",
) -> Tensor:
    """Smooth patches of dye between 0 and 1 (fp64): a logistic function of smooth noise."""
    return torch.sigmoid(3.0 * smooth_noise(seed, "tracer", shape, lengths, scales, device))
