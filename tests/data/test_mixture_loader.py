"""Workers change nothing but the speed, and whatever happens to one of them reaches the main process in one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from shodh.data.normalize import fit_normalizer
from shodh.data import MixtureLoader, MixtureSampler, RegimeSource, WindowDataset
from shodh.data.loader import _next
from shodh.core.errors import DataError, TopologyError
from shodh.core.signals import STOPS

FRAMES = 5


@pytest.fixture
def folders(make_folder):
    return {
        "open_channel": make_folder("open_channel", seed=1, frames=FRAMES),
        "porous_media": make_folder("porous_media", seed=2, frames=FRAMES, boundary=("periodic",) * 3),
    }


@pytest.fixture
def datasets(folders, fields):
    sources = [RegimeSource(name, path, fields) for name, path in folders.items()]
    normalizer = fit_normalizer(sources)
    return [WindowDataset(s, "train", history=1, horizon=1, normalizer=normalizer) for s in sources]


@pytest.fixture
def sampler(datasets):
    return MixtureSampler(5, [len(d) for d in datasets], [3, 1], 8)


def collect(loader: MixtureLoader, start: int, stop: int) -> list[dict[str, torch.Tensor]]:
    return list(loader.iterate(start, stop))


def assert_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_batches_are_the_samples_the_sampler_names(datasets, sampler):
    batches = collect(MixtureLoader(datasets, sampler, num_micro=2), 3, 5)
    assert len(batches) == 4
    for number, batch in enumerate(batches):
        expected = sampler.local_batch(3 + number // 2, micro=number % 2, num_micro=2)
        assert batch["fields"].shape == (4, 2, 4, 5, 6, 7)
        assert batch["regime"].tolist() == [regime for regime, _ in expected]
        for position, (regime, index) in enumerate(expected):
            item = datasets[regime][index]
            assert torch.equal(batch["fields"][position], item["fields"])
            assert torch.equal(batch["static"][position], item["static"])
            assert (batch["trajectory"][position], batch["frame"][position]) == (item["trajectory"], item["frame"])


def test_workers_and_resumption_change_nothing(datasets, sampler):
    """The parent has files open when it forks, which is where sharing a handle would show."""
    expected = collect(MixtureLoader(datasets, sampler), 0, 12)
    loader = MixtureLoader(datasets, sampler, num_workers=2)
    assert_equal(collect(loader, 0, 12), expected)
    assert_equal(collect(loader, 7, 12), expected[7:])  # the same workers, from a step in the middle
    started = loader.iterate(2, 12)
    next(started), next(started)
    assert_equal(collect(loader, 4, 12), expected[4:])  # an iteration given up half way leaves nothing behind
    assert_equal(collect(MixtureLoader(datasets, sampler, num_workers=1), 9, 12), expected[9:])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("size", [8, 4])
def test_loaders_share_workers_and_change_nothing(datasets, sampler, num_workers, size):
    """Also where an iteration begins in the middle, at the end, or after that of the other one, or is given up."""
    small = MixtureSampler(6, [len(d) for d in datasets], [1, 1], size)
    ours, theirs = (collect(MixtureLoader(datasets, s), 0, 12) for s in (sampler, small))
    train = MixtureLoader(datasets, sampler, num_workers=num_workers)
    valid = MixtureLoader(datasets, small, num_workers=num_workers, workers_of=train)
    before, found = set(multiprocessing.active_children()), []
    for step, batch in enumerate(train.iterate(0, 12)):
        found.append({name: tensor.clone() for name, tensor in batch.items()})
        if step in (0, 5, 10, 11):
            assert_equal(collect(valid, 0, 4), theirs[:4])
        if step == 7:
            given_up = valid.iterate(3, 9)
            assert_equal([next(given_up)], theirs[3:4])
    assert_equal(found, ours)
    assert_equal(collect(valid, 2, 12), theirs[2:])
    assert_equal(collect(train, 9, 12), ours[9:])
    assert len(set(multiprocessing.active_children()) - before) == num_workers
    train.close()


def test_workers_heed_their_parent_alone(datasets, sampler):
    """A scheduler signals all processes of a job; a parent that exits ends its workers by SIGTERM, and joins them."""
    expected = collect(MixtureLoader(datasets, sampler), 0, 12)
    loader, before = MixtureLoader(datasets, sampler, num_workers=1), set(multiprocessing.active_children())
    batches = loader.iterate(0, 12)
    found = [next(batches)]
    (worker,) = set(multiprocessing.active_children()) - before
    for number in STOPS:
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    assert_equal([*found, *batches], expected)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    loader.close()


def test_spawned_workers_read_the_same(datasets, sampler):
    loader = MixtureLoader(datasets, sampler, num_workers=1, multiprocessing_context="spawn")
    assert_equal(collect(loader, 1, 3), collect(MixtureLoader(datasets, sampler), 1, 3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_is_reused_but_never_under_a_batch_that_someone_holds(datasets, sampler, num_workers):
    loader = MixtureLoader(datasets, sampler, num_workers=num_workers)
    expected = collect(MixtureLoader(datasets, sampler), 0, 24)
    view = copies = None
    addresses = set()
    for step, batch in enumerate(loader.iterate(0, 24)):
        assert_equal([batch], expected[step : step + 1])
        addresses.add(batch["fields"].data_ptr())
        if step == 2:
            view, copies = batch["fields"][1, 0], batch["fields"][1, 0].clone()
    assert torch.equal(view, copies)  # a view alone keeps its batch
    assert len(addresses) <= 5  # two in the worker, this batch, the one before, and the one held
    loader.close()
    assert torch.equal(view, copies)


def test_values_are_normalised_to_the_bits_of_the_normaliser(datasets):
    for dataset in datasets:
        physical = WindowDataset(dataset.source, "train", history=1, horizon=1)
        for index in (0, len(dataset) - 1):
            expected = dataset.normalizer.normalize(physical[index]["fields"], dataset.source.name)
            ours = dataset[index]["fields"]
            assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("world", "num_micro"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_the_global_batch(datasets, sampler, world, num_micro):
    whole = collect(MixtureLoader(datasets, sampler), 0, 3)
    ranks = [
        collect(MixtureLoader(datasets, sampler, rank=r, world=world, num_micro=num_micro), 0, 3) for r in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step * num_micro + micro] for micro in range(num_micro) for rank in range(world)]
        assert_equal([{key: torch.cat([part[key] for part in parts]) for key in batch}], [batch])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_value_is_reported_as_the_reader_says_it(folders, datasets, sampler, num_workers):
    bad = next((folders["porous_media"] / "data" / "train").iterdir())
    with h5py.File(bad, "r+") as file:
        file["t0_fields/tracer"][...] = np.nan
    others = set(multiprocessing.active_children())
    loader = MixtureLoader(datasets, sampler, num_workers=num_workers)
    with pytest.raises(DataError, match="'tracer' holds NaN or infinity in trajectory") as error:
        collect(loader, 0, 12)
    assert set(multiprocessing.active_children()) <= others  # its workers ended before the error left the loader
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_disappears_is_reported(folders, datasets, sampler, num_workers):
    for path in (folders["open_channel"] / "data" / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"open_channel_0000\d\.hdf5: no such file"):
        collect(MixtureLoader(datasets, sampler, num_workers=num_workers), 0, 4)


class Fatal(Dataset):
    """Does something no reader should do, in a worker."""

    sample_shape = (1,)

    def __init__(self, deed: str) -> None:
        self.deed = deed

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 3 and self.deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3 and self.deed == "sleep":
            time.sleep(4)  # twice the loader's patience, which then waits for it to end
        if index == 3 and self.deed == "bug":
            raise ZeroDivisionError("a bug")
        return {"x": torch.zeros(1)}


@pytest.mark.parametrize(("deed", "reason"), [("kill", "exited unexpectedly|killed by signal"), ("sleep", "timed out")])
def test_a_dead_or_stuck_worker_ends_the_iteration(deed, reason):
    loader = MixtureLoader([Fatal(deed)], MixtureSampler(0, [8], [1], 4), num_workers=1, timeout=2.0)
    with pytest.raises(DataError, match=f"data worker was killed or is stuck.*({reason})") as error:
        collect(loader, 0, 2)
    assert "\n" not in str(error.value)


def test_a_bug_keeps_its_own_type():
    with pytest.raises(ZeroDivisionError, match="a bug"):
        collect(MixtureLoader([Fatal("bug")], MixtureSampler(0, [8], [1], 4)), 0, 4)

    def in_a_worker():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n... shapes do not match")
        yield

    with pytest.raises(RuntimeError, match="shapes do not match"):
        _next(in_a_worker())


def test_datasets_that_do_not_fit_are_refused(datasets, sampler, make_folder, fields):
    with pytest.raises(DataError, match="sampler was made for"):
        MixtureLoader(datasets[:1], sampler)
    with pytest.raises(TopologyError):
        MixtureLoader(datasets, sampler, world=3)
    other = RegimeSource("wide", make_folder("wide", grid=(5, 6, 8)), fields)
    wide = WindowDataset(other, "train", history=1, horizon=1)
    with pytest.raises(DataError, match="different shapes"):
        MixtureLoader([datasets[0], wide], MixtureSampler(0, [len(datasets[0]), len(wide)], [1, 1], 4))
