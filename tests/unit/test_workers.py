"""Jobs in processes of their own: order, forerunners, failures, logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shodh.core.devices import CardsError
from shodh.core.errors import ConfigError
from shodh.experiments.harness.ranks import Ranks
from shodh.experiments.harness.workers import Job, Progress, Workers, read_failures, what_ended

WORKER = """
import json, sys
job = json.load(open(sys.argv[1]))
with open(job["trace"], "a") as trace:
    trace.write(job["name"] + "\\n")
if job["name"] == "bad":
    print("config error: no such thing", file=sys.stderr)
    print("  afterword", file=sys.stderr)
    sys.exit(2)
if job["name"] == "stops":
    sys.exit(3)
"""


WAITING = """
import json, os, pathlib, sys, time
job = json.load(open(sys.argv[1]))
folder = pathlib.Path(job["folder"])
(folder / job["name"]).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while not all((folder / name).exists() for name in "ab"):
    time.sleep(0.05)
"""


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    (tmp_path / "traced_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return Workers("traced_worker", tmp_path, 1, Ranks())


def run(workers: Workers, jobs: dict[str, tuple[str, ...]]) -> tuple[list[str], dict[str, str | None]]:
    """The order in which jobs ran, and how those that were yielded ended."""
    trace = workers.folder / "trace"
    trace.write_text("")
    ended = workers.run_all({n: Job({"name": n, "trace": str(trace)}, after) for n, after in jobs.items()})
    found = dict(ended)
    return trace.read_text().split(), found


def test_jobs_run_in_order_after_their_forerunners(workers: Workers) -> None:
    order, ended = run(workers, {"c": ("b",), "b": ("a",), "a": ("elsewhere",), "d": ()})
    assert order == ["a", "b", "c", "d"]
    assert ended == dict.fromkeys("abcd")


def test_what_needs_a_failed_job_is_not_started_and_the_rest_is(workers: Workers) -> None:
    order, ended = run(workers, {"bad": (), "next": ("bad",), "last": ("next",), "other": ()})
    assert order == ["bad", "other"]
    assert set(ended) == {"bad", "other"} and ended["other"] is None
    log = workers.folder / "jobs" / "bad.log"
    assert ended["bad"] == f"config error: no such thing (exit code 2); see {log}"
    assert json.loads((workers.folder / "jobs" / "bad.json").read_text())["name"] == "bad"


def test_a_worker_that_was_stopped_stops_the_others(workers: Workers) -> None:
    order, ended = run(workers, {"stops": (), "other": ()})
    assert order == ["stops"] and workers.stopped.is_set()
    assert ended["other"] == "not started"


def test_failures_are_kept_until_they_fail_otherwise(tmp_path: Path) -> None:
    assert read_failures(tmp_path) == {}
    Progress(failed={"a": "one", "b": "two"}).keep_failures(tmp_path)
    Progress(failed={"a": "three"}).keep_failures(tmp_path)
    assert read_failures(tmp_path) == {"a": "three", "b": "two"}


def test_jobs_side_by_side_have_a_card_each(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHODH_CARDS": "2", "CUDA_VISIBLE_DEVICES": "6,7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    (tmp_path / "waiting_worker.py").write_text(WAITING)
    both = Workers("waiting_worker", tmp_path, 2, Ranks())
    assert dict(both.run_all({n: Job({"name": n, "folder": str(tmp_path)}) for n in "ab"})) == dict.fromkeys("ab")
    assert sorted((tmp_path / n).read_text() for n in "ab") == ["6", "7"]


def test_side_by_side_and_on_several_ranks_is_refused(tmp_path: Path) -> None:
    ranks = Ranks()
    ranks.world = 2
    with pytest.raises(ConfigError, match="--jobs 2.* 2 ranks"):
        Workers("m", tmp_path, 2, ranks)


def test_study_on_more_ranks_than_cards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Ranks()
    place = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }
    for name, value in {"SHODH_CARDS": "1", "DS_ACCELERATOR": "cuda", **place}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CardsError, match="^2 ranks .* 1 CUDA device,"):
        Workers("m", tmp_path, 1, alone)


@pytest.mark.parametrize(
    ("code", "expected"),
    [(-11, "killed by SIGSEGV"), (-9, "killed by SIGKILL"), (2, "no data (exit code 2)")],
)
def test_a_failed_job_is_told_by_its_error_or_its_signal(tmp_path: Path, code: int, expected: str) -> None:
    log = tmp_path / "job.log"
    log.write_text("step 1: loss 1\nerror: no data\nvalidation at step 2: 0.9\n")
    assert what_ended(code, log) == expected
