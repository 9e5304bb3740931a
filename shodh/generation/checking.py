"""Whether trajectories keep the bounds of their regime, and what they span: checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shodh.core.errors import UnstableError
from shodh.physics import Regime
from shodh.physics.bounds import STABLE, Energy, Range
from shodh.schema.fields import Field, Trajectories

Report = dict[str, dict[str, Any]]


def check(regime: Regime, trajectories: Trajectories, names: Sequence[str]) -> list[Report]:
    """Ranges, energies and divergence of each trajectory; refuses one that leaves the bounds of the regime.

    Parameters
    ----------
    regime : Regime
    trajectories : Trajectories
    names : sequence of str
        What the trajectories are called in an error.

    Returns
    -------
    list of dict
        For each trajectory ``ranges`` ``{field: [minima, maxima]}`` (one a component), ``energy`` ``{name: [first,
        last]}``, ``divergence`` ``{field: largest, over sum_i max(|u_i|, speed) / h_i}``, ``solver`` ``{diagnostic:
        value}``.

    Raises
    ------
    UnstableError
        Naming regime, trajectory, time, value and bound of what is outside first in time.
    """
    return [_Trajectory(regime, trajectories, b, name).report() for b, name in enumerate(names)]


class _Trajectory:
    """One trajectory under examination."""

    def __init__(self, regime: Regime, trajectories: Trajectories, index: int, called: str) -> None:
        self.regime, self.all, self.index, self.called = regime, trajectories, index, called
        self.bounds, self.schema = regime.bounds, trajectories.schema
        self.range_of = {r.field: r for r in self.bounds.ranges}
        self.extremes: dict[str, list[np.ndarray]] = {}
        self.divergence: dict[str, float] = {}
        self.energy: dict[str, list[float]] = {}

    def report(self) -> Report:
        """Examine frame by frame, in order of time."""
        for field in self.schema.static:
            self.examine(field, self.all.values[field.name][self.index], None)
        for frame, time in enumerate(self.all.time):
            squares = {}
            for field in self.schema.dynamic:
                values = self.all.values[field.name][self.index, frame]
                self.examine(field, values, float(time))
                squares[field.name] = float(np.square(values, dtype=np.float64).sum()) / math.prod(self.all.grid)
            for energy in self.bounds.energies:
                self.examine_energy(energy, squares, float(time))
        diagnostics = {key: float(np.asarray(v)[self.index]) for key, v in self.all.diagnostics.items()}
        for limit in (STABLE, *self.bounds.limits):
            value = diagnostics.get(limit.diagnostic, 0.0)
            if not abs(value) <= limit.most:
                raise self.error(limit.diagnostic, value, None, f"above its limit of {limit.most:g}")
        return {
            "ranges": {name: [rounded(low), rounded(high)] for name, (low, high) in self.extremes.items()},
            "energy": {name: rounded([e[0], e[-1]]) for name, e in self.energy.items()},
            "divergence": {name: rounded(value) for name, value in self.divergence.items()},
            "solver": {name: rounded(value) for name, value in diagnostics.items()},
        }

    def examine(self, field: Field, values: np.ndarray, time: float | None) -> None:
        """Finite, in range, and without divergence where that is promised."""
        # Planes first: NumPy takes thirty times as long over few columns.
        columns = -1, field.num_components(self.schema.ndim)
        low, high = values.min(0).reshape(columns).min(0), values.max(0).reshape(columns).max(0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise self.error(field.name, math.nan, time, "not finite")
        found = self.extremes.setdefault(field.name, [low, high])
        found[:] = [np.minimum(found[0], low), np.maximum(found[1], high)]
        allowed = self.range_of.get(field.name, Range(field.name))
        for value, outside in ((low.min(), low.min() < allowed.low), (high.max(), high.max() > allowed.high)):
            if outside:
                raise self.error(field.name, value, time, f"outside [{allowed.low:g}, {allowed.high:g}]")
        if field.solenoidal:
            self.examine_divergence(field, values, time)

    def examine_divergence(self, field: Field, values: np.ndarray, time: float | None) -> None:
        # A wall's face is stored as zero, so wrapping around serves walls as well.
        total, scale = np.zeros(values.shape[:-1]), 0.0
        for axis, h in enumerate(self.all.spacing):
            component = values[..., axis].astype(np.float64)
            total += (component - np.roll(component, 1, axis)) / h
            scale += max(float(np.abs(component).max()), self.bounds.speed) / h
        share = float(np.abs(total).max()) / scale
        most = self.bounds.divergence * float(np.finfo(np.float32).eps)
        if not share <= most:
            raise self.error(f"divergence of {field.name}", share, time, f"above {most:.1e} of its gradient")
        self.divergence[field.name] = max(share, self.divergence.get(field.name, 0.0))

    def examine_energy(self, energy: Energy, squares: Mapping[str, float], time: float) -> None:
        value = 0.5 * sum(squares[name] for name in energy.fields)
        series = self.energy.setdefault(energy.name, [])
        series.append(value)
        bound = energy.bound(series[0], time - float(self.all.time[0]))
        if not value <= bound:
            raise self.error(f"{energy.name} energy", value, time, f"above {bound:.4g}, the most its source explains")

    def error(self, what: str, value: float, time: float | None, expected: str) -> UnstableError:
        name = self.schema.name
        bound = next((k for k in ("courant", "time_step") if hasattr(self.regime, k)), None)
        cure = f"lower {name}.{bound} (now {getattr(self.regime, bound):g}) or " if bound else ""
        when = "" if time is None else f" at time {time:g}"
        return UnstableError(
            f"{name}: {what} of trajectory {self.called} is {value:.5g}{when}, {expected}; the solution is unstable or "
            f"not resolved and its file was not stored: {cure}take a finer grid"
        )


def rounded(values: Any) -> Any:
    """Numbers of seven digits, as fp32 has, in plain Python."""
    if np.ndim(values):
        return [rounded(v) for v in values]
    return float(f"{float(values):.7g}")
