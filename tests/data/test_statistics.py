"""Statistics agree with numpy on the whole; normalisation is exact where it must be."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import yaml

from shodh.schema.normalize import FieldNormalizer
from shodh.data import (
    RegimeSource,
    WellFile,
    WindowDataset,
    compute_statistics,
    read_stats,
    write_stats,
    write_trajectories,
)
from shodh.data.normalize import component_units, fit_normalizer, normalizer_from_statistics, power_of_two
from shodh.core.errors import DataError
from shodh.schema.fields import Field


def test_statistics_equal_those_of_all_values_at_once(make_folder, make_trajectories):
    files = sorted((make_folder() / "data" / "train").iterdir())
    statistics = compute_statistics(files, make_trajectories().schema)
    parts = [make_trajectories(seed=0, batch=3).values, make_trajectories(seed=1, batch=2).values]
    for name in ("velocity", "tracer", "solid"):
        values = np.concatenate([p[name] for p in parts]).astype(np.float64)
        axes = (0, 1, 2, 3, 4)[: values.ndim - (name == "velocity")]
        np.testing.assert_allclose(statistics["mean"][name], values.mean(axes), rtol=1e-12)
        np.testing.assert_allclose(statistics["std"][name], values.std(axes), rtol=1e-12)
        if name != "solid":
            delta = np.diff(values, axis=1)
            np.testing.assert_allclose(statistics["mean_delta"][name], delta.mean(axes), atol=1e-12)
            np.testing.assert_allclose(statistics["std_delta"][name], delta.std(axes), rtol=1e-12)
    assert isinstance(statistics["mean"]["velocity"], list) and len(statistics["mean"]["velocity"]) == 3
    assert "solid" not in statistics["std_delta"]


def test_a_large_mean_does_not_swamp_a_small_variance(tmp_path, make_trajectories):
    trajectories = make_trajectories()
    trajectories.values["tracer"] = (1e4 + 0.01 * trajectories.values["tracer"]).astype(np.float32)
    write_trajectories(tmp_path / "a.hdf5", trajectories)
    std = compute_statistics([tmp_path / "a.hdf5"], ["tracer"])["std"]["tracer"]
    assert std == pytest.approx(trajectories.values["tracer"].astype(np.float64).std(), rel=1e-9)


def test_progress_reaches_one(make_folder):
    done: list[float] = []
    compute_statistics(sorted((make_folder() / "data" / "train").iterdir()), progress=done.append)
    assert done[-1] == 1.0 and done == sorted(done)


def test_stats_yaml_is_read_back(tmp_path, make_folder):
    statistics = compute_statistics(sorted((make_folder() / "data" / "train").iterdir()))
    write_stats(tmp_path / "stats.yaml", statistics)
    assert read_stats(tmp_path / "stats.yaml") == statistics


@pytest.mark.parametrize(
    "text", ["", "a: [", "mean: 3", "mean: {a: 1}", "mean: {a: .nan}\nstd: {a: 1}", "mean: {a: b}\nstd: {a: 1}"]
)
def test_unusable_stats_are_refused_with_their_name(tmp_path, text):
    (tmp_path / "stats.yaml").write_text(text)
    with pytest.raises(DataError, match=r"stats\.yaml"):
        read_stats(tmp_path / "stats.yaml")


def test_statistics_come_from_training_files_alone(make_folder, make_trajectories, fields, caplog):
    root = make_folder()
    loud = make_trajectories(seed=9)
    loud.values["tracer"] *= 1000
    write_trajectories(root / "data" / "valid" / "loud.hdf5", loud)
    with caplog.at_level(logging.WARNING):
        computed = RegimeSource("open_channel", root, fields).statistics()
    assert "computing them from the training files" in caplog.text
    assert computed["std"]["tracer"] == pytest.approx(1.0, abs=0.1)
    caplog.clear()
    write_stats(root / "stats.yaml", compute_statistics(sorted((root / "data" / "train").iterdir())))
    assert RegimeSource("open_channel", root, fields).statistics() == computed
    assert not caplog.text
    (root / "stats.yaml").write_text(yaml.safe_dump({"mean": {"tracer": 0.0}, "std": {"tracer": 2.0}}))
    assert RegimeSource("open_channel", root, fields).statistics() == computed
    assert "no statistics" in caplog.text


def test_statistics_use_our_names(foreign_folder, fields):
    source = RegimeSource("theirs", foreign_folder, fields, mapping={"velocity": "vel", "tracer": "dye", "solid": None})
    assert set(source.statistics()["mean"]) == {"velocity", "tracer"}
    assert len(source.statistics()["std"]["velocity"]) == 3


def normalizer_for(fields: tuple[Field, ...], rms: float) -> FieldNormalizer:
    statistics = {
        "mean": {"velocity": [rms, 0.0, 0.0], "tracer": 5.0, "solid": 0.3},
        "std": {"velocity": [rms, rms, 0.0], "tracer": 0.3, "solid": 0.4},
    }
    calm = {"mean": {"velocity": [0.0] * 3, "tracer": 7.0}, "std": {"velocity": [0.0] * 3, "tracer": 0.0}}
    return normalizer_from_statistics(fields, 3, {"channel": statistics, "calm": calm})


def exact_velocity(rng: np.random.Generator, grid: tuple[int, int, int], step: float) -> torch.Tensor:
    """A periodic staggered field on a lattice of ``step``: its divergence in float32 is exactly zero."""
    potential = rng.integers(-(2**20), 2**20, (3, *grid)).astype(np.float64)
    curl = [
        (potential[i - 1] - np.roll(potential[i - 1], 1, (i + 1) % 3))
        - (potential[i - 2] - np.roll(potential[i - 2], 1, (i + 2) % 3))
        for i in range(3)
    ]
    return torch.from_numpy((np.stack(curl) * step).astype(np.float32))


def divergence(velocity: torch.Tensor) -> torch.Tensor:
    return sum(velocity[i] - velocity[i].roll(1, i) for i in range(3))


@pytest.mark.parametrize("rms", [0.017, 1.7, 2.9e5])
def test_normalised_velocity_is_exactly_divergence_free_if_the_stored_one_is(fields, rms):
    rng = np.random.default_rng(0)
    velocity = exact_velocity(rng, (5, 7, 6), step=2.0**-21)
    assert (divergence(velocity) == 0).all()
    values = torch.cat([velocity, torch.from_numpy(rng.standard_normal((1, 5, 7, 6)).astype(np.float32))])
    normalizer = normalizer_for(fields, rms)
    normalised = normalizer.normalize(values, "channel")
    assert (divergence(normalised[:3]) == 0).all()
    assert not torch.equal(normalised[:3], velocity)
    assert torch.equal(normalizer.denormalize(normalised, "channel")[:3], velocity)
    torch.testing.assert_close(normalizer.denormalize(normalised, "channel")[3], values[3])
    any_scale = velocity / np.float32(1.2345 * rms)
    assert (divergence(any_scale) != 0).any()  # what the power of two is for


def test_scales(fields):
    normalizer = normalizer_for(fields, 3.0)  # rms of all components: 3.0
    assert normalizer.constants["channel"] == {"velocity": (0.0, 4.0), "tracer": (5.0, 0.3)}
    assert normalizer.constants["calm"] == {"velocity": (0.0, 1.0), "tracer": (7.0, 0.0)}
    assert [power_of_two(v) for v in (1.0, 1.41, 1.42, 0.24, 3e-3)] == [1.0, 1.0, 2.0, 0.25, 2.0**-8]


def test_normalised_training_windows_are_of_order_one(make_folder, fields):
    source = RegimeSource("open_channel", make_folder(), fields)
    normalizer = fit_normalizer([source])
    dataset = WindowDataset(source, "train", history=1, horizon=1, normalizer=normalizer)
    values = torch.cat([dataset[i]["fields"] for i in range(len(dataset))])
    assert values[:, 3].mean().abs() < 0.05 and abs(values[:, 3].std() - 1) < 0.05
    assert 2**-0.5 <= values[:, :3].square().mean().sqrt() <= 2**0.5


def test_each_sample_of_a_batch_gets_the_constants_of_its_regime(fields):
    normalizer = normalizer_for(fields, 1.0)
    regimes = torch.tensor([1, 0, 1])
    values = torch.randn(3, 2, 4, 3, 5, 2)[..., ::2, :].double()
    batched = normalizer.normalize(values, regimes)
    assert batched.dtype == torch.float64
    for sample, regime in enumerate(("calm", "channel", "calm")):
        torch.testing.assert_close(batched[sample], normalizer.normalize(values[sample], regime))
        torch.testing.assert_close(batched[sample], normalizer.normalize(values[sample], int(regimes[sample])))
    back = normalizer.denormalize(batched, regimes)
    torch.testing.assert_close(back[1], values[1])
    assert bool((back[::2, :, 3] == 7).all())  # A constant comes back as its value.


def test_normalizer_survives_json(fields):
    normalizer = normalizer_for(fields, 0.1)
    again = FieldNormalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    assert again.constants == normalizer.constants and again.regimes == normalizer.regimes
    values = torch.randn(4, 3, 2, 5)
    assert torch.equal(again.normalize(values, 0), normalizer.normalize(values, 0))


@pytest.mark.parametrize("damage", ["regimes", "fields", "scale", "version"])
def test_malformed_constants_are_refused(fields, damage):
    content = normalizer_for(fields, 0.1).to_dict()
    if damage == "scale":
        content["regimes"]["calm"]["tracer"]["scale"] = -1.0
    elif damage == "version":
        content["version"] = 99
    else:
        del content[damage]
    with pytest.raises(DataError):
        FieldNormalizer.from_dict(content)


def test_wrong_channels_and_unknown_regimes_are_refused(fields, tmp_path, make_trajectories):
    normalizer = normalizer_for(fields, 1.0)
    with pytest.raises(ValueError, match="have 3 channels"):
        normalizer.normalize(torch.zeros(3, 4, 4, 4), 0)
    with pytest.raises(DataError, match="porous"):
        normalizer.normalize(torch.zeros(4, 4, 4, 4), "porous")
    write_trajectories(tmp_path / "a.hdf5", make_trajectories())
    with pytest.raises(DataError, match="no field 'pressure'"):
        compute_statistics([WellFile(tmp_path / "a.hdf5")], ["pressure"])


def test_normalising_in_place_gives_the_same_bits_for_any_strides():
    fields = (Field("velocity", "vector"), Field("heat"), Field("plain"))
    constants = {"velocity": (0.0, 4.0), "heat": (3.0, 0.7), "plain": (0.0, 1.0)}
    normalizer = FieldNormalizer(fields, 3, {"box": constants})
    values = torch.randn(2, 5, 4, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = normalizer.normalize(values, "box")
    strided = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    for tensor in (values.clone(), strided):
        normalizer.normalize_(tensor, "box")
        assert torch.equal(tensor, expected)


def test_units_are_the_deviations_of_components_in_normalised_fields() -> None:
    fields = [Field("velocity", "vector"), Field("tracer"), Field("heat")]
    std = {"velocity": [4.0, 1.0, 1e-9], "tracer": 3.0, "heat": 0.0}
    constants = {"velocity": (0.0, 16.0), "tracer": (7.0, 3.0), "heat": (1.0, 0.0)}
    least = (17 / 3) ** 0.5 / 16 / 30  # Of nothing but rounding; of two dimensions that are read with a third.
    expected = {"velocity": pytest.approx((0.25, 0.0625, least)), "tracer": (1.0,)}
    assert component_units(fields, 3, std, constants) == expected
    assert component_units(fields, 3, {**std, "velocity": [4.0, 1.0]}, constants) == expected
    assert component_units(fields[:1], 3, {"velocity": [0.0, 0.0, 0.0]}, constants) == {}
