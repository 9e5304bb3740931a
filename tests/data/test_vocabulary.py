"""Regimes that lack fields of the vocabulary, static fields over decades, and two dimensions read as three."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shodh.data.normalize import fit_normalizer
from shodh.schema.normalize import FieldNormalizer
from shodh.data import RegimeSource, WindowDataset, write_trajectories
from shodh.core.errors import DataError
from shodh.schema.fields import Field, RegimeSchema, Trajectories

VOCABULARY = (
    Field("velocity", "vector", placement="face", optional=True),
    Field("heat", optional=True),
    Field("permeability", static=True, static_scale="log", optional=True),
    Field("depth", static=True, static_scale="zscore", optional=True),
)


def write(folder, stored, boundary, grid, seed=0, decades=3.0):
    """Three training trajectories of the named fields, of four frames, into ``folder``."""
    rng = np.random.default_rng(seed)
    make = {
        "velocity": lambda: rng.standard_normal((3, 4, *grid, len(grid))).astype(np.float32),
        "heat": lambda: (300 + 5 * rng.standard_normal((3, 4, *grid))).astype(np.float32),
        "permeability": lambda: np.exp(decades * rng.standard_normal((3, *grid))).astype(np.float32),
        "depth": lambda: (10 + rng.random((3, *grid))).astype(np.float32),
    }
    fields = tuple(Field(f.name, f.kind, placement="center", static=f.static) for f in VOCABULARY if f.name in stored)
    values = {f.name: make[f.name]() for f in fields}
    lengths = tuple(float(n) / 4 for n in grid)
    schema = RegimeSchema(folder.name, fields, boundary)
    write_trajectories(folder / "train" / "a.hdf5", Trajectories(schema, lengths, 0.1 * np.arange(4), values))
    return values


def test_absent_fields_are_read_as_zeros_and_are_never_normalised(tmp_path):
    grid, boundary = (6, 5, 4), ("periodic",) * 3
    hot = write(tmp_path / "hot", ("heat", "permeability"), boundary, grid)
    write(tmp_path / "windy", ("velocity",), boundary, grid, seed=1)
    sources = [
        RegimeSource("hot", tmp_path / "hot", VOCABULARY, only=("heat", "permeability"), split=(1, 0, 0)),
        RegimeSource("windy", tmp_path / "windy", VOCABULARY, only=("velocity",)),
    ]
    normalizer = fit_normalizer(sources)
    assert set(normalizer.constants["hot"]) == {"heat", "permeability"}
    assert set(normalizer.constants["windy"]) == {"velocity"}
    hot_item, windy_item = (WindowDataset(s, "train", history=1, horizon=1, normalizer=normalizer)[0] for s in sources)
    assert hot_item["fields"].shape == windy_item["fields"].shape == (2, 4, *grid)
    assert not hot_item["fields"][:, :3].any() and not windy_item["fields"][:, 3].any()
    assert not windy_item["static"].any() and not hot_item["static"][1].any()
    heat = hot["heat"].astype(np.float64)
    expected = (heat[0, :2] - heat.mean()) / heat.std()
    np.testing.assert_allclose(hot_item["fields"][:, 3].numpy(), expected, atol=1e-3)


def test_a_regime_must_have_what_it_is_said_to_have(tmp_path):
    write(tmp_path / "hot", ("heat",), ("periodic",) * 3, (6, 5, 4))
    with pytest.raises(DataError, match="no field 'velocity'"):
        RegimeSource("hot", tmp_path / "hot", VOCABULARY, only=("velocity", "heat"))


@pytest.mark.parametrize(("name", "transform"), [("permeability", np.log), ("depth", lambda x: x)])
def test_static_fields_reach_the_models_with_zero_mean_and_unit_variance(tmp_path, name, transform):
    values = write(tmp_path / "rock", ("heat", name), ("periodic",) * 3, (6, 5, 4))
    source = RegimeSource("rock", tmp_path / "rock", VOCABULARY, only=("heat", name), split=(1, 0, 0))
    normalizer = fit_normalizer([source])
    again = FieldNormalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    assert again.constants == normalizer.constants
    channel = ["permeability", "depth"].index(name)
    dataset = WindowDataset(source, "train", history=1, horizon=0, normalizer=again)
    found = torch.stack([dataset[i]["static"][channel] for i in range(0, len(dataset), 4)]).double().numpy()
    assert abs(found.mean()) < 1e-4 and abs(found.std() - 1) < 1e-4
    plain = transform(values[name].astype(np.float64))
    np.testing.assert_allclose(found, (plain - plain.mean()) / plain.std(), atol=1e-4)


@pytest.mark.parametrize("scale", ["zscore", "log"])
def test_constant_static_field_is_normalised_to_zero_and_not_to_amplified_rounding(tmp_path, scale):
    """0.95176405: its logarithm in float32 differs in the last bit from that in float64."""
    fields = (Field("heat"), Field("medium", static=True, static_scale=scale))
    rng = np.random.default_rng(0)
    medium = np.full((3, 8, 8, 8), 0.9517640471458435, dtype=np.float32)
    values = {"heat": rng.standard_normal((3, 4, 8, 8, 8)).astype(np.float32), "medium": medium}
    schema = RegimeSchema("x", (Field("heat"), Field("medium", static=True)), ("periodic",) * 3)
    result = Trajectories(schema, (1.0, 1.0, 1.0), 0.1 * np.arange(4), values)
    write_trajectories(tmp_path / "data" / "train" / "x.hdf5", result)
    source = RegimeSource("x", tmp_path, fields)
    normalizer = fit_normalizer([source])
    window = WindowDataset(source, "train", history=1, horizon=1, normalizer=normalizer)[0]
    assert float(window["static"].abs().max()) < 1e-6


def test_logarithm_of_what_is_not_positive_is_refused(tmp_path):
    folder = tmp_path / "rock"
    values = write(folder, ("heat", "permeability"), ("periodic",) * 3, (6, 5, 4))
    values["permeability"][1, 0, 0, 0] = 0.0
    fields = (Field("heat"), Field("permeability", static=True))
    schema = RegimeSchema("rock", fields, ("periodic",) * 3)
    write_trajectories(folder / "train" / "a.hdf5", Trajectories(schema, (1.0,) * 3, 0.1 * np.arange(4), values))
    source = RegimeSource("rock", folder, VOCABULARY, only=("heat", "permeability"))
    with pytest.raises(DataError, match="'log' needs positive values, and 'permeability'"):
        fit_normalizer([source])


def test_two_dimensions_are_read_as_equal_layers_of_near_cubic_cells(tmp_path):
    grid = (6, 5)
    values = write(tmp_path / "sheet", ("velocity", "heat", "depth"), ("periodic", "wall"), grid)
    chosen = {"only": ("velocity", "heat", "depth"), "split": (1, 0, 0)}
    source = RegimeSource("sheet", tmp_path / "sheet", VOCABULARY, **chosen, layers=8)
    assert source.flat and source.grid == (6, 5, 8) and source.boundary == ("periodic", "wall", "periodic")
    assert source.lengths == pytest.approx((1.5, 1.25, 2.0)) and source.spacing == pytest.approx((0.25,) * 3)
    item = WindowDataset(source, "train", history=2, horizon=1)[0]
    fields = item["fields"].numpy()
    assert fields.shape == (3, 4, 6, 5, 8) and not fields[:, 2].any()
    assert (fields == fields[..., :1]).all() and (item["static"][1] == item["static"][1][..., :1]).all()
    velocity = values["velocity"][0, :3]
    np.testing.assert_allclose(
        fields[:, 0, ..., 3], (velocity[..., 0] + np.roll(velocity[..., 0], -1, 1)) / 2, atol=1e-6
    )
    np.testing.assert_array_equal(fields[:, 3, ..., 5], values["heat"][0, :3])
    scale = fit_normalizer([source]).constants["sheet"]["velocity"]
    assert scale[0] == 0 and scale[1] in (0.5, 1.0)
    plain = RegimeSource("sheet", tmp_path / "sheet", VOCABULARY, only=("velocity", "heat", "depth"))
    assert not plain.flat and plain.grid == grid
