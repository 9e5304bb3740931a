"""What the spectral regimes share: parameters of the run, the loop over frames, diagnostics, and the way to store."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import ConfigError
from shodh.physics.bounds import Energy, Range
from shodh.physics.frames import FrameStore
from shodh.physics.regime import Progress, Regime, check_positive
from shodh.physics.solvers.operators import divergence
from shodh.physics.solvers.spectral import COURANT_LIMIT, BlowUp, Equations, SpectralGrid, advance
from shodh.physics.solvers.stability import Clock
from shodh.schema.fields import Boundary, Field, RegimeSchema, Trajectories

VELOCITY = Field("velocity", kind="vector", placement="face", solenoidal=True)
PRESSURE = Field("pressure")
TRACER = Field("tracer")
# A tracer that starts between 0 and 1. Spectral schemes are not limited: at marginal resolution they overshoot.
# Advection of the truncated field conserves its variance, so that diffusion can only lower it.
TRACER_RANGE = Range("tracer", -0.5, 1.5)
TRACER_ENERGY = Energy("tracer", ("tracer",))
KINETIC_ENERGY = Energy("kinetic", ("velocity",))

# How the values of a diagnostic at the frames become one number: the last word of its name says it.
_REDUCTIONS: dict[str, Callable[..., Tensor]] = {"max": Tensor.amax, "min": Tensor.amin, "mean": Tensor.mean}


@dataclass(frozen=True)
class SpectralRegime(Regime):
    """A regime on a periodic box, solved by :mod:`shodh.physics.solvers.spectral`.

    Parameters
    ----------
    frame_interval : float
        Time between frames.
    spin_up : float
        Time before the first frame.
    courant : float
        Target of ``dt sum_i |u_i| / h_i``; stable below 1.35.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    frame_interval: float = 1.0
    spin_up: float = 0.0
    courant: float = 0.8
    double: bool = False

    name: ClassVar[str]
    ranges: ClassVar[Mapping[str, tuple[float, float]]]
    check: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]

    def __post_init__(self) -> None:
        check_positive(self.name, frame_interval=self.frame_interval, courant=self.courant)
        if not 0 <= self.spin_up < math.inf:
            raise ConfigError(f"{self.name}.spin_up={self.spin_up} must be a number >= 0")
        if self.courant >= COURANT_LIMIT:
            raise ConfigError(
                f"{self.name}.courant={self.courant} must be below {COURANT_LIMIT:.2f}, the limit of stability"
            )

    @property
    def schema(self) -> RegimeSchema:
        """Fields; periodic along all axes."""
        periodic: Boundary = "periodic"
        return RegimeSchema(self.name, self.fields, (periodic,) * len(self.lengths))

    @property
    def lengths(self) -> tuple[float, ...]:
        """Box along each axis."""
        return (2.0 * math.pi,) * 3

    @property
    @abstractmethod
    def constants(self) -> dict[str, float]:
        """Physical parameters stored with the trajectories."""

    @abstractmethod
    def equations(self, space: SpectralGrid) -> Equations:
        """What is solved."""

    @abstractmethod
    def initial(self, space: SpectralGrid, seed: int) -> Tensor:
        """State of one trajectory before the spin-up, ``[C, *modes]`` (complex128, CPU)."""

    def release(self, space: SpectralGrid, seed: int) -> Tensor | None:
        """Fields that join the state at the first frame, ``[C, *modes]`` (complex128, CPU), if any."""
        return None

    @abstractmethod
    def stored(self, equations: Any, state: Tensor) -> dict[str, Tensor]:
        """The fields of the schema: scalars ``[B, *grid]``, vectors ``[B, 3, *grid]``."""

    @abstractmethod
    def diagnose(self, equations: Any, state: Tensor) -> dict[str, Tensor]:
        """Diagnostics of a frame, ``[B]`` each; names end in ``_max``, ``_min`` or ``_mean`` (over the frames)."""

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        return _Run(self, seeds, grid, frames, device, progress or (lambda fraction: None)).solve()


class _Run:
    """One batch under way."""

    def __init__(
        self,
        regime: SpectralRegime,
        seeds: Sequence[int],
        grid: tuple[int, ...],
        frames: int,
        device: str,
        progress: Progress,
    ) -> None:
        self.regime, self.seeds, self.frames, self.progress = regime, seeds, frames, progress
        dtype = torch.float64 if regime.double else torch.float32
        self.space = SpectralGrid(grid, regime.lengths, dtype, device)
        self.equations = regime.equations(self.space)
        self.state = self._on_device(torch.stack([regime.initial(self.space, seed) for seed in seeds]))
        remedy = f"use a finer grid, a higher viscosity, or a lower {regime.name}.courant (now {regime.courant})"
        self.frame_store = FrameStore(regime.schema, seeds, grid, frames, remedy)
        self.history: dict[str, list[Tensor]] = {}
        self.clock = Clock(len(seeds), self.space.device)

    def _on_device(self, spectrum: Tensor) -> Tensor:
        spectrum = spectrum.to(self.space.device, self.space.dtype.to_complex())
        return spectrum * self.space.kept

    def solve(self) -> Trajectories:
        """Spin up, then store every frame."""
        regime = self.regime
        parts = math.ceil(regime.spin_up / regime.frame_interval - 1e-9)
        total = parts + self.frames
        for index in range(parts):
            self.advance(regime.spin_up / parts)
            self.progress((index + 1) / total)
        late = [regime.release(self.space, seed) for seed in self.seeds]
        if late[0] is not None:
            joined = torch.stack([fields for fields in late if fields is not None])
            self.state = torch.cat((self.state, self._on_device(joined)), dim=1)
        for index in range(self.frames):
            if index:
                self.advance(regime.frame_interval)
            self.store(index)
            self.progress((parts + index + 1) / total)
        return self.trajectories()

    def advance(self, interval: float) -> None:
        """Advance all trajectories; a blow-up is reported with its seed."""
        regime = self.regime
        try:
            self.state = advance(self.equations, self.state, interval, regime.courant, self.clock)
        except BlowUp as error:
            self.frame_store.check(torch.arange(len(self.seeds)) != error.index)

    def store(self, index: int) -> None:
        """Store frame ``index`` and take its diagnostics."""
        regime = self.regime
        found = regime.diagnose(self.equations, self.state)
        for name, field in regime.stored(self.equations, self.state).items():
            values = field.float()
            self.frame_store.put(index, **{name: values.movedim(0, -1)})
            if regime.schema[name].solenoidal:
                rest = divergence(values.double().unbind(1), self.space.spacing, first=1)
                key = "divergence_max" if name == "velocity" else f"{name}_divergence_max"
                found[key] = rest.abs().flatten(1).amax(1)
        for key, value in found.items():
            self.history.setdefault(key, []).append(value.double().cpu())

    def trajectories(self) -> Trajectories:
        """Everything stored, with parameters and diagnostics."""
        regime = self.regime
        series = {key: torch.stack(values) for key, values in self.history.items()}
        diagnostics = {key: _REDUCTIONS[key.rsplit("_", 1)[1]](s, 0).numpy() for key, s in series.items()}
        return Trajectories(
            schema=regime.schema,
            lengths=regime.lengths,
            time=np.arange(self.frames) * regime.frame_interval,
            values=self.frame_store.values,
            parameters=regime.constants,
            diagnostics={**diagnostics, **self.clock.diagnostics()},
        )
