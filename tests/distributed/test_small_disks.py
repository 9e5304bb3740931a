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
from shodh.core.weights import WEIGHTS

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


def room_for(checkpoints: float, laboratory: Laboratory) -> int:
    """Bytes of a disk that holds a run, and so many checkpoints of it."""
    run = laboratory.run(2, 2, 1)
    files = [f for f in run.path.rglob("*") if f.is_file() and "checkpoints" not in f.parts]
    rest = sum(4096 * (f.stat().st_size // 4096 + 1) for f in files)
    return rest + int(checkpoints * 3.2 * (run.checkpoint(5) / WEIGHTS).stat().st_size)


def test_no_room_for_the_first_or_the_next_checkpoint(laboratory: Laboratory, disk: Callable[[int], Path]) -> None:
    for room, left in ((0.5, []), (1.6, ["step_00000005"])):
        out = disk(room_for(room, laboratory))
        overrides = laboratory.overrides("small", 2, 1, f"out={out}")
        with pytest.raises(RankError) as caught:
            run_ranks(2, rank_jobs.pretrain, laboratory.config, overrides)
        folder, text = out / "small" / "checkpoints", str(caught.value)
        lines = [line for line in text.splitlines() if "SaveError: no disk space left for a checkpoint" in line]
        ends = f"; the last good checkpoint is {folder / left[-1]}" if left else "; no checkpoint yet"
        assert sum(line.endswith(ends) for line in lines) == 2, "of each rank the last"
        assert [p.name for p in folder.iterdir()] == left
        for name in left:
            verify_checkpoint(folder / name)


def test_older_checkpoints_make_room_and_the_newest_and_the_best_stay(
    laboratory: Laboratory, disk: Callable[[int], Path]
) -> None:
    out = disk(room_for(2.6, laboratory))
    more = (f"out={out}", "operator.train.checkpoint_every=2", "operator.train.keep_checkpoints=9")
    run_ranks(2, rank_jobs.pretrain, laboratory.config, laboratory.overrides("small", 2, 1, *more))
    kept = checkpoints_of(out / "small")
    assert [path.name for path in kept] == ["step_00000008", "step_00000010"]
    for path in kept:
        verify_checkpoint(path)
    with pytest.raises(CheckpointError, match="no disk space left for a checkpoint .* older checkpoints counted"):
        make_room(out / "small", 2**40)
    assert checkpoints_of(out / "small") == kept, "nothing is dropped in vain"
