"""The status of a run, from files in every state a run can be in."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shodh.checkpoint.folder import LOCK, tag_of
from shodh.commands import status as command
from shodh.config import dump_config, load_config
from shodh.core.errors import ConfigError
from shodh.core.files import checksum, lock_file, lock_owner
from shodh.train.status import find_runs, read_status

STEPS = 100


def metric_lines(steps: range, began: float, every: float = 2.0, skipped: tuple[int, ...] = ()) -> str:
    lines: list[dict[str, Any]] = []
    for step in steps:
        line = {"step": step, "time": began + every * step, "train/loss": 1.0 / (step + 1), "train/grad_norm": 0.5}
        lines.append({**line, "train/skipped": float(step in skipped)})
        if step % 10 == 9:
            lines[-1] |= {"perf/samples_per_s": 8.0, "perf/mfu": 0.25, "moe/entropy": 0.9, "moe/dead_experts": 1.0}
    lines.append({"step": steps[-1], "time": began + every * steps[-1], "valid/nmse": 0.3, "valid/nmse/a": 0.2})
    return "".join(json.dumps(line) + "\n" for line in lines)


def checkpoint(run: Path, step: int, best: int | None = None) -> Path:
    folder = run / "checkpoints" / tag_of(step)
    folder.mkdir(parents=True)
    file = folder / "model.safetensors"
    file.write_bytes(b"weights")
    state = {"step": step, "best": None if best is None else {"step": best, "measure": "valid/nmse", "value": 0.1}}
    files = {file.name: {"size": 7, "sha256": checksum(file)}}
    (folder / "manifest.json").write_text(json.dumps({"files": files, "state": state, "topology": {}}))
    (run / "latest").write_text(folder.name + "\n")
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """``make(name, done, ended)``: a run folder with so many steps, whose last attempt ended so (None: without a word).

    Two attempts, the second from the checkpoint of half of the steps.
    """

    def make_run(name: str, done: int, ended: str | None = None, why: str = "") -> Path:
        run = tmp_path / name
        run.mkdir()
        changes = [f"name={name}", f"out={tmp_path}", f"operator.train.steps={STEPS}"]
        (run / "config.yaml").write_text(dump_config(load_config("demo", changes)))
        began = time.time() - 2.0 * done
        (run / "metrics.jsonl").write_text(metric_lines(range(done), began, skipped=(3, 7)))
        checkpoint(run, max(1, done // 2), best=1)
        if ended in ("finished", "stopped"):
            checkpoint(run, done, best=1)
        here = {"event": "start", "stage": "operator", "host": os.uname().nodename}
        events = [{**here, "time": began, "step": 0}, {**here, "time": began + 1, "step": done // 2}]
        if ended is not None:
            events.append({"event": "end", "time": time.time(), "step": done, "how": ended, "why": why})
        (run / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return run

    return make_run


def test_a_running_run_says_where_it_is_and_when_it_will_be_done(make: Callable[..., Path]) -> None:
    run = make("run", 60)
    (run / "events.jsonl").write_text('{"kind": "spike", "step": 3, "time": 1.0}\n' * 2 + "7\n")
    with lock_file(run / LOCK), (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 60, "time": 1')  # at work on a line
        metrics.flush()
        found = read_status(run)
        assert (found.state, found.step, found.steps, found.stage) == ("running", 60, STEPS, "operator")
        assert found.owner is not None and str(os.getpid()) in found.owner
    assert found.step_s == pytest.approx(2.0) and found.eta_s == pytest.approx(80.0, rel=1e-3)
    assert (found.loss, found.skipped, found.restarts, found.events) == (1 / 60, 2, 1, {"spike": 2})
    assert (found.samples_per_s, found.mfu) == (8.0, 0.25)
    assert found.experts == {"entropy": 0.9, "dead_experts": 1.0}
    assert found.validation == {"valid/nmse": 0.3, "valid/nmse/a": 0.2} and found.validation_step == 60
    assert found.checkpoint == tag_of(30) and found.best == {"step": 1, "measure": "valid/nmse", "value": 0.1}
    assert lock_owner(run / LOCK) is None


@pytest.mark.parametrize(
    ("done", "ended", "state"),
    [(STEPS, "finished", "finished"), (40, "stopped", "stopped"), (40, "failed", "failed"), (40, None, "killed")],
)
def test_how_a_run_ended(make: Callable[..., Path], done: int, ended: str | None, state: str) -> None:
    found = read_status(make("run", done, ended, "no disk space left" if ended == "failed" else ""))
    assert (found.state, found.step, found.eta_s, found.problems) == (state, done, None, [])
    assert found.why == ("no disk space left" if ended == "failed" else None)


def test_a_run_on_another_machine_is_running_while_it_speaks(make: Callable[..., Path]) -> None:
    """Where the file system does not show the locks of other machines."""
    run = make("run", 60)
    path = run / "attempts.jsonl"
    path.write_text(path.read_text().replace(os.uname().nodename, "elsewhere"))
    assert read_status(run).state == "running"
    (run / "metrics.jsonl").write_text(metric_lines(range(60), time.time() - 1000.0))
    assert read_status(run).state == "killed"


def test_a_run_of_a_version_without_a_record(make: Callable[..., Path]) -> None:
    for name, done, state in (("whole", STEPS, "finished"), ("part", 40, "unknown")):
        run = make(name, done, "finished")
        (run / "attempts.jsonl").unlink()
        found = read_status(run)
        assert (found.state, found.restarts, found.stage) == (state, None, "operator")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda run: (run / "checkpoints" / tag_of(40) / "model.safetensors").write_bytes(b"wei"),
    "missing file": lambda run: (run / "checkpoints" / tag_of(40) / "model.safetensors").unlink(),
    "no manifest": lambda run: (run / "checkpoints" / tag_of(40) / "manifest.json").unlink(),
    "manifest": lambda run: (run / "checkpoints" / tag_of(40) / "manifest.json").write_bytes(b"\xff\x00{"),
    "latest": lambda run: (run / "latest").write_text("step_99999999\n"),
    "latest is no text": lambda run: (run / "latest").write_bytes(b"\xff\xfe step"),
    "config": lambda run: (run / "config.yaml").write_text("name: [\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_what_can_be_said_is_said(make: Callable[..., Path], damage: str) -> None:
    run = make("run", 40, "stopped")
    DAMAGES[damage](run)
    found = read_status(run)
    assert found.state == "damaged" and len(found.problems) == 1 and found.step == 40
    older = damage in ("truncated", "missing file", "no manifest", "manifest")
    assert found.checkpoint == tag_of(20 if older else 40)


def test_whatever_lies_in_the_files_the_status_is_told(make: Callable[..., Path]) -> None:
    run = make("run", 40, "stopped")
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    lines[-2] = b'{"step": 1e999, "train/loss": NaN}'
    nan = {"step": 40, "time": None, "train/loss": None, "train/grad_norm": None, "train/skipped": 1.0}
    lines += [b"\xff" * 50 + b'"train/loss"', json.dumps(nan).encode(), b"[" * 5000 + b'"train/loss"']
    lines += [b'{"step": 41, "time": 5, "train/loss": null, "train/grad_norm": null, "train/skipped": 1.0}']
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (run / "attempts.jsonl").write_bytes(b'7\n[]\n{"step": "x"}\n\xff\n')
    found = read_status(run)
    assert (found.step, found.loss, found.restarts) == (42, None, None)
    command.show([run], as_json=False)


def test_several_runs_are_a_table_and_json_is_strict(make: Callable[..., Path], capsys: Any, tmp_path: Path) -> None:
    make("a", 40, None)
    make("b", STEPS, "finished")
    (tmp_path / "no_run").mkdir()
    assert command.main([str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows] == ["state", "killed", "finished"]
    assert command.main([str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [(run["state"], run["skipped"], run["steps"]) for run in found] == [("killed", 2, 100), ("finished", 2, 100)]
    with pytest.raises(ConfigError):
        find_runs([tmp_path / "no_run"])


def test_watching_looks_again_until_it_is_interrupted(
    make: Callable[..., Path], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, naps = make("run", 40, "stopped"), iter((None, KeyboardInterrupt()))

    def nap(seconds: float) -> None:
        if (end := next(naps)) is not None:
            raise end

    monkeypatch.setattr("shodh.commands.status.time.sleep", nap)
    assert command.main([str(run), "--watch", "5", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_to_look_at_a_lock_does_not_keep_a_job_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LOCK
    assert lock_owner(path) is None and not path.exists()
    path.touch()
    with path.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr("shodh.core.files.time.sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
        lock_file(path).close()


def test_the_status_needs_no_torch() -> None:
    code = "import sys, shodh.commands.status, shodh.train.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
