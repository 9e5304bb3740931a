"""Regime ``heat``: heat conduction in a heterogeneous medium with travelling sources and sinks.

``dT/dt = div(k grad T) + q(x, t)`` in a periodic box; ``T`` is the deviation from the mean temperature and has both
signs. Units: the longest edge and the geometric mean of the extreme conductivities are 1 (unit heat capacity), and so
the time.

The conductivity is a smooth random mixture of two materials, bounded by ``contrast^(-1/2)`` and ``contrast^(1/2)``.
Half of the sources heat and half cool, each a Gaussian that crosses the box at a constant velocity of its own, so the
heat content stays what it was, and no trajectory runs out of life. The strength of a source makes ``T`` of order one.

A trajectory starts from smooth noise and is stored after ``spin_up``.

Scheme: harmonic means at the faces (:mod:`shodh.physics.solvers.conduction`), stabilised steps
(:mod:`shodh.physics.solvers.stabilized`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.core.seeding import generator
from shodh.physics.bounds import Bounds, Range
from shodh.physics.frames import FrameStore, run_frames
from shodh.physics.regime import Progress, Regime, smooth_noise
from shodh.physics.solvers.conduction import HeterogeneousDiffusion
from shodh.physics.solvers.stability import Clock, diffusion_rate
from shodh.physics.solvers.stabilized import legendre_step, legendre_steps, stability_limit
from shodh.schema.fields import Field, Trajectories

# Steepness of the passage from one material to the other: about a fifth of the inclusions' size.
SHARPNESS = 2.0
# Peak heating of a source, times its width squared.
PEAK = 4.0
# Standard deviations that the initial noise may reach.
INITIAL_REACH = 6.5
# Longest step: in times of diffusion over a source's width (error of a frame 2e-4), and in movements by that width.
MOST_DIFFUSION = 0.15
MOST_MOVEMENT = 0.25


def mixture(seed: int, grid: Sequence[int], lengths: Sequence[float], size: float, contrast: float) -> Tensor:
    """Conductivity ``[*grid]`` (fp64) of two materials in inclusions of about ``size``; ratio at most ``contrast``."""
    noise = smooth_noise(seed, "conductivity", grid, lengths, [0.35 * size] * len(grid))
    return contrast ** (0.5 * torch.tanh(SHARPNESS * noise))


class TravellingSources:
    """Gaussian sources (even) and sinks (odd) of zero sum; each trajectory's follow from its seed.

    The profile along each axis is periodic and has mean 1 on the grid, so the sum over all cells is zero to rounding.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        grid: Sequence[int],
        lengths: Sequence[float],
        count: int,
        width: float,
        speed: float,
    ) -> None:
        draws = [generator(seed, "sources") for seed in seeds]
        start = [torch.rand(count, 3, generator=draw, dtype=torch.float64) for draw in draws]
        heading = [torch.randn(count, 3, generator=draw, dtype=torch.float64) for draw in draws]
        pace = [0.5 + torch.rand(count, 1, generator=draw, dtype=torch.float64) for draw in draws]
        self._start = torch.stack(start) * torch.tensor(lengths, dtype=torch.float64)
        direction = torch.nn.functional.normalize(torch.stack(heading), dim=-1)
        self._velocity = speed * torch.stack(pace) * direction
        self._sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).double()[:, None]
        self.grid, self.lengths, self.width = tuple(grid), tuple(lengths), width

    def __call__(self, time: float, like: Tensor) -> Tensor:
        """Heating ``[B, *grid]`` at ``time``, with dtype and device of ``like``."""
        profiles = []
        for axis, (n, length) in enumerate(zip(self.grid, self.lengths)):
            x = (torch.arange(n, dtype=torch.float64) + 0.5) * length / n
            distance = x - (self._start + time * self._velocity)[..., axis, None]
            distance = distance - length * torch.round(distance / length)
            profile = torch.exp(-0.5 * (distance / self.width) ** 2)
            profiles.append(profile / profile.mean(-1, keepdim=True))
        first, second, third = (p.to(like.device, like.dtype) for p in (self._sign * profiles[0], *profiles[1:]))
        plane = torch.einsum("bsx,bsy->bxys", first, second)
        heating = plane.flatten(1, 2) @ third
        # Peak heating PEAK / width^2: over the conduction losses it gives a temperature of order one.
        peak = math.prod(length / (self.width * math.sqrt(2.0 * math.pi)) for length in self.lengths)
        return heating.view(len(heating), *self.grid).mul_(PEAK / (self.width**2 * peak))


