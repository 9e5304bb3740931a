"""A run that was stopped, killed or could not save goes on as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import rank_jobs
from helper import RankError, run_ranks
from laboratory import Laboratory, Run

from shodh.moe.trace import read_trace
from shodh.train.checkpoint import verify_checkpoint

pytestmark = pytest.mark.distributed


def assert_bitwise_equal(resumed: Path, whole: Run) -> None:
    """Metrics, routing trace and weights, to the last bit."""
    again = Run(resumed, [], [])
    assert len(again.training("train/loss")) == 10
    assert again.lines() == whole.lines()
    for rank in (0, 1):
        ours, theirs = (list(read_trace(p / "routing" / f"rank{rank}.jsonl")) for p in (resumed, whole.path))
        assert ours == theirs
    name = "model.safetensors"
    assert (again.checkpoint(10) / name).read_bytes() == (whole.checkpoint(10) / name).read_bytes()


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_resumed_run_is_bitwise_the_uninterrupted_one(laboratory: Laboratory, stage: int) -> None:
    whole = laboratory.run(2, 2, stage)
    lost = laboratory.copy(whole, f"lost{stage}", until=5)
    assert all(r["finished"] for r in run_ranks(2, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto"))
    assert_bitwise_equal(lost.path, whole)


def test_resume_from_a_path_ignores_later_checkpoints(laboratory: Laboratory) -> None:
    whole = laboratory.run(2, 2, 1)
    other = laboratory.copy(whole, "rewound")
    start = str(other.checkpoint(5))
    run_ranks(2, rank_jobs.pretrain, laboratory.config, other.overrides, start)
    assert_bitwise_equal(other.path, whole)


def test_signal_to_one_rank_saves_on_all_and_resume_goes_on(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("signalled", 2, 1)
    ranks = run_ranks(2, rank_jobs.pretrain_until_signal, laboratory.config, overrides, 2)
    assert [r["finished"] for r in ranks] == [False, False]
    folder = laboratory.load(overrides).run_dir
    assert (folder / "latest").read_text() == "step_00000003\n"
    run_ranks(2, rank_jobs.pretrain, laboratory.config, overrides, "auto")
    # A stop adds a checkpoint and nothing else.
    assert_bitwise_equal(folder, laboratory.run(2, 2, 1))


def test_kill_during_a_save_leaves_the_last_checkpoint_and_resume_goes_on(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("killed", 2, 3)
    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(2, rank_jobs.pretrain_with_failing_save, laboratory.config, overrides, 2, "kill", timeout=60)
    folder = laboratory.load(overrides).run_dir
    assert (folder / "latest").read_text() == "step_00000005\n"
    assert [p.name for p in (folder / "checkpoints").glob("step_*")] == ["step_00000005"]
    verify_checkpoint(folder / "checkpoints" / "step_00000005")
    run_ranks(2, rank_jobs.pretrain, laboratory.config, overrides, "auto")
    assert_bitwise_equal(folder, laboratory.run(2, 2, 3))
    assert not list((folder / "checkpoints").glob(".*"))


def test_full_disk_during_a_save_stops_all_ranks_with_one_line(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("full", 2, 1)
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain_with_failing_save, laboratory.config, overrides, 2, "full")
    assert str(caught.value).count("SharedError: no disk space left while writing") == 2
    folder = laboratory.load(overrides).run_dir
    assert (folder / "latest").read_text() == "step_00000005\n"
    verify_checkpoint(folder / "checkpoints" / "step_00000005")


def test_damaged_checkpoint_is_refused_by_all_ranks(laboratory: Laboratory) -> None:
    run = laboratory.copy(laboratory.run(2, 2, 1), "damaged", until=5)
    victim = next(run.checkpoint(5).glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    before = sorted(p.name for p in run.path.rglob("*"))
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain, laboratory.config, run.overrides, "auto")
    assert str(caught.value).count(f"SharedError: {victim} is damaged: its checksum") == 2
    assert sorted(p.name for p in run.path.rglob("*")) == before, "nothing may be lost or added"


@pytest.mark.parametrize(
    ("world", "ep_size", "stage", "named"),
    [(1, 1, 1, "world_size=2"), (2, 1, 1, "ep_size=2"), (2, 2, 2, "zero_stage=1")],
)
def test_another_layout_cannot_resume_and_is_told_what_to_do(
    laboratory: Laboratory, world: int, ep_size: int, stage: int, named: str
) -> None:
    run = laboratory.copy(laboratory.run(2, 2, 1), f"layout{world}{ep_size}{stage}", until=5)
    overrides = laboratory.overrides(run.path.name, ep_size, stage)
    with pytest.raises(RankError) as caught:
        run_ranks(world, rank_jobs.pretrain, laboratory.config, overrides, "auto")
    assert named in str(caught.value) and "--init-from" in str(caught.value)
    shutil.rmtree(run.path)
