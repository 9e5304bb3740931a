"""A file system that is too small: one line, the last checkpoint whole, and room made where older ones can go."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rank_jobs
from helper import RankError, run_ranks
from laboratory import Laboratory

from shodh.checkpoint.folder import checkpoints_of, make_room, verify_checkpoint
from shodh.core.errors import CheckpointError

pytestmark = pytest.mark.distributed


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``disk(bytes)``: a folder on a file system of its own, of this size."""
    made: list[Path] = []

    def make(size: int) -> Path:
        path = tmp_path / f"disk{len(made)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "shodh", str(path)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a file system")
        made.append(path)
        return path

    yield make
    for path in made:
        subprocess.run(["umount", "-l", str(path)], check=True)


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_no_room_for_the_first_or_the_next_checkpoint(laboratory: Laboratory, disk: Callable[[int], Path]) -> None:
    one = size_of(laboratory.run(2, 2, 1).checkpoint(5))
    for room, left in ((0.7, []), (1.7, ["step_00000005"])):
        out = disk(int(room * one) + 2**18)
        overrides = laboratory.overrides("small", 2, 1, f"out={out}")
        with pytest.raises(RankError) as caught:
            run_ranks(2, rank_jobs.pretrain, laboratory.config, overrides)
        assert str(caught.value).count("SaveError: no disk space left for a checkpoint") == 2
        folder = out / "small" / "checkpoints"
        assert [p.name for p in folder.iterdir()] == left
        for name in left:
            assert str(caught.value).count(f"the last good checkpoint is {folder / name}") == 2
            verify_checkpoint(folder / name)


def test_older_checkpoints_make_room_and_the_newest_and_the_best_stay(
    laboratory: Laboratory, disk: Callable[[int], Path]
) -> None:
    one = size_of(laboratory.run(2, 2, 1).checkpoint(5))
    out = disk(int(2.6 * one) + 2**18)
    more = (f"out={out}", "operator.train.checkpoint_every=2", "operator.train.keep_checkpoints=9")
    run_ranks(2, rank_jobs.pretrain, laboratory.config, laboratory.overrides("small", 2, 1, *more))
    kept = checkpoints_of(out / "small")
    assert [path.name for path in kept] == ["step_00000008", "step_00000010"]
    for path in kept:
        verify_checkpoint(path)
    with pytest.raises(CheckpointError, match="no disk space left for a checkpoint .* older checkpoints counted"):
        make_room(out / "small", 100 * one)
    assert checkpoints_of(out / "small") == kept, "nothing is dropped in vain"
