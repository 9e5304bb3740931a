"""The cache holds what the tokenizer gave, is found by tokenizer and data, and is complete or refused."""

from __future__ import annotations

import os
import pickle
from functools import partial
from pathlib import Path

import h5py
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from shodh.data.normalize import fit_normalizer
from shodh.data import (
    LatentWindowDataset,
    MixtureLoader,
    MixtureSampler,
    RegimeSource,
    WindowDataset,
    file_stems,
    latent_key,
    split_folder,
    write_latents,
    write_trajectories,
)
from shodh.core.distributed import each
from shodh.core.errors import DataError
from shodh.data import latents

GRID = (4, 6, 8)


@pytest.fixture
def source(make_folder, fields) -> RegimeSource:
    return RegimeSource("open_channel", make_folder(grid=GRID), fields)


def encode(fields: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for a tokenizer: 2x pooling of fields that see the mask."""
    return avg_pool3d(fields * (1 - static), 2), torch.cat((avg_pool3d(static, 2), avg_pool3d(static, 2)), 1)


def fail(*_: object) -> Tensor:
    raise AssertionError("nothing was left to encode")


def open_latents(folder: Path, source: RegimeSource, **kwargs: int) -> LatentWindowDataset:
    return LatentWindowDataset(folder, file_stems(source, "train"), **({"history": 2, "horizon": 1} | kwargs))


def test_cached_windows_are_the_encoded_windows(source, tmp_path):
    normalizer = fit_normalizer([source])
    assert write_latents(tmp_path / "c", source, "train", encode, normalizer=normalizer, batch_size=2) == 2
    cached = open_latents(tmp_path / "c", source, stride=2, regime=3)
    windows = WindowDataset(source, "train", history=2, horizon=1, stride=2, normalizer=normalizer, regime=3)
    assert len(cached) == len(windows) == 5
    assert cached.sample_shape == (3, 4, 2, 3, 4)
    for index in range(len(windows)):
        ours, theirs = cached[index], windows[index]
        latents, static = encode(theirs["fields"], theirs["static"][None])
        torch.testing.assert_close(ours["latents"], latents, rtol=0, atol=0)
        torch.testing.assert_close(ours["static"], static[0], rtol=0, atol=0)
        assert all(ours[key] == theirs[key] for key in ("regime", "trajectory", "frame"))


def test_features_are_optional_and_any_float_type_is_taken(source, tmp_path):
    write_latents(tmp_path / "c", source, "train", lambda fields, static: avg_pool3d(fields, 2).bfloat16())
    item = open_latents(tmp_path / "c", source)[0]
    assert item["latents"].dtype == torch.float32
    assert item["static"].shape == (0, 2, 3, 4)


def test_complete_files_are_kept_and_only_they(source, tmp_path):
    folder = tmp_path / "c"
    write_latents(folder, source, "train", encode)
    assert write_latents(folder, source, "train", fail) == 0
    first, second = file_stems(source, "train")
    (folder / f"{second}.json").unlink()
    assert write_latents(folder, source, "train", encode) == 1
    content = (folder / f"{first}.npy").read_bytes()
    flipped = content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]
    for damaged in (content[:-4], flipped):
        (folder / f"{first}.npy").write_bytes(damaged)
        assert write_latents(folder, source, "train", encode) == 1
        assert (folder / f"{first}.npy").read_bytes() == content


def test_ranks_share_the_chunks_of_a_file(source, tmp_path, monkeypatch):
    """Also those within a file: what is done is not done again, and the cache is that of whole files."""
    write_latents(tmp_path / "whole", source, "train", encode)
    whole = open_latents(tmp_path / "whole", source)
    monkeypatch.setattr(latents, "CHUNK_FRAMES", source.num_frames("train")[0])
    assert len(file_stems(source, "train")) == source.num_trajectories("train") > len(source.files["train"])
    of_first = partial(write_latents, tmp_path / "c", source, "train", share=lambda items, work: each(items[::2], work))
    assert of_first(encode) > of_first(fail) == 0
    with pytest.raises(DataError, match="not .completely. encoded"):
        open_latents(tmp_path / "c", source)
    assert write_latents(tmp_path / "c", source, "train", encode) == source.num_trajectories("train") // 2
    ours = open_latents(tmp_path / "c", source)
    assert len(ours) == len(whole)
    for one, other in zip(map(ours.__getitem__, range(len(ours))), map(whole.__getitem__, range(len(whole)))):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in other)


def test_an_encoder_that_fails_leaves_no_file_of_that_name(source, tmp_path):
    calls = []

    def breaks(fields: Tensor, static: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return avg_pool3d(fields, 2)

    with pytest.raises(OSError, match="No space"):
        write_latents(tmp_path / "c", source, "train", breaks)
    assert list((tmp_path / "c").iterdir()) == []


def test_latents_that_cannot_be_right_are_refused(source, tmp_path):
    wrongs = {
        "NaN": lambda f, s: avg_pool3d(f, 2) * float("nan"),
        "must keep their number": lambda f, s: avg_pool3d(f, 2)[:1],
    }
    for reason, wrong in wrongs.items():
        with pytest.raises(DataError, match=reason):
            write_latents(tmp_path / "c", source, "train", wrong)
        assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("name", ["{}.npy", "{}.static.npy", "{}.json"])
@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_damaged_cache_is_refused_with_the_file_named(source, tmp_path, name, damage):
    write_latents(tmp_path / "c", source, "train", encode)
    path = tmp_path / "c" / name.format(file_stems(source, "train")[1])
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=path.name):
        open_latents(tmp_path / "c", source)


def test_key_changes_with_tokenizer_data_and_settings(source, make_trajectories, fields):
    key = latent_key("abc", [source])
    assert latent_key("abc", [RegimeSource("open_channel", source.path, fields)]) == key
    others = {
        latent_key("abd", [source]),
        latent_key("abc", [source, source]),
        latent_key("abc", [source], {"scale": 2.0}),
        latent_key("abc", [RegimeSource("other", source.path, fields)]),
        latent_key("abc", [RegimeSource("open_channel", source.path, fields, mapping={"solid": None})]),
    }
    os.utime(source.files["valid"][0].path, ns=(0, 0))
    assert latent_key("abc", [source]) == key, "a copied or moved data set is the same"
    with h5py.File(source.files["valid"][0].path, "r+") as file:
        file["t0_fields/tracer"][0, 0] += 1
    others.add(latent_key("abc", [source]))
    write_trajectories(source.path / "data" / "test" / "more.hdf5", make_trajectories(grid=GRID))
    others.add(latent_key("abc", [RegimeSource("open_channel", source.path, fields)]))
    assert len(others) == 7 and key not in others
    assert split_folder("cache", key, "open_channel", "test") == Path("cache") / key / "open_channel" / "test"


def test_workers_read_the_cache_alike(source, tmp_path):
    write_latents(tmp_path / "c", source, "train", encode)
    dataset = open_latents(tmp_path / "c", source)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2]["latents"], dataset[2]["latents"])
    sampler = MixtureSampler(0, [len(dataset)], [1], 4)
    plain = list(MixtureLoader([dataset], sampler).iterate(0, 5))
    loaded = list(MixtureLoader([dataset], sampler, num_workers=2).iterate(0, 5))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(plain, loaded, strict=True) for key in a)


def test_files_of_one_name_are_refused(source, fields, tmp_path):
    path = source.files["train"][0].path
    path.with_suffix(".h5").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="rename"):
        write_latents(tmp_path, RegimeSource("open_channel", source.path, fields), "train", encode)
