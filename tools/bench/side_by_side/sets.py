"""The data sets of the comparison, all two-dimensional: published recipes made anew by our solvers, and by ``exponax``.

A set is solved once and kept in The Well's format, ``data/NAME/data/{train,valid,test}/NAME.hdf5``.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shodh.core.seeding import stable_seed
from shodh.data import SPLITS, WellFile, write_trajectories
from shodh.generation.variation import join
from shodh.physics import get_regime
from shodh.schema.fields import Field, RegimeSchema, Trajectories, field_slices

#: ``(seeds, cells along an axis, frames, device)``.
Solve = Callable[[Sequence[int], int, int, str], Trajectories]

#: The (feed, kill) of The Well's gray_scott: gliders, maze, worms, spirals, spots. Its bubbles, (.098, .057), die out
#: from our initial patches, and a field that does not vary has no VRMSE.
PATTERNS = ((0.014, 0.054), (0.029, 0.057), (0.058, 0.065), (0.018, 0.051), (0.030, 0.062))


def _regime(
    name: str, parameters: Mapping[str, Any], seeds: Sequence[int], n: int, frames: int, device: str
) -> Trajectories:
    return get_regime(name, **parameters).simulate(seeds, (n, n), frames, device=device)


def _gray_scott(seeds: Sequence[int], n: int, frames: int, device: str) -> Trajectories:
    """Five patterns in turn, at The Well's spacing (128 cells across a box of 2), in a smaller box."""
    box = {"length": n / 64, "patch_size": min(0.2, n / 320)}
    parts = []
    for number, (feed, kill) in enumerate(PATTERNS):
        if own := seeds[number :: len(PATTERNS)]:
            parts.append(_regime("gray_scott_2d", {"feed": feed, "kill": kill, **box}, own, n, frames, device))
    return join(parts, {})


def _navier_stokes(seeds: Sequence[int], n: int, frames: int, device: str) -> Trajectories:
    """Solved on a grid twice as fine (64 cells at least), of which every second point is kept, as FNO's authors did."""
    step = max(2, 64 // n)
    solved = _regime("vorticity_2d", {"viscosity": 1e-5}, seeds, step * n, frames, device)
    values = {"vorticity": solved.values["vorticity"][..., ::step, ::step]}
    return Trajectories(solved.schema, solved.lengths, solved.time, values, solved.parameters, solved.diagnostics)


def _plane(
    name: str, parameters: Mapping[str, Any], depth: float, seeds: Sequence[int], n: int, frames: int, device: str
) -> Trajectories:
    """A three-dimensional regime in a slab so thin along y, ``depth`` cells, that it stays two-dimensional."""
    regime = get_regime(name, **parameters, length_y=depth)
    solved = regime.simulate(seeds, (n, 4, n), frames, device=device)
    fields, values = [], {}
    for given in solved.schema.dynamic:
        plane = solved.values[given.name][:, :, :, 0]
        vector = given.kind == "vector"
        fields.append(Field(given.name, kind=given.kind))
        values[given.name] = np.ascontiguousarray(plane[..., [0, 2]] if vector else plane)
    boundary = solved.schema.boundary
    schema = RegimeSchema(name, tuple(fields), (boundary[0], boundary[2]))
    lengths = (solved.lengths[0], solved.lengths[2])
    return Trajectories(schema, lengths, solved.time, values, solved.parameters)


@dataclass(frozen=True)
class Scenario:
    """One of ``exponax``'s equations: its stepper, steps between frames and before the first one, and the start.

    The box is ``extent`` wide, or so wide for 32 cells where patterns have a wavelength of their own (``grows``).
    """

    stepper: str
    extent: float
    step: float
    between: int
    before: int = 0
    amplitude: float = 1.0
    mean: float = 1.0  # largest of the initial field, over its amplitude
    settings: tuple[tuple[str, Any], ...] = ()
    components: int = 1
    grows: bool = False

    def __call__(self, seeds: Sequence[int], n: int, frames: int, device: str) -> Trajectories:
        import exponax
        import jax
        from jax import numpy as jnp

        kind: Any = exponax.stepper
        for part in self.stepper.split("."):
            kind = getattr(kind, part)
        extent = self.extent * n / 32 if self.grows else self.extent
        stepper = kind(2, extent, n, self.step, **dict(self.settings))
        draw = exponax.ic.RandomTruncatedFourierSeries(
            2, cutoff=5, max_one=True, offset_range=(-0.5 * self.mean, 0.5 * self.mean)
        )
        rollout = exponax.rollout(exponax.repeat(stepper, self.between), frames - 1, include_init=True)

        @jax.jit
        def solve(key: Any) -> Any:
            parts = [draw(n, key=part) for part in jax.random.split(key, self.components)]
            state = self.amplitude * jnp.concatenate(parts)
            return rollout(exponax.repeat(stepper, self.before)(state) if self.before else state)

        solved = np.stack([np.asarray(solve(jax.random.PRNGKey(seed % 2**31))) for seed in seeds])
        vector = self.components > 1
        name = "velocity" if vector else "state"
        values = {name: np.ascontiguousarray(np.moveaxis(solved, 2, -1) if vector else solved[:, :, 0], np.float32)}
        schema = RegimeSchema("exponax", (Field(name, kind="vector" if vector else "scalar"),), ("periodic",) * 2)
        time = np.arange(frames) * self.step * self.between
        return Trajectories(schema, (extent,) * 2, time, values)


@dataclass(frozen=True)
class DataSet:
    """One data set: whose recipe it is, and how it is solved."""

    label: str
    recipe: str
    solve: Solve
    modules: tuple[str, ...] = ()
    periodic: bool = True

    @property
    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]


