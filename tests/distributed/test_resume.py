"""A run that was stopped, killed or could not save goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import rank_jobs
from helper import RankError, run_ranks, run_script
from laboratory import MORE_STAGES, Laboratory, Run

from shodh.checkpoint.folder import verify_checkpoint
from shodh.moe.trace import read_trace
from shodh.train.events import read_events
from shodh.train.run_folder import RunFolder

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


@pytest.mark.parametrize("stage", (*MORE_STAGES, 3))
def test_resumed_run_is_bitwise_the_uninterrupted_one(laboratory: Laboratory, stage: int) -> None:
    whole = laboratory.run(2, 2, stage)
    lost = laboratory.copy(whole, f"lost{stage}", until=5)
    assert all(r["finished"] for r in run_ranks(2, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto"))
    assert_bitwise_equal(lost.path, whole)


@pytest.mark.exhaustive
def test_unrolled_and_decoded_run_goes_on_bit_for_bit_and_as_on_one_rank(laboratory: Laboratory) -> None:
    """Two forecasts a sample, and every other loss through the decoder, at ZeRO 3, whose weights are gathered twice."""
    settings = ("metric=decoded", "decoded_every=2", "loss=over_persistence", "unroll.steps=2")
    changes = [f"operator.{setting}" for setting in settings]
    whole = laboratory.run(2, 2, 3, *changes)
    lost = laboratory.copy(whole, "unrolled", until=5)
    run_ranks(2, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto")
    assert_bitwise_equal(lost.path, whole)
    one = laboratory.run(1, 1, 1, *changes)
    for name in ("train/loss", "train/latent_nmse", "train/decoded_mse", "train/grad_norm"):
        assert whole.training(name) == pytest.approx(one.training(name), rel=1e-4, abs=1e-5), name
    assert len(whole.training("train/decoded_mse")) == len(whole.training("train/latent_nmse_step_2")) == 5


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


@pytest.mark.parametrize(("save", "work"), [(1, "write"), (1, "publish"), (2, "write")])
def test_full_disk_during_a_save_stops_all_ranks_with_one_line(laboratory: Laboratory, save: int, work: str) -> None:
    """In the middle of a run at a step that follows, in the end before the run ends."""
    overrides = laboratory.overrides(f"full-{save}-{work}", 2, 1)
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain_with_failing_save, laboratory.config, overrides, save, work)
    assert str(caught.value).count("SharedError: no disk space left while writing") == 2
    folder = laboratory.load(overrides).run_dir
    assert [p.name for p in (folder / "checkpoints").glob("step_*")] == ["step_00000005"] * (save - 1)
    if save == 2:
        assert (folder / "latest").read_text() == "step_00000005\n"
        verify_checkpoint(folder / "checkpoints" / "step_00000005")


def test_training_goes_on_while_a_checkpoint_is_written(laboratory: Laboratory) -> None:
    """And it is published when the last rank has written, no sooner."""
    overrides = laboratory.overrides("beside", 2, 1)
    ranks = run_ranks(2, rank_jobs.pretrain_with_slow_writing, laboratory.config, overrides, 1, 8)
    assert [rank["latest"] for rank in ranks] == [None, None] and all(rank["finished"] for rank in ranks)
    folder = laboratory.load(overrides).run_dir
    whole = laboratory.run(2, 2, 1)
    assert_bitwise_equal(folder, whole)
    for name in ("model.safetensors", *(f"optimizer/rank_0000{rank}.safetensors" for rank in (0, 1))):
        ours, theirs = (run / "checkpoints" / "step_00000005" / name for run in (folder, whole.path))
        assert ours.read_bytes() == theirs.read_bytes(), "what was copied at step 5, and not what is there at step 8"


def test_a_killed_run_has_the_trace_of_all_steps_that_were_saved(laboratory: Laboratory) -> None:
    """Also where nothing was logged or validated before the save."""
    rare = tuple(f"operator.train.{s}" for s in ("log_every=100", "valid_every=0", "checkpoint_every=3"))
    overrides = laboratory.overrides("rarely", 2, 1, *rare)
    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(2, rank_jobs.pretrain_with_failing_save, laboratory.config, overrides, 2, "kill", timeout=60)
    run_ranks(2, rank_jobs.pretrain, laboratory.config, overrides, "auto")
    assert_bitwise_equal(laboratory.load(overrides).run_dir, laboratory.run(2, 2, 1, *rare))


def test_the_record_of_a_run_is_written_when_its_checkpoint_was_loaded(laboratory: Laboratory) -> None:
    run = laboratory.copy(laboratory.run(2, 2, 1), "unloadable", until=5)
    manifest = run.checkpoint(5) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 3', '"seed": 4'))
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"}
    changed = [*run.overrides, "operator.train.lr=5.0e-3"]
    with pytest.raises(RankError, match="was trained with seed 4, and this run has seed 3"):
        run_ranks(2, rank_jobs.pretrain, laboratory.config, changed, "auto")
    assert {p: p.read_bytes() for p in before} == before


def test_damaged_checkpoint_is_refused_by_all_ranks(laboratory: Laboratory) -> None:
    run = laboratory.copy(laboratory.run(2, 2, 1), "damaged", until=5)
    victim = run.checkpoint(5) / "optimizer" / "rank_00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    before = sorted(p.name for p in run.path.rglob("*"))
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain, laboratory.config, run.overrides, "auto")
    assert str(caught.value).count(f"SharedError: {victim} is damaged: its checksum") == 2
    assert sorted(p.name for p in run.path.rglob("*")) == before, "nothing may be lost or added"


def test_the_checkpoint_before_a_damaged_one_is_used_and_the_run_is_the_same(laboratory: Laboratory) -> None:
    whole = laboratory.run(2, 2, 1)
    run = laboratory.copy(whole, "fallen")
    victim = run.checkpoint(10) / "optimizer" / "rank_00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(RankError, match=f"SharedError: {victim} has"):
        run_ranks(2, rank_jobs.pretrain, laboratory.config, run.overrides, str(run.checkpoint(10)))
    assert run.checkpoint(10).is_dir(), "who names a checkpoint is given no other"
    run_ranks(2, rank_jobs.pretrain, laboratory.config, run.overrides, "auto")
    assert_bitwise_equal(run.path, whole)
    assert (run.path / "checkpoints" / f"damaged_{run.checkpoint(10).name}" / "manifest.json").is_file()


def test_a_rank_that_sees_other_files_damages_nothing(laboratory: Laboratory) -> None:
    run = laboratory.copy(laboratory.run(2, 2, 1), "unseen")
    with pytest.raises(RankError, match="SharedError: rank 1 does not see the checkpoint that rank 0 sees"):
        run_ranks(2, rank_jobs.pretrain_on_a_node_without, laboratory.config, run.overrides, run.checkpoint(10), "auto")
    assert (run.path / "latest").read_text() == "step_00000010\n"
    verify_checkpoint(run.checkpoint(10))


@pytest.mark.parametrize("loses", ["ranges", "file"])
def test_what_another_node_wrote_elsewhere_is_not_published(laboratory: Laboratory, loses: str) -> None:
    """The last rank's disk takes what it writes; rank 0 sees nothing of it."""
    overrides = laboratory.overrides(f"elsewhere-{loses}", 2, 1)
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain_on_another_disk, laboratory.config, overrides, 2, loses)
    assert str(caught.value).count("the run folder must be the same one on all nodes; nothing is published") >= 2
    folder = laboratory.load(overrides).run_dir
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000005"]
    verify_checkpoint(folder / "checkpoints" / "step_00000005")


