"""Regime ``acoustics``: sound between two rigid walls in a medium of varying speed of sound.

``dp/dt = -c(x)^2 div v``, ``dv/dt = -grad p``: density 1, no losses, so the energy of a trajectory never changes. The
box is periodic along x and y and has rigid walls at both ends of z. Units: the longest edge and the slowest speed of
sound are 1.

A trajectory starts from random pressure and random irrotational velocity of equal energy, in a medium that varies
smoothly at random between ``1`` and ``contrast``. Scheme: :mod:`shodh.physics.solvers.acoustics`. The velocity is not
solenoidal, and is therefore called ``acoustic_velocity``; pressure and velocity have both signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shodh.physics.bounds import Bounds, Limit, Range
from shodh.physics.frames import FrameStore, run_frames
from shodh.physics.regime import Progress, Regime, smooth_noise
from shodh.physics.solvers.acoustics import SoundField, stable_steps, wave_rate
from shodh.physics.solvers.stability import Clock
from shodh.schema.fields import Field, Trajectories

PERIODIC = (True, True, False)


def walled_noise(seed: int, purpose: str, grid: Sequence[int], lengths: Sequence[float], scale: float) -> Tensor:
    """Smooth noise of unit variance ``[*grid]`` (fp64), periodic in x and y but not in z."""
    nx, ny, nz = grid
    noise = smooth_noise(seed, purpose, (nx, ny, 2 * nz), (*lengths[:2], 2 * lengths[2]), [scale] * 3)[..., :nz]
    return (noise - noise.mean()) / noise.std()


@dataclass(frozen=True)
class Acoustics(Regime):
    """Sound in a heterogeneous medium; the fields are its parameters.

    Parameters
    ----------
    contrast : float
        Largest over smallest speed of sound, >= 1.
    medium_scale : float
        Length scale of the medium, in longest edges.
    wave_scale : float
        Length scale of the initial pressure and velocity potential.
    frame_interval : float
        Time between frames.
    courant : float
        Upper bound of ``dt c sqrt(sum h^-2)``; 1 is the limit of stability.
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    contrast: float = 2.0
    medium_scale: float = 0.12
    wave_scale: float = 0.08
    frame_interval: float = 0.015
    courant: float = 0.8
    double: bool = False

    name = "acoustics"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"contrast": (1.0, 4.0), "wave_scale": (0.04, 0.2)}
    check: ClassVar[str] = "discrete dispersion relation; exact energy; reflection at an interface"
    fields = (
        Field("pressure"),
        Field("acoustic_velocity", kind="vector", placement="face"),
        Field("sound_speed", static=True),
    )
    boundary = ("periodic", "periodic", "wall")

    def __post_init__(self) -> None:
        self.require_positive("medium_scale", "wave_scale", "frame_interval", "courant")
        self.require("contrast", 1.0 <= self.contrast < math.inf, "be a number >= 1")
        self.require("courant", self.courant < 1.0, "be below 1, the limit of stability")

    @property
    def bounds(self) -> Bounds:
        """The scheme conserves its energy; the speed of sound is between 1 and ``contrast``."""
        return Bounds(
            (Range("sound_speed", 1.0 - 1e-5, self.contrast * (1.0 + 1e-5)),), limits=(Limit("energy_drift", 1e-3),)
        )

    def start(self, seeds: Sequence[int], grid: Sequence[int], spacing: float, device: str) -> SoundField:
        """The medium and the initial sound of each seed."""
        lengths = [n * spacing for n in grid]

        def noise(purpose: str, scale: float) -> Tensor:
            return torch.stack([walled_noise(seed, purpose, grid, lengths, scale) for seed in seeds])

        speed = 1.0 + (self.contrast - 1.0) * torch.sigmoid(2.0 * noise("medium", self.medium_scale))
        dtype = torch.float64 if self.double else torch.float32
        sound = SoundField(speed.to(device, dtype), (spacing,) * 3, PERIODIC)
        sound.pressure.copy_(noise("pressure", self.wave_scale))
        # The energies p^2 / 2 c^2 and v^2 / 2 start equal.
        pressure_energy = (sound.pressure.square() / sound.stiffness).flatten(1).mean(1)
        sound.velocity = sound.slope(noise("potential", self.wave_scale).to(device, dtype))
        kinetic_energy = sum(component.square().flatten(1).mean(1) for component in sound.velocity)
        scale = (pressure_energy / kinetic_energy).sqrt().view(-1, 1, 1, 1)
        for component in sound.velocity:
            component.mul_(scale)
        return sound

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        sound = self.start(seeds, grid, 1.0 / max(grid), device)
        # From the bound of the speed, not from the speed: a trajectory has the same steps in every batch.
        steps = stable_steps(self.frame_interval, self.contrast, sound.spacing, self.courant)
        dt = self.frame_interval / steps
        clock = Clock(len(seeds))
        if frames > 1:
            clock.record_equal(steps * (frames - 1), dt, wave_rate(self.contrast, sound.spacing))
        before = sound.energy(dt)
        store = FrameStore(self.schema, seeds, grid, frames, f"lower {self.name}.courant={self.courant:g}")
        store.put(0, sound_speed=sound.stiffness.sqrt().movedim(0, -1))

        def put(index: int) -> None:
            velocity = torch.stack(sound.velocity).movedim(1, -1)
            store.put(index, pressure=sound.pressure.movedim(0, -1), acoustic_velocity=velocity)

        run_frames(frames, put, lambda: sound.advance(self.frame_interval, steps), progress)
        return self.trajectories(
            tuple(n * sound.spacing[0] for n in grid),
            store.values,
            self.values_of("contrast", "wave_scale"),
            {
                "energy": before.double().cpu().numpy(),
                **clock.diagnostics(),
                "energy_drift": (sound.energy(dt) / before - 1.0).double().cpu().numpy(),
            },
        )
