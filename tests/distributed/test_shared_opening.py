"""Ranks that open data together have what each would have alone, and each file is read by one of them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helper import RankError, run_ranks

pytestmark = pytest.mark.distributed


def open_data(config_path: Path, shared: bool) -> dict[str, Any]:
    """What a rank holds, and the files that it has opened for that."""
    from shodh.config import load_config
    from shodh.data import stats
    from shodh.data.formats import fingerprints
    from shodh.data.identity import describe_source
    from shodh.train import datasets
    from shodh.train.runtime import start_distributed

    seen: dict[str, list[str]] = {"headers": [], "contents": [], "trajectories": []}
    opened, read, summed = datasets.open_file, fingerprints._read, stats._sums_of
    datasets.open_file = lambda path, *rest: seen["headers"].append(path.name) or opened(path, *rest)  # type: ignore
    fingerprints._read = lambda path, size: seen["contents"].append(path.name) or read(path, size)  # type: ignore
    stats._sums_of = lambda file, number, names: (  # type: ignore
        seen["trajectories"].append(f"{file.path.name} {number}") or summed(file, number, names)
    )
    start_distributed()
    regimes = datasets.open_regimes(load_config(config_path), shared=shared)
    return {
        "constants": regimes.space.normalizer.constants,
        "checksum": regimes.space.checksum,
        "files": [describe_source(source) for source in regimes.sources],
        "seen": seen,
    }


@pytest.fixture
def config(tiny_data: Path, write_config: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(tiny_data, tmp_path / "data")
    regimes = [{"name": path.name, "path": str(path)} for path in sorted((tmp_path / "data").iterdir())]
    return write_config(tmp_path / "tiny.yaml", data={"regimes": regimes})


def test_three_ranks_read_each_file_once_and_keep_the_statistics(config: Path) -> None:
    (alone,) = run_ranks(1, open_data, config, False)
    first, again = run_ranks(3, open_data, config, True), run_ranks(2, open_data, config, True)
    for answer in (*first, *again):
        assert all(answer[name] == alone[name] for name in ("constants", "checksum", "files"))
    for what, count in {"headers": 6, "contents": 6, "trajectories": 6}.items():
        found = Counter(name for answer in first for name in answer["seen"][what])
        assert len(found) == count and set(found.values()) == {1}, (what, found)
        assert sum(bool(answer["seen"][what]) for answer in first) > 1, "the work of all ranks"
    assert not any(answer["seen"]["trajectories"] for answer in again), "kept from the first time"
    assert len(list((config.parent / "runs" / ".statistics").iterdir())) == 2


def test_other_data_have_other_statistics(config: Path) -> None:
    (before,) = run_ranks(1, open_data, config, True)
    shutil.copyfile(*(next(config.parent.glob(f"data/open_channel/data/{split}/*")) for split in ("test", "train")))
    (after,) = run_ranks(1, open_data, config, True)
    assert after["constants"]["open_channel"] != before["constants"]["open_channel"]
    assert after["constants"]["porous_media"] == before["constants"]["porous_media"]
    assert {name.split()[0][:12] for name in after["seen"]["trajectories"]} == {"open_channel"}


def test_a_file_that_one_rank_cannot_read_stops_all_with_its_name(config: Path) -> None:
    damaged = next(config.parent.glob("data/porous_media/data/valid/*"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(RankError) as caught:
        run_ranks(2, open_data, config, True)
    assert str(caught.value).count("SharedError: ") == 2 and str(caught.value).count(damaged.name) >= 2
