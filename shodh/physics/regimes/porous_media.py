"""Regime ``porous_media``: creeping flow through voxel solids under a force that turns, with a tracer.

Equations. Steady Stokes flow ``-nu lap u + grad p = f(t)``, ``div u = 0``, no-slip on the solids, in a periodic box.
The force changes slowly against the viscous time of a pore (small Womersley number, the rule in rocks and filters), so
the flow follows it quasi-steadily, and because Stokes flow is linear it is the superposition of three unit flows that
:mod:`shodh.physics.solvers.stokes` solves once a geometry. Inertia is neglected. The tracer obeys
``dc/dt + div(u c) = D lap c`` in the pores with zero flux into the solids (:mod:`shodh.physics.solvers.scalar`).

Units: the longest edge of the box is 1. Velocity is in units of the root-mean-square pore velocity for a force of unit
strength, averaged over its directions; time follows. The permeability of each sample, in squares of the longest edge,
is stored with it, so a user recovers physical units from ``u = K f / mu``.

The force has unit strength on average. Its direction turns in a plane that is random for each trajectory, at a rate
that wanders about ``drive_rate``, and leaves the plane a little; its strength varies by 30 %.

The stored velocity is divergence-free on the staggered grid to fp32 rounding and exactly zero on and inside solids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import ConfigError, DataError
from shodh.core.seeding import generator, stable_seed
from shodh.physics.bounds import Bounds
from shodh.physics.geometry import GENERATORS, Solid, crop_image, load_image, pore_space
from shodh.physics.regime import FIELDS, Progress, Regime, tracer_blobs
from shodh.physics.solvers.operators import divergence, fill_periodic, inner, padded_like
from shodh.physics.solvers.poisson import closed_faces
from shodh.physics.solvers.scalar import SSP_RK2, TRACER_RANGE, ScalarTransport
from shodh.physics.solvers.stability import REAL_RK2, Clock, advection_rate
from shodh.physics.solvers.stokes import StokesSolver
from shodh.schema.fields import Trajectories

ATTEMPTS = 50
# The step is chosen anew after at most this angle of the force's turn, at whose ends and middle the velocity is known,
# and from a velocity this much larger than it is there.
MOST_TURN = 0.3
MARGIN = 1.1


@dataclass(frozen=True)
class PorousMedia(Regime):
    """Stokes flow in porous media; the fields are its parameters.

    Parameters
    ----------
    geometry : {"mixed", "spheres", "blobs", "image"}
        ``"mixed"`` draws spheres or blobs for each trajectory.
    porosity_min, porosity_max : float
        Range of the porosity before isolated pores are filled.
    grain : float
        Size of the grains, in longest edges of the box.
    image : str
        A ``.npy``, ``.raw`` or ``.tif`` file; each trajectory uses a random sub-volume of the grid's size, which is
        treated as periodic. Giving one implies ``geometry="image"``.
    image_shape : 3 ints, optional
    image_dtype : str, optional
    pore_value : float, optional
        See :func:`shodh.physics.geometry.load_image`.
    frame_interval : float
        Time between frames; in the default 0.1 the flow moves 3 cells of a 32^3 grid.
    drive_rate : float
        Mean angular rate of the force.
    peclet : float
        ``U * grain / D`` of the tracer, with ``U = 1``.
    tracer_scale : float
        Size of the patches of dye, in longest edges.
    courant : float
        Courant number of the tracer's steps.
    tolerance : float
        Relative residual of the Stokes solver.
    max_iterations : int
    double : bool
        Solve in fp64 (fields are stored in fp32 all the same).
    """

    geometry: str = "mixed"
    porosity_min: float = 0.5
    porosity_max: float = 0.8
    grain: float = 0.25
    image: str = ""
    image_shape: tuple[int, int, int] | None = None
    image_dtype: str | None = None
    pore_value: float | None = None
    frame_interval: float = 0.1
    drive_rate: float = 3.0
    peclet: float = 200.0
    tracer_scale: float = 0.2
    courant: float = 0.8
    tolerance: float = 1e-5
    max_iterations: int = 2000
    double: bool = False

    name = "porous_media"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"porosity_min": (0.4, 0.8), "grain": (0.15, 0.4)}
    check: ClassVar[str] = "drag of simple cubic arrays of spheres (Zick and Homsy 1982)"
    fields = FIELDS
    boundary = ("periodic", "periodic", "periodic")

    def __post_init__(self) -> None:
        if self.image and self.geometry == "mixed":
            object.__setattr__(self, "geometry", "image")
        kinds = ("mixed", *GENERATORS, "image")
        if self.geometry not in kinds:
            raise ConfigError(f"{self.name}.geometry={self.geometry!r} is not one of {', '.join(kinds)}")
        if (self.geometry == "image") != bool(self.image):
            raise ConfigError(f'{self.name}: geometry="image" and an image file go together')
        if not 0.0 < self.porosity_min <= self.porosity_max < 1.0:
            raise ConfigError(
                f"{self.name}: need 0 < porosity_min <= porosity_max < 1, "
                f"not {self.porosity_min} and {self.porosity_max}"
            )
        self.require_positive("grain", "frame_interval", "peclet", "tracer_scale")
        self.require_positive("courant", "tolerance", "max_iterations")
        self.require("courant", self.courant <= 1.0, "not exceed 1: the tracer would overshoot")

    @property
    def bounds(self) -> Bounds:
        """The tracer keeps its initial range."""
        return Bounds((TRACER_RANGE,))

    @cached_property
    def _image(self) -> Solid:
        return load_image(self.image, self.image_shape, self.image_dtype, self.pore_value)

    def make_solid(self, seed: int, grid: tuple[int, ...]) -> Solid:
        """A percolating geometry ``[X, Y, Z]`` (bool, True in the solid); the same for the same seed and grid."""
        draw = generator(seed, "geometry")
        for attempt in range(ATTEMPTS):
            porosity, choice = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
            part = stable_seed(seed, "attempt", attempt)
            if self.geometry == "image":
                solid = crop_image(self._image, part, grid)
            else:
                kinds = tuple(GENERATORS) if self.geometry == "mixed" else (self.geometry,)
                porosity = self.porosity_min + porosity * (self.porosity_max - self.porosity_min)
                solid = GENERATORS[kinds[int(choice * len(kinds))]](part, grid, porosity, self.grain)
            connected = pore_space(solid)
            if connected is not None and connected.any():
                return connected
        where = self.image or f"porosity {self.porosity_min}..{self.porosity_max}, grain {self.grain}"
        message = f"{self.name}: none of {ATTEMPTS} geometries of {grid} voxels percolates along all axes ({where})"
        raise DataError(message) if self.image else ConfigError(f"{message}; raise porosity_min or the grid")

    def _solve(
        self, seeds: Sequence[int], grid: tuple[int, ...], frames: int, device: str, progress: Progress | None
    ) -> Trajectories:
        run = _Run(self, seeds, grid, device, progress or (lambda fraction: None))
        run.solve_flows()
        run.start_tracer()
        for index in range(frames):
            if index:
                run.advance_frame()
            run.store(index, frames)
        return run.trajectories()


class Drive:
    """A smooth random force ``a(t)`` for each seed; see the module's docstring."""

    def __init__(self, seeds: Sequence[int], rate: float) -> None:
        draws = [torch.rand(6, generator=generator(seed, "drive"), dtype=torch.float64) for seed in seeds]
        axes = [torch.randn(3, 3, generator=generator(seed, "plane"), dtype=torch.float64) for seed in seeds]
        self._uniform = torch.stack(draws)
        self._basis = torch.linalg.qr(torch.stack(axes)).Q
        self.rate = rate

    def __call__(self, time: Tensor) -> Tensor:
        """Force ``[..., B, 3]`` at ``time [..., B]``, fp64."""
        r = self._uniform
        phase = 2.0 * math.pi * r
        sense = torch.where(r[:, 5] < 0.5, -1.0, 1.0)
        angle = phase[:, 0] + sense * self.rate * (0.75 + 0.5 * r[:, 1]) * time
        angle = angle + 0.5 * torch.sin(0.5 * self.rate * time + phase[:, 2])
        tilt = 0.4 * torch.sin(0.7 * self.rate * time + phase[:, 3])
        strength = 1.0 + 0.3 * torch.sin(0.6 * self.rate * time + phase[:, 4])
        local = torch.stack((torch.cos(angle) * torch.cos(tilt), torch.sin(angle) * torch.cos(tilt), torch.sin(tilt)))
        return strength[..., None] * torch.einsum("bij,j...b->...bi", self._basis, local)