@dataclass(frozen=True)
class Heat(Regime):
    """Conduction in a heterogeneous medium; the fields are its parameters.

    Parameters
    ----------
    contrast : float
        Largest over smallest conductivity, >= 1.
    inclusion_size : float
        Size of the inclusions, in longest edges.
    sources : int
        Sources and sinks together; an even number.
    source_width : float
        Standard deviation of their Gaussian.
    source_speed : float
        Mean speed; each has its own between half and one and a half times that.
    initial_scale : float
        Length scale of the random initial temperature.
    spin_up : float
        Time before the first frame.
    frame_interval : float
        Time between frames.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    contrast: float = 30.0
    inclusion_size: float = 0.25
    sources: int = 8
    source_width: float = 0.08
    source_speed: float = 4.0
    initial_scale: float = 0.1
    spin_up: float = 0.02
    frame_interval: float = 0.01
    double: bool = False

    name = "heat"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"contrast": (1.0, 100.0), "source_speed": (0.0, 10.0)}
    check: ClassVar[str] = "exact decay of a mode; layers in series (harmonic mean) and in parallel (arithmetic mean)"
    fields = (Field("temperature"), Field("conductivity", static=True))
    boundary = ("periodic", "periodic", "periodic")

    def __post_init__(self) -> None:
        self.require_positive("inclusion_size", "source_width", "initial_scale", "frame_interval")
        self.require("contrast", 1.0 <= self.contrast < math.inf, "be a number >= 1")
        self.require_not_negative("source_speed", "spin_up")
        self.require("sources", self.sources >= 0 and self.sources % 2 == 0, "be even: as many sinks as sources")

    @property
    def bounds(self) -> Bounds:
        """The initial noise and, by the maximum principle, ``PEAK / k`` of each steady source of one sign."""
        edge = self.contrast**0.5
        most = INITIAL_REACH + 0.5 * self.sources * PEAK * edge
        slack = 1.0 + 1e-5
        return Bounds((Range("temperature", -most, most), Range("conductivity", 1.0 / (edge * slack), edge * slack)))

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        spacing, dtype = (1.0 / max(grid),) * 3, torch.float64 if self.double else torch.float32
        lengths = tuple(n * spacing[0] for n in grid)
        media = [mixture(seed, grid, lengths, self.inclusion_size, self.contrast) for seed in seeds]
        noise = [smooth_noise(seed, "temperature", grid, lengths, [self.initial_scale] * 3) for seed in seeds]
        conductivity = torch.stack(media).to(device, dtype)
        temperature = torch.stack(noise).to(device, dtype)
        medium = HeterogeneousDiffusion(conductivity, spacing)
        heating = TravellingSources(seeds, grid, lengths, self.sources, self.source_width, self.source_speed)

        def tendency(state: Tensor, time: float) -> Tensor:
            rate = medium.tendency(state)
            return rate.add_(heating(time, rate)) if self.sources else rate

        # The bound holds for every seed, so that a trajectory has the same steps in every batch.
        radius = float(diffusion_rate(self.contrast**0.5, spacing))
        clock = Clock(len(seeds))
        most = MOST_DIFFUSION * self.source_width**2
        if self.source_speed:
            most = min(most, MOST_MOVEMENT * self.source_width / self.source_speed)

        def advance(time: float, interval: float) -> None:
            nonlocal temperature
            steps, stages = legendre_steps(interval, radius, most)
            clock.record_equal(steps, interval / steps, radius / stability_limit(stages))
            for step in range(steps):
                start = time + step * interval / steps
                temperature = legendre_step(tendency, temperature, start, interval / steps, stages)

        if self.spin_up:
            advance(-self.spin_up, self.spin_up)
        store = FrameStore(self.schema, seeds, grid, frames, f"lower {self.name}.contrast={self.contrast:g}")
        store.put(0, conductivity=conductivity.movedim(0, -1))
        starts = iter(range(frames))
        run_frames(
            frames,
            lambda index: store.put(index, temperature=temperature.movedim(0, -1)),
            lambda: advance(next(starts) * self.frame_interval, self.frame_interval),
            progress,
        )
        return self.trajectories(
            lengths,
            store.values,
            self.values_of("contrast", "source_speed"),
            {
                "temperature_mean": temperature.double().mean((1, 2, 3)).cpu().numpy(),
                "temperature_std": store.values["temperature"].std((1, 2, 3, 4), dtype=np.float64),
                "conductivity_mean": conductivity.double().mean((1, 2, 3)).cpu().numpy(),
                **clock.diagnostics(),
            },
        )
