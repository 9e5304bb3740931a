"""Divergence of decoded velocity, measured with the decode's own operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shodh.models.tokenizer import Potential, relative_spacing
from shodh.ops import decode_velocity, divergence, face_flux
from shodh.schema.space import Space

DIVERGENCE_OPERATOR = "staggered, sum_i (u_i[c] - u_i[c - e_i]) / h_i, component i on the upper face of its cell"


class DivergenceMeter:
    """Divergence of decoded velocity in physical units, mode by mode; see `DIVERGENCE_OPERATOR`.

    ``fp32``: decoded and stored in float32. ``fp64``: the same float32 potential decoded in float64. ``exact``: float32
    with the potential rounded to a lattice; zero to the last bit where the ratios of cell sizes are powers of two.
    ``exact_flux``: the net volume flux out of each cell of the same field, zero for every ratio (see
    `shodh.ops.decode_velocity`). Each as maximum, root mean square, and the maximum over the root mean square of the
    velocity gradient (a pure number, which does not depend on units).
    """

    def __init__(self, space: Space, number: int, grid: Sequence[int]) -> None:
        self._domain = space.domains[number]
        self._spacing = self._domain.spacing(grid)
        constants = space.constants(number)
        self._scale = {f.name: constants[f.name][1] for f in space.fields_of(number)}
        self._max: dict[str, float] = {}
        self._square: dict[str, list[float]] = {}

    def add(self, potentials: Mapping[str, Potential]) -> None:
        """Potentials of a batch, float32, model units."""
        for name, (potential, harmonic) in potentials.items():
            relative = relative_spacing(self._domain, potential.shape[2:])
            for mode in ("fp32", "fp64", "exact"):
                dtype = torch.float64 if mode == "fp64" else torch.float32
                a = potential.to(dtype)
                h = None if harmonic is None else harmonic.to(dtype)
                u = decode_velocity(a, h, spacing=relative, boundary=self._domain.boundary, exact=mode == "exact")
                u = u * self._scale[name]
                self._measure(f"{name}/{mode}", u, relative)
                if mode == "exact":
                    self._measure(f"{name}/exact_flux", u, relative)

    def _measure(self, name: str, velocity: Tensor, relative: tuple[float, float, float]) -> None:
        # Differences are taken with the relative spacing the field was made with and rescaled to true lengths: in
        # exact arithmetic the same number, and in float32 the one whose rounding the decode controls.
        unit = relative[0] / self._spacing[0]
        boundary = self._domain.boundary
        if name.endswith("/exact_flux"):
            div = divergence(face_flux(velocity, spacing=relative), boundary=boundary) * (unit / max(relative))
        else:
            div = divergence(velocity, spacing=relative, boundary=boundary) * unit
        gradient = sum(
            (velocity.double().diff(dim=2 + axis) / relative[axis] * unit).square().mean() for axis in range(3)
        )
        self._max[name] = max(self._max.get(name, 0.0), float(div.abs().max()))
        self._square.setdefault(name, []).append(float(div.double().square().mean()))
        self._square.setdefault(f"{name}/gradient", []).append(float(gradient))

    def result(self) -> dict[str, Any]:
        out: dict[str, Any] = {"operator": DIVERGENCE_OPERATOR, "units": "velocity units / length units of the file"}
        for name, largest in self._max.items():
            squares, gradients = self._square[name], self._square[f"{name}/gradient"]
            rms = (sum(squares) / len(squares)) ** 0.5
            gradient_rms = (sum(gradients) / len(gradients)) ** 0.5
            out[name] = {"max": largest, "rms": rms, "max_over_gradient": largest / gradient_rms}
        return out
