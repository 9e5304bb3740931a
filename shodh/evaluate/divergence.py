"""Divergence of decoded velocity, measured with the decode's own operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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
        #: Of each window: largest value, mean square, mean square of the velocity gradient; on the device.
        self._parts: dict[str, list[Tensor]] = {}

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
        gradient = torch.stack(
            [
                (velocity.diff(dim=2 + axis).double() / relative[axis] * unit).square().flatten(1).mean(1)
                for axis in range(3)
            ]
        ).sum(0)
        largest, square = div.abs().flatten(1).amax(1).double(), div.double().square().flatten(1).mean(1)
        self._parts.setdefault(name, []).append(torch.stack((largest, square, gradient)))

    def parts(self) -> dict[str, np.ndarray]:
        """What was measured so far, of each window; `divergence_of` puts those of all ranks together."""
        return {name: torch.cat(parts, 1).cpu().numpy() for name, parts in self._parts.items()}


def divergence_of(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Maximum, root mean square, maximum over gradient, by field and mode; the same for any ranks and batches."""
    out: dict[str, Any] = {"operator": DIVERGENCE_OPERATOR, "units": "velocity units / length units of the file"}
    for name in dict.fromkeys(name for part in parts for name in part):
        largest, square, gradient = np.concatenate([part[name] for part in parts if name in part], 1)
        # Exact sums: the same in any order.
        rms, steepest = (math.sqrt(math.fsum(values) / len(values)) for values in (square, gradient))
        top = float(largest.max())
        out[name] = {"max": top, "rms": rms, "max_over_gradient": top / steepest if steepest else math.nan}
    return out