class _Run:
    """One batch under way."""

    def __init__(
        self, regime: PorousMedia, seeds: Sequence[int], grid: tuple[int, ...], device: str, progress: Progress
    ) -> None:
        self.regime, self.seeds, self.grid, self.device, self.progress = regime, seeds, grid, device, progress
        self.dtype = torch.float64 if regime.double else torch.float32
        self.spacing = (1.0 / max(grid),) * 3
        masks = [torch.from_numpy(regime.make_solid(seed, grid)) for seed in seeds]
        self.solid = torch.stack(masks).to(device)
        self.drive = Drive(seeds, regime.drive_rate)
        self.time = 0.0
        self.values: dict[str, np.ndarray] = {}

    def solve_flows(self) -> None:
        """Unit flows, scaled to unit rms pore velocity, ``[3 (drive), 3, X, Y, Z, B]`` in fp64."""
        regime = self.regime
        solver = StokesSolver(
            self.solid,
            self.spacing,
            tolerance=regime.tolerance,
            max_iterations=regime.max_iterations,
            dtype=self.dtype,
        )
        flows = solver.unit_flows()
        self.residual, self.permeability = flows.residual, flows.permeability
        if not (float(flows.residual.max()) <= 10.0 * regime.tolerance):
            raise ConfigError(
                f"porous_media: the Stokes solver stopped at a residual of {float(flows.residual.max()):.1e} "
                f"(tolerance {regime.tolerance:.1e}); raise porous_media.max_iterations or set porous_media.double"
            )
        pores = (~self.solid).flatten(1).sum(1)
        square = flows.velocity.square().sum((0, 2, 3, 4, 5)) / (3.0 * pores)
        self.scale = square.sqrt()
        self.basis = (flows.velocity / self.scale.view(1, -1, 1, 1, 1, 1)).permute(0, 2, 3, 4, 5, 1).contiguous()
        self.progress(0.5)

    def velocity(self, force: Tensor) -> Tensor:
        """Velocity ``[3, X, Y, Z, B]`` (fp64) in a force ``[B, 3]``."""
        total = self.basis[0] * force[:, 0]
        return total.addcmul_(self.basis[1], force[:, 1]).addcmul_(self.basis[2], force[:, 2])

    def start_tracer(self) -> None:
        """Put patches of dye into the pores and prepare the transport."""
        regime, batch = self.regime, len(self.seeds)
        open_faces = (~closed_faces(self.solid)).permute(1, 2, 3, 4, 0)
        self.tracer = ScalarTransport(
            self.grid,
            self.spacing,
            batch,
            regime.grain / regime.peclet,
            open_faces=open_faces,
            dtype=self.dtype,
            device=self.device,
        )
        lengths = [n * self.spacing[0] for n in self.grid]
        for b, seed in enumerate(self.seeds):
            dye = tracer_blobs(seed, self.grid, lengths, [regime.tracer_scale] * 3, self.device)
            self.tracer.values[..., b] = (dye * ~self.solid[b]).to(self.dtype)
        self._padded = padded_like(self.grid, batch, components=3, like=self.tracer.values)
        self.clock = Clock(batch)

    def advance_frame(self) -> None:
        """Carry the tracer to the next frame time."""
        interval = self.regime.frame_interval
        parts = math.ceil(interval * self.regime.drive_rate / MOST_TURN - 1e-9)
        for _ in range(parts):
            self._advance(interval / parts)

    def _advance(self, interval: float) -> None:
        """Carry the tracer on by ``interval``, each trajectory with equal steps of its own."""
        start = torch.full((len(self.seeds),), self.time, dtype=torch.float64)
        looks = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
        rates = []
        for force in self._forces(start + looks * interval):
            self._fill(force)
            rates.append(advection_rate(self._padded, self.spacing))
        rate = MARGIN * torch.stack(rates).amax(0)
        # Two stages have the maximum principle of the first-order scheme up to their limit of stability, 2 C + d = 2.
        stability = self.tracer.stability_rate(rate, REAL_RK2)
        wanted = self.tracer.stability_rate(rate / self.regime.courant, REAL_RK2)
        # The one wait for the device: everything that the steps need is known before the first.
        wanted, stability = torch.stack((wanted, stability)).double().cpu()
        count = torch.ceil(interval * wanted).clamp(min=1.0)
        index = torch.arange(int(count.max()), dtype=torch.float64)[:, None]
        steps = torch.where(index < count, interval / count, 0.0)
        forces = self._forces(start + torch.minimum(count - 0.5, index + 0.5) * (interval / count))
        for dt, force in zip(steps.to(self.device, self.dtype), forces, strict=True):
            self._fill(force)
            self.tracer.begin_step()
            for weight in SSP_RK2:
                self.tracer.stage(self._padded, weight, dt)
        for dt in steps:
            self.clock.record(dt, stability)
        self.time += interval

    def _forces(self, times: Tensor) -> Tensor:
        """Forces ``[n, B, 3]`` at ``times [n, B]``, on the device in one copy."""
        return self.drive(times).to(self.device)

    def _fill(self, force: Tensor) -> None:
        """Put the velocity in a force ``[B, 3]`` into the padded array."""
        inner(self._padded, first=1).copy_(self.velocity(force))
        for axis in range(3):
            fill_periodic(self._padded, axis + 1)

    def store(self, index: int, frames: int) -> None:
        """Copy frame ``index`` to ``[B, T, X, Y, Z(, 3)]`` arrays."""
        batch = len(self.seeds)
        if not self.values:
            self.values = {
                "velocity": np.empty((batch, frames, *self.grid, 3), dtype=np.float32),
                "tracer": np.empty((batch, frames, *self.grid), dtype=np.float32),
                "solid": self.solid.to(torch.uint8).cpu().numpy(),
            }
            self.divergence = torch.zeros(batch, dtype=torch.float64)
        velocity = self.velocity(self._forces(torch.full((1, batch), self.time, dtype=torch.float64))[0]).float()
        self.values["velocity"][:, index] = velocity.permute(4, 1, 2, 3, 0).cpu().numpy()
        self.values["tracer"][:, index] = self.tracer.values.permute(3, 0, 1, 2).float().cpu().numpy()
        rest = divergence(velocity.double().unbind(0), self.spacing, first=0).abs().flatten(0, 2).amax(0)
        self.divergence = torch.maximum(self.divergence, rest.cpu())
        self.progress(0.5 + 0.5 * (index + 1) / frames)

    def trajectories(self) -> Trajectories:
        """Everything stored, with parameters and diagnostics."""
        regime = self.regime
        permeability = self.permeability.cpu().numpy()
        porosity = 1.0 - self.values["solid"].mean((1, 2, 3))
        return regime.trajectories(
            tuple(n * self.spacing[0] for n in self.grid),
            self.values,
            {**regime.values_of("peclet", "drive_rate"), "porosity": porosity, "grain": regime.grain},
            {
                **{f"permeability_{axis}": permeability[:, i, i] for i, axis in enumerate("xyz")},
                "velocity_unit": self.scale.cpu().numpy(),
                "stokes_residual": self.residual.cpu().numpy(),
                "divergence_max": self.divergence.numpy(),
                **self.clock.diagnostics(),
            },
        )