def _ours(label: str, recipe: str, name: str, periodic: bool = True, **parameters: Any) -> DataSet:
    return DataSet(label, recipe, partial(_regime, name, parameters), periodic=periodic)


def _exponax(label: str, recipe: str, scenario: Scenario) -> DataSet:
    return DataSet(label, recipe, scenario, ("exponax", "jax"))


SETS: dict[str, DataSet] = {
    "gray_scott": DataSet("Gray-Scott", "The Well: five of its six (F, k), 10 units a frame", _gray_scott),
    "shear_flow": DataSet(
        "shear flow",
        "The Well's shear_flow, reduced: two tanh layers with a tracer, Re 200 of half a layer (there 1e4 to 5e5 of "
        "the box)",
        partial(_plane, "shear_layer", {"reynolds": 200.0, "schmidt": 1.0}, 0.5),
    ),
    "rayleigh_benard": DataSet(
        "Rayleigh-Benard",
        "The Well's rayleigh_benard, reduced: Ra 3e5, Pr 1 (there Ra 1e6 to 1e10), box 2 x 1",
        partial(_plane, "rayleigh_benard", {}, 0.1),
        periodic=False,
    ),
    "navier_stokes": DataSet(
        "Navier-Stokes 1e-5", "FNO (2010.08895): vorticity, viscosity 1e-5, unit time a frame", _navier_stokes
    ),
    "diffusion_reaction": _ours(
        "diffusion-reaction",
        "PDEBench 2-D: FitzHugh-Nagumo from noise, every fifth of its frames",
        "diffusion_reaction_2d",
        periodic=False,
        frame_interval=0.25,
    ),
    "dam_break": _ours(
        "dam break",
        "PDEBench: radial dam break, height and discharge, every fifth of its frames",
        "shallow_water_2d",
        periodic=False,
        frame_interval=0.05,
    ),
    "compressible": _ours("compressible flow", "PDEBench 2-D (M .1, eta = zeta .01), random fields", "compressible_2d"),
    "exponax_burgers": _exponax(
        "Burgers (exponax)",
        "exponax: two components, diffusivity .003",
        Scenario("Burgers", 1.0, 0.005, 4, settings=(("diffusivity", 3e-3),), components=2),
    ),
    "exponax_kolmogorov": _exponax(
        "Kolmogorov flow (exponax)",
        "exponax: forced vorticity, diffusivity .01, developed",
        Scenario(
            "KolmogorovFlowVorticity",
            2 * math.pi,
            0.02,
            10,
            before=300,
            amplitude=3.0,
            mean=0.0,
            settings=(("diffusivity", 1e-2),),
        ),
    ),
    "exponax_kuramoto": _exponax(
        "Kuramoto-Sivashinsky (exponax)",
        "exponax: box of 30 for 32 cells, developed",
        Scenario("KuramotoSivashinsky", 30.0, 0.1, 5, before=500, grows=True),
    ),
    "exponax_swift": _exponax(
        "Swift-Hohenberg (exponax)",
        "exponax: box of 10 pi for 32 cells, growing pattern",
        Scenario("reaction.SwiftHohenberg", 10 * math.pi, 0.1, 3, before=5, grows=True),
    ),
}


def path_of(folder: Path, name: str, split: str) -> Path:
    """The file of a split."""
    return folder / name / "data" / split / f"{name}.hdf5"


def make(folder: Path, name: str, grid: int, frames: int, counts: Mapping[str, int], device: str) -> None:
    """Solve what is missing of a set; each file is whole or absent."""
    for split in SPLITS:
        path = path_of(folder, name, split)
        if not path.exists():
            seeds = [stable_seed("peers", name, split, number) for number in range(counts[split])]
            write_trajectories(path, SETS[name].solve(seeds, grid, frames, device))


@dataclass(frozen=True)
class Data:
    """Normalised trajectories ``[N, T, C, n, n]`` of each split, channels of the fields, and physical constants."""

    splits: Mapping[str, Tensor]
    fields: Mapping[str, slice]
    mean: Tensor
    scale: Tensor

    @property
    def channels(self) -> int:
        return len(self.mean)


def read(folder: Path, name: str) -> Data:
    """A set that was made; mean by channel and standard deviation by field, of the training split."""
    raw, fields = {}, {}
    for split in SPLITS:
        with WellFile(path_of(folder, name, split)) as file:
            dynamic = [field for field in file.fields.values() if not field.static]
            fields = field_slices(dynamic, 2)
            shape = (file.num_trajectories, file.num_frames, sum(f.num_components(2) for f in dynamic), *file.grid)
            values = np.empty(shape, np.float32)
            for field in dynamic:
                for trajectory in range(len(values)):
                    out = values[trajectory][:, fields[field.name]]
                    file.read(field.name, trajectory, range(file.num_frames), out)
            raw[split] = torch.from_numpy(values)
    mean = raw["train"].double().mean((0, 1, 3, 4)).float()
    scale = torch.empty_like(mean)
    centred = raw["train"] - mean.view(-1, 1, 1)
    for channels in fields.values():
        scale[channels] = centred[:, :, channels].double().std().float().clamp(min=1e-12)
    splits = {split: (x - mean.view(-1, 1, 1)) / scale.view(-1, 1, 1) for split, x in raw.items()}
    return Data(splits, fields, mean, scale)
