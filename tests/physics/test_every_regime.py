"""What every built-in regime promises, whatever its physics, fields and dimension."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from shodh.core.errors import ConfigError
from shodh.physics import REGIMES, get_regime
from shodh.schema.fields import RegimeSchema, Trajectories

# Changes that make a tiny run cheap where the defaults are long; a spin-up is shortened for all.
FAST = {"porous_media": {"grain": 0.4}}
GRIDS = {2: (13, 16), 3: (10, 12, 11)}
SEEDS, FRAMES = (1, 2), 3

every_regime = pytest.mark.parametrize("name", sorted(REGIMES))
with_double = [name for name, kind in sorted(REGIMES.items()) if hasattr(kind(), "double")]
with_solenoidal = [name for name, kind in sorted(REGIMES.items()) if any(f.solenoidal for f in kind().schema.fields)]


def parameters_of(name: str) -> dict[str, float]:
    regime = get_regime(name)
    changes: dict[str, float] = dict(FAST.get(name, {}))
    if hasattr(regime, "spin_up"):
        changes["spin_up"] = min(regime.spin_up, 2.0 * regime.frame_interval)
    return changes


def grid_of(name: str) -> tuple[int, ...]:
    return GRIDS[get_regime(name).schema.ndim]


def simulate(name: str, seeds: tuple[int, ...]) -> Trajectories:
    return get_regime(name, **parameters_of(name)).simulate(list(seeds), grid_of(name), FRAMES)


# Tests that only look share one run.
simulate_once = functools.cache(simulate)


def dynamic_values(result: Trajectories) -> dict[str, np.ndarray]:
    return {f.name: result.values[f.name].astype(np.float64) for f in result.schema.dynamic}


@every_regime
def test_declaration(name: str) -> None:
    kind = REGIMES[name]
    regime = get_regime(name)
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert regime.name == name and isinstance(regime.check, str) and len(regime.check) > 10
    assert isinstance(regime.schema, RegimeSchema) and regime.schema.name == name
    assert regime.schema.ndim in (2, 3) and regime.schema.dynamic
    assert regime.frame_interval > 0
    # Ranges name parameters and hold their defaults.
    fields = {field.name for field in dataclasses.fields(REGIMES[name])}
    assert regime.ranges
    for key, (low, high) in regime.ranges.items():
        assert key in fields and low < high
        assert low <= getattr(regime, key) <= high
        for end in (low, high):
            assert getattr(get_regime(name, **{key: end}), key) == end


@every_regime
def test_trajectories_fit_the_schema(name: str) -> None:
    result, grid = simulate_once(name, SEEDS), grid_of(name)
    schema, batch = result.schema, len(SEEDS)
    assert schema == get_regime(name).schema
    assert set(result.values) == {field.name for field in schema.fields}
    for field in schema.fields:
        time = () if field.static else (FRAMES,)
        components = (schema.ndim,) if field.kind == "vector" else ()
        values = result.values[field.name]
        assert values.shape == (batch, *time, *grid, *components), field.name
        assert values.dtype == np.float32 or (field.static and values.dtype in (np.uint8, np.bool_)), field.name
        assert np.isfinite(values).all(), field.name
        if field.positive:
            assert values.min() > 0, field.name
    assert len(result) == batch and result.grid == grid and len(result.lengths) == schema.ndim
    assert min(result.lengths) > 0
    assert result.time.dtype == np.float64
    assert result.time == pytest.approx(np.arange(FRAMES) * get_regime(name).frame_interval)
    for key, value in result.parameters.items():
        assert np.shape(value) in ((), (len(SEEDS),)) and np.isfinite(value).all(), key
    assert result.diagnostics
    for key, value in result.diagnostics.items():
        assert np.shape(value) == (len(SEEDS),) and np.isfinite(value).all(), key


@pytest.mark.parametrize("name", with_solenoidal)
def test_solenoidal_fields_are_discretely_divergence_free(name: str) -> None:
    """To the rounding of fp32 storage. A wall's face is stored as zero, so wrapping around serves walls as well."""
    result = simulate_once(name, SEEDS)
    for field in (f for f in result.schema.fields if f.solenoidal):
        assert field.placement == "face"
        vector = result.values[field.name].astype(np.float64)
        total, scale = np.zeros(vector.shape[:-1]), 0.0
        for axis, (spacing, boundary) in enumerate(zip(result.spacing, result.schema.boundary)):
            component = vector[..., axis]
            if boundary == "wall":
                assert np.abs(component.take(-1, axis=2 + axis)).max() == 0
            total += (component - np.roll(component, 1, axis=2 + axis)) / spacing
            scale += np.abs(component).max() / spacing
        # Rounding to fp32 moves each of two faces along each axis by half an eps at most.
        assert np.abs(total).max() <= np.finfo(np.float32).eps * scale, field.name


@every_regime
def test_frames_change_and_trajectories_differ(name: str) -> None:
    fields = dynamic_values(simulate_once(name, SEEDS))
    changes = {
        key: np.linalg.norm(v[:, 1:] - v[:, :-1]) / max(np.linalg.norm(v[:, 1:]), 1e-30) for key, v in fields.items()
    }
    assert 0.02 < max(changes.values()) < 2.0, changes
    assert any(not np.allclose(v[0], v[1], atol=1e-2 * np.abs(v).max()) for v in fields.values())


@every_regime
def test_trajectory_depends_on_its_seed_and_not_on_its_neighbours(name: str) -> None:
    pair, other = simulate_once(name, SEEDS), simulate(name, (7, SEEDS[0], 8))
    for field in pair.schema.fields:
        mine = pair.values[field.name][0].astype(np.float64)
        assert np.allclose(other.values[field.name][1], mine, rtol=0.0, atol=1e-3 * np.abs(mine).max()), field.name


@pytest.mark.parametrize("name", with_double)
def test_double_precision_gives_the_same_solution(name: str) -> None:
    single = simulate_once(name, SEEDS)
    regime = get_regime(name, **parameters_of(name), double=True)
    double = regime.simulate(list(SEEDS), grid_of(name), FRAMES)
    for field in single.schema.fields:
        exact = double.values[field.name].astype(np.float64)
        assert np.allclose(single.values[field.name], exact, rtol=0.0, atol=2e-3 * np.abs(exact).max()), field.name
    rounded = any(not np.array_equal(single.values[f.name], double.values[f.name]) for f in single.schema.dynamic)
    assert rounded, "double=True changed nothing"


@every_regime
def test_same_request_gives_the_same_bits(name: str) -> None:
    first, again = simulate_once(name, SEEDS), simulate(name, SEEDS)
    assert all(np.array_equal(first.values[key], again.values[key]) for key in first.values)


@every_regime
def test_progress_rises_to_one(name: str) -> None:
    fractions: list[float] = []
    get_regime(name, **parameters_of(name)).simulate([1], grid_of(name), 2, progress=fractions.append)
    assert fractions == sorted(fractions) and min(fractions) > 0 and fractions[-1] == pytest.approx(1.0)


@every_regime
def test_requests_that_cannot_be_solved_are_refused(name: str) -> None:
    grid = grid_of(name)
    small, long = (2, *grid[1:]), (*grid, 16)
    request = {"seeds": [1], "grid": grid, "frames": 2}
    for changes in ({"seeds": []}, {"grid": small}, {"grid": long}, {"frames": 0}):
        with pytest.raises(ConfigError, match=name):
            get_regime(name).simulate(**{**request, **changes})  # type: ignore[arg-type]
    for interval in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="frame_interval"):
            get_regime(name, frame_interval=interval)