def test_a_run_goes_on_without_a_save_that_failed_where_it_is_to(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("lenient", 2, 1, "operator.train.failed_save=continue")
    run_ranks(2, rank_jobs.pretrain_with_failing_save, laboratory.config, overrides, 1, "write")
    folder = laboratory.load(overrides).run_dir
    assert_bitwise_equal(folder, laboratory.run(2, 2, 1))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000010"]
    assert [event["kind"] for event in read_events(folder)] == ["save failed"]


def test_ranks_that_wait_for_a_stopped_one_end_and_show_their_stacks(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("stopped", 2, 1, "watchdog.least=3", "operator.train.steps=1000")
    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(2, rank_jobs.pretrain_with_a_rank_that_stops, laboratory.config, overrides, 8, timeout=60)
    folder = laboratory.load(overrides).run_dir
    (event,) = read_events(folder)
    assert event["kind"] == "stood still" and "rank 1 (process" in event["why"]
    assert "trainer.py" in (folder / "stacks" / "rank_00000.txt").read_text()


def test_fewer_ranks_go_on_and_every_step_is_traced_once(laboratory: Laboratory) -> None:
    """The trace of a rank that is gone is cut too."""
    whole = laboratory.run(2, 2, 1)
    lost = laboratory.copy(whole, "shrunk", until=5)
    overrides = laboratory.overrides("shrunk", 1, 3)
    (rank,) = run_ranks(1, rank_jobs.pretrain, laboratory.config, overrides, "auto")
    assert rank["finished"]
    again = Run(lost.path, overrides, [rank])
    assert again.training("train/latent_nmse") == pytest.approx(whole.training("train/latent_nmse"), rel=1e-5)
    assert again.counts() == whole.counts() and again.samples().keys() == whole.samples().keys()
    assert max(r.step for r in read_trace(lost.path / "routing" / "rank1.jsonl")) == 4


def test_another_number_of_samples_that_are_balanced_at_once_is_said(laboratory: Laboratory) -> None:
    run = laboratory.copy(laboratory.run(2, 2, 1), "rebalanced")
    for micro_batch, said in ((4, True), (8, False)):
        settings = laboratory.overrides("rebalanced", 1, 2, f"operator.train.micro_batch={micro_batch}")
        arguments = ("--config", laboratory.config, "--set", *settings, "--resume", "auto")
        finished = run_script("launch/pretrain.py", *arguments)
        assert finished.code == 0 and "resumed from" in finished.stderr, finished.stderr
        assert ("4 samples are balanced over the experts at once" in finished.stderr) is said
    assert Run(run.path, [], []).lines() == run.lines()


def test_a_checkpoint_whose_masters_are_not_the_models_is_not_written(laboratory: Laboratory) -> None:
    overrides = laboratory.overrides("astray", 2, 1)
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain_with_lost_update, laboratory.config, overrides)
    assert str(caught.value).count("SharedError: the optimiser's float32 weights are not the model's in") == 2
    assert not list((laboratory.load(overrides).run_dir / "checkpoints").glob("*"))


def test_checkpoint_holds_no_pickle_and_each_rank_has_written(laboratory: Laboratory) -> None:
    folder = laboratory.run(2, 2, 3).checkpoint(10)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    ranks = {f"optimizer/rank_{rank:05d}.safetensors" for rank in (0, 1)}
    described = {"config.json", "space.json", "manifest.json", "model.safetensors", "tokenizer.safetensors"}
    assert files == {*described, *ranks}
    weights, moments = ((folder / name).stat().st_size for name in ("model.safetensors", min(ranks)))
    assert 0.8 < moments / weights < 1.2, "two moments of half of the numbers, and no second copy of the weights"


def test_a_second_job_ends_at_once_and_touches_nothing(laboratory: Laboratory) -> None:
    run = laboratory.copy(laboratory.run(2, 2, 1), "owned", until=5)
    (run.path / "checkpoints" / ".step_00000010.partial").mkdir()
    owner = RunFolder(run.path)
    owner.own()
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    settings = laboratory.overrides("owned", 1, 1)
    finished = run_script("launch/pretrain.py", "--config", laboratory.config, "--set", *settings, "--resume", "auto")
    assert finished.code == 2 and finished.stderr.strip().splitlines()[-1].startswith("error: ")
    assert f"owned is in use by process {os.getpid()}" in finished.stderr and "Traceback" not in finished.stderr
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before


def test_lost_latest_and_what_a_person_left_do_not_stop_a_run(laboratory: Laboratory) -> None:
    whole = laboratory.run(2, 2, 1)
    run = laboratory.copy(whole, "untidy", until=5)
    folder = run.path / "checkpoints"
    shutil.copytree(run.checkpoint(5), folder / "best")
    (folder / "first").symlink_to("step_00000005")
    shutil.copytree(run.checkpoint(5), folder / ".step_00000010.partial")
    (run.path / "latest").write_text("step_00000010\n")
    more = (*run.overrides, "operator.train.keep_checkpoints=1")
    run_ranks(2, rank_jobs.pretrain, laboratory.config, list(more), "auto")
    assert Run(run.path, [], []).lines() == whole.lines()
    assert {p.name for p in folder.iterdir()} == {"best", "first", "step_00000010"}
    verify_checkpoint(folder / "best")
