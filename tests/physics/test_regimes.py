"""The channel and the porous medium as their callers see them, and whether the physics is alive.

What every regime promises is tested in test_every_regime.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shodh.core.errors import ConfigError, DataError
from shodh.physics import get_regime, parse_parameter
from shodh.schema.fields import Trajectories

FAST = {"open_channel": {"spin_up": 0.08, "frame_interval": 0.04}, "porous_media": {"grain": 0.4}}
GRID = (13, 12, 15)


def simulate(name: str, seeds: list[int], frames: int = 2, **changes: object) -> Trajectories:
    return get_regime(name, **(FAST[name] | changes)).simulate(seeds, GRID, frames)


def stored_divergence(trajectories: Trajectories) -> np.ndarray:
    """Divergence in fp64 of the stored faces; a wall face is stored as zero, so wrapping around is right."""
    u = trajectories.values["velocity"].astype(np.float64)
    terms = ((u[..., a] - np.roll(u[..., a], 1, axis=2 + a)) / trajectories.spacing[a] for a in range(3))
    return sum(terms, start=np.zeros(u.shape[:-1]))


@pytest.mark.parametrize("name", sorted(FAST))
def test_stored_velocity_is_divergence_free_at_fp32_rounding(name: str) -> None:
    result = simulate(name, [3, 4])
    scale = np.abs(result.values["velocity"]).max() / min(result.spacing)
    divergence = np.abs(stored_divergence(result)).max()
    assert divergence < 4 * np.finfo(np.float32).eps * scale
    # The diagnostic tells the same story as the stored field.
    assert result.diagnostics["divergence_max"].max() < 4 * np.finfo(np.float32).eps * scale


def test_walls_of_the_channel_are_impermeable() -> None:
    velocity = simulate("open_channel", [1]).values["velocity"]
    assert np.abs(velocity[..., -1, 2]).max() == 0.0
    assert np.abs(velocity[..., 0, 2]).max() > 0.0


def test_solids_carry_no_flow_and_no_tracer() -> None:
    values = simulate("porous_media", [1, 2]).values
    solid = values["solid"].astype(bool)
    assert 0.1 < solid.mean() < 0.6
    for axis in range(3):
        closed = solid | np.roll(solid, -1, axis=1 + axis)
        for frame in range(2):
            assert np.abs(values["velocity"][:, frame][closed][:, axis]).max() == 0.0
            assert np.abs(values["tracer"][:, frame][solid]).max() == 0.0
    assert np.sqrt((values["velocity"] ** 2).mean()) > 0.1


@pytest.mark.parametrize("name", sorted(FAST))
def test_tracer_is_conserved(name: str) -> None:
    totals = simulate(name, [1], frames=4).values["tracer"].astype(np.float64).sum((2, 3, 4))
    assert np.abs(totals / totals[:, :1] - 1).max() < 1e-6


@pytest.mark.parametrize("name", sorted(FAST))
def test_consecutive_frames_clearly_differ(name: str) -> None:
    result = simulate(name, [1, 2], frames=3)
    for field in ("velocity", "tracer"):
        values = result.values[field].astype(np.float64)
        change = np.linalg.norm(values[:, 1:] - values[:, :-1]) / np.linalg.norm(values[:, 1:])
        assert 0.05 < change < 1.5


@pytest.mark.exhaustive
def test_channel_turbulence_is_alive_and_moves_downstream() -> None:
    """Turbulent at a coarse grid: fluctuations and Reynolds stress of the known size, bed shear near its balance."""
    grid, frames = (24, 24, 24), 6
    regime = get_regime("open_channel", spin_up=1.6, frame_interval=0.05)
    result = regime.simulate([0, 1], grid, frames)
    velocity = result.values["velocity"].astype(np.float64)
    fluctuation = velocity - velocity.mean((1, 2, 3), keepdims=True)
    intensity = np.sqrt((fluctuation**2).mean((0, 1, 2, 3)))
    u, v, w = intensity.max(0)
    assert 2.0 < u < 4.5 and 0.7 < v < 2.0 and 0.5 < w < 1.6
    stress = -(fluctuation[..., :-1, 0] * fluctuation[..., :-1, 2]).mean((0, 1, 2, 3))
    assert 0.4 < stress.max() < 1.6
    assert ((result.diagnostics["friction_velocity"] > 0.8) & (result.diagnostics["friction_velocity"] < 1.3)).all()

    # The streamwise lag of best correlation between frames is what the mean flow covers in their interval.
    lag = np.zeros(grid[0])
    spectrum = np.fft.fft(fluctuation[..., 0], axis=2)
    correlation = np.fft.ifft(spectrum[:, 1:] * np.conj(spectrum[:, :-1]), axis=2).real
    lag = correlation.mean((0, 1, 3))[:, 8:].mean(-1)
    expected = result.diagnostics["bulk_velocity"].mean() * 0.05 / result.spacing[0]
    assert abs(lag.argmax() - expected) < 1.5


def test_image_is_the_geometry_when_one_is_given(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random(GRID) < 0.2
    np.save(tmp_path / "rock.npy", image)
    result = simulate("porous_media", [1], image=str(tmp_path / "rock.npy"), pore_value=0.0)
    assert np.array_equal(result.values["solid"][0][image], np.ones(image.sum()))
    assert result.values["solid"][0].mean() < image.mean() + 0.02
    np.save(tmp_path / "wall.npy", np.arange(16)[:, None, None] * np.ones((16, 16, 16)) == 3)
    with pytest.raises(DataError, match="percolates"):
        simulate("porous_media", [1], image=str(tmp_path / "wall.npy"), pore_value=0.0)


@pytest.mark.parametrize(
    "name, parameters, word",
    [
        ("open_chanel", {}, "open_channel"),
        ("open_channel", {"re_taw": 100.0}, "re_tau"),
        ("open_channel", {"re_tau": -1.0}, "re_tau"),
        ("open_channel", {"courant": 2.0}, "courant"),
        ("open_channel", {"spin_up": float("nan")}, "spin_up"),
        ("porous_media", {"geometry": "cubes"}, "spheres"),
        ("porous_media", {"porosity_min": 0.9, "porosity_max": 0.5}, "porosity"),
        ("porous_media", {"geometry": "image"}, "image"),
        ("porous_media", {"courant": 1.5}, "courant"),
    ],
)
def test_bad_parameters_are_refused(name: str, parameters: dict[str, float], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        get_regime(name, **parameters)


def test_parameters_are_parsed_by_their_type() -> None:
    assert parse_parameter("open_channel", "re_tau", "1e2") == 100.0
    assert parse_parameter("open_channel", "double", "true") is True
    assert parse_parameter("porous_media", "image_shape", "4,5,6") == (4, 5, 6)
    assert parse_parameter("porous_media", "geometry", "blobs") == "blobs"
    for key, text in (("re_tau", "fast"), ("image_shape", "4,5"), ("grane", "0.1")):
        with pytest.raises(ConfigError):
            parse_parameter("open_channel" if key == "re_tau" else "porous_media", key, text)
