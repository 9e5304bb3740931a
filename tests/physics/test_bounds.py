"""What leaves the bounds of its regime is refused, and what a regime makes keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from shodh.core.errors import UnstableError
from shodh.generation.checking import check
from shodh.physics import REGIMES, Regime, get_regime
from shodh.physics.bounds import Energy, Range
from shodh.schema.fields import Trajectories

QUICK: dict[str, dict[str, float]] = {"porous_media": {"grain": 0.4}, "darcy": {"wells": 2}}


def simulate(name: str, cells: int, frames: int = 3, **changes: float) -> tuple[Regime, Trajectories]:
    regime = get_regime(name)
    if hasattr(regime, "spin_up"):
        changes.setdefault("spin_up", min(regime.spin_up, 2.0 * regime.frame_interval))
    regime = get_regime(name, **(QUICK.get(name, {}) | changes))
    return regime, regime.simulate([3, 4], (cells,) * regime.schema.ndim, frames)


@pytest.mark.parametrize("name", sorted(REGIMES))
def test_a_regime_keeps_its_bounds(name: str) -> None:
    regime, trajectories = simulate(name, 16)
    reports = check(regime, trajectories, ["0", "1"])
    for index, report in enumerate(reports):
        for field in trajectories.schema.fields:
            values = trajectories.values[field.name][index].reshape(-1, field.num_components(regime.schema.ndim))
            np.testing.assert_allclose(report["ranges"][field.name], [values.min(0), values.max(0)], rtol=1e-6)
        assert {r.field for r in regime.bounds.ranges} <= set(report["ranges"])
        assert {e.name for e in regime.bounds.energies} == set(report["energy"])
        assert {limit.diagnostic for limit in regime.bounds.limits} <= set(report["solver"])
        assert ("limit_share" in report["solver"]) == (name != "darcy")
        assert set(report["divergence"]) == {f.name for f in regime.schema.fields if f.solenoidal}
    bounds = regime.bounds
    assert bounds.ranges or bounds.energies
    with pytest.raises(dataclasses.FrozenInstanceError):
        bounds.divergence = 1.0  # type: ignore[misc]


def spoil(field: str, value: float) -> Callable[[Trajectories], None]:
    def act(trajectories: Trajectories) -> None:
        trajectories.values[field][1, 2].flat[7] = value

    return act


def raise_energy(trajectories: Trajectories) -> None:
    trajectories.values["velocity"][1, 2] *= 1.1


def raise_share(trajectories: Trajectories) -> None:
    trajectories.diagnostics["limit_share"][1] = 1.01


def raise_drift(trajectories: Trajectories) -> None:
    trajectories.diagnostics["mass_drift"][1] = -0.1


@pytest.mark.parametrize(
    "name, fault, words",
    [
        ("open_channel", spoil("tracer", 1.03), ["tracer", "1.03", "[-0.02, 1.02]", "open_channel.courant"]),
        ("open_channel", spoil("tracer", float("nan")), ["tracer", "not finite"]),
        ("open_channel", spoil("velocity", float("inf")), ["velocity", "not finite"]),
        ("open_channel", spoil("velocity", 30.0), ["divergence of velocity"]),
        ("open_channel", raise_energy, ["kinetic energy", "source"]),
        ("taylor_green", raise_energy, ["kinetic energy"]),
        ("forced_turbulence", raise_energy, ["kinetic energy"]),
        ("porous_media", spoil("tracer", -0.1), ["tracer", "-0.1"]),
        ("rayleigh_benard", spoil("temperature", 2.0), ["temperature"]),
        ("gray_scott", spoil("autocatalyst", -0.5), ["autocatalyst", "gray_scott.time_step"]),
        ("compressible_2d", spoil("density", 0.0), ["density"]),
        ("compressible_2d", spoil("pressure", -1.0), ["pressure"]),
        ("shallow_water_2d", spoil("height", -1e-9), ["height"]),
        ("heat", spoil("temperature", 1e4), ["temperature", "finer grid"]),
        ("burgers", spoil("burgers_velocity", -84.0), ["burgers_velocity"]),
        ("vorticity_2d", spoil("vorticity", 1e4), ["enstrophy"]),
        ("diffusion_reaction_2d", spoil("inhibitor", 1e4), ["inhibitor"]),
        ("obstacle_flow_2d", spoil("flow_velocity", 1e4), ["flow_velocity"]),
        ("shear_layer", raise_share, ["limit_share", "1.01"]),
        ("compressible_2d", raise_drift, ["mass_drift"]),
    ],
)
def test_what_leaves_the_bounds_is_refused_by_name(
    name: str, fault: Callable[[Trajectories], None], words: list[str]
) -> None:
    regime, trajectories = simulate(name, 8)
    check(regime, trajectories, ["10", "11"])
    fault(trajectories)
    with pytest.raises(UnstableError) as error:
        check(regime, trajectories, ["10", "11"])
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in [name, "trajectory 11", *words]), line
    if not words[0].endswith(("share", "drift")):
        assert f"time {trajectories.time[2]:g}" in line


def test_rest_is_no_divergence() -> None:
    """Below onset convection dies: what is left is rounding, which is no fraction of anything."""
    regime, trajectories = simulate("rayleigh_benard", 8, rayleigh=100.0, spin_up=4.0)
    assert np.abs(trajectories.values["velocity"]).max() < 1e-3
    check(regime, trajectories, ["0", "1"])


def test_energy_may_grow_as_its_source_explains() -> None:
    free, pushed, driven = (
        Energy("e", ("u",), tolerance=0.0),
        Energy("e", ("u",), growth=3.0),
        Energy("e", ("u",), power=0.5),
    )
    assert free.bound(2.0, 7.0) == pytest.approx(2.0)
    assert pushed.bound(2.0, 1.0) == pytest.approx(0.5 * (2.0 + 3.0) ** 2 * 1.01)
    assert driven.bound(2.0, 4.0) == pytest.approx(4.0 * 1.01)
    assert Range("u").low == -np.inf and Range("u").high == np.inf
