"""What a run is doing, or how it ended, from its folder alone; nothing is written, and the run may write meanwhile."""

from __future__ import annotations

import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shodh.checkpoint.folder import LATEST, LOCK, published_folders, read_manifest
from shodh.config import RunConfig, load_kept_config
from shodh.core.errors import CheckpointError, ConfigError, ShodhError
from shodh.core.files import UNREADABLE, lock_owner
from shodh.core.reading import parse_json, read_text
from shodh.train.attempts import read_attempts
from shodh.train.events import read_events

RECENT = 200  # steps of which the time of a step is taken
SILENCE = 120.0  # seconds without a word after which a run on another machine, whose lock is not seen, is not running
EXPERTS = ("load_max_over_mean", "entropy", "dead_experts", "regime_information")


@dataclass
class Status:
    """Of a run; None where it does not say.

    Attributes
    ----------
    state : str
        ``running``, ``finished``, ``stopped`` (by a signal, at a checkpoint), ``failed``, ``killed`` (without a last
        word), ``damaged`` (see ``problems``), or ``unknown`` (of a version that kept no record).
    step, steps : int
        Steps that were written down, and those of the configuration.
    step_s, eta_s : float
        Seconds of a step, validation and checkpoints included; seconds to the end.
    silent_s : float
        Seconds since the newest line of metrics.
    events : dict
        How often each kind of fault was met (``events.jsonl``).
    """

    path: Path
    state: str = "unknown"
    stage: str | None = None
    owner: str | None = None
    why: str | None = None
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    samples_per_s: float | None = None
    mfu: float | None = None
    tflops: float | None = None
    step_s: float | None = None
    eta_s: float | None = None
    silent_s: float | None = None
    skipped: int = 0
    restarts: int | None = None
    events: dict[str, int] = field(default_factory=dict)
    checkpoint: str | None = None
    checkpoint_age_s: float | None = None
    experts: dict[str, float] = field(default_factory=dict)
    validation_step: int | None = None
    validation: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders among paths, or directly in them.

    Raises
    ------
    ConfigError
        A path is no run folder and holds none.
    """
    found: list[Path] = []
    for path in paths:
        runs = [path] if _is_run(path) else sorted(p for p in path.glob("*") if p.is_dir() and _is_run(p))
        if not runs:
            raise ConfigError(f"{path} is no run folder, and there is none in it: it has no config.yaml")
        found += runs
    return found


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.yaml", LOCK))


def read_status(path: Path) -> Status:
    """The status of a run folder, now."""
    status = Status(path)
    attempts = read_attempts(path)
    starts = [line for line in attempts if line.get("event") == "start"]
    last = attempts[-1] if attempts else None
    if starts:
        status.restarts, status.stage = len(starts) - 1, starts[-1].get("stage")
    config = _read_config(status)
    since = starts[-1]["time"] if starts else 0.0
    _read_metrics(status, since)
    _read_checkpoints(status)
    status.events = dict(Counter(event["kind"] for event in read_events(path)))
    status.owner = lock_owner(path / LOCK)
    status.state = _state(status, last, starts[-1].get("host") if starts else None)
    if config is not None:
        stage = config.tokenizer if status.stage == "tokenizer" else config.operator
        status.steps = stage.train.steps
        if status.state == "unknown" and status.step >= status.steps and status.checkpoint is not None:
            status.state = "finished"
        if status.state == "running" and status.step_s is not None:
            status.eta_s = max(0, status.steps - status.step) * status.step_s
    if last is not None and status.state in ("finished", "stopped", "failed"):
        status.why = last.get("why") or None
    return status


def _read_config(status: Status) -> RunConfig | None:
    try:
        config = load_kept_config(status.path / "config.yaml")
    except (ShodhError, OSError) as error:
        if (status.path / "config.yaml").exists():
            status.problems.append(" ".join(str(error).split()))
        return None
    if status.stage is None:  # A run of a version that kept no record.
        status.stage = "tokenizer" if status.path.name == config.tokenizer_dir.name else "operator"
    return config


def _state(status: Status, last: dict[str, Any] | None, host: str | None) -> str:
    if status.owner is not None:
        return "running"
    if last is not None and last.get("event") == "start":
        elsewhere = host != socket.gethostname()  # where a lock may not be seen from here
        if elsewhere and status.silent_s is not None and status.silent_s < max(SILENCE, 20 * (status.step_s or 0.0)):
            return "running"
    if status.problems:
        return "damaged"
    if last is None:
        return "unknown"
    return "killed" if last.get("event") == "start" else str(last.get("how"))


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of metrics, of which step and time are numbers; {} of one that is damaged, or not yet whole."""
    try:
        values = parse_json(line.decode(errors="replace"), "line")
        return {**values, "step": int(values["step"]), "time": float(values["time"])}
    except (ConfigError, *UNREADABLE):
        return {}


def _read_metrics(status: Status, since: float) -> None:
    """One pass over ``metrics.jsonl``; of its lines only those that are shown are parsed."""
    path = status.path / "metrics.jsonl"
    if not path.exists():
        return
    recent: deque[bytes] = deque(maxlen=RECENT)
    performance = experts = validation = b""
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if b'"train/loss"' in line:
                recent.append(line)
                status.skipped += b'"train/skipped": 1.0' in line
                performance = line if b'"perf/samples_per_s"' in line else performance
                experts = line if b'"moe/entropy"' in line else experts
            elif b'"valid/' in line:
                validation = line
    steps = [values for values in map(_parsed, recent) if values]
    if steps:
        newest = steps[-1]
        status.step, status.loss, status.grad_norm = newest["step"] + 1, newest["train/loss"], newest["train/grad_norm"]
        status.silent_s = time.time() - newest["time"]
        times = [values["time"] for values in steps if values["time"] >= since]
        if len(times) > 1:
            status.step_s = statistics.fmean(b - a for a, b in zip(times, times[1:], strict=False))
    values = _parsed(performance)
    status.samples_per_s, status.mfu = values.get("perf/samples_per_s"), values.get("perf/mfu")
    status.tflops = values.get("perf/tflops")
    values = _parsed(experts)
    status.experts = {name: values[f"moe/{name}"] for name in EXPERTS if f"moe/{name}" in values}
    if values := _parsed(validation):
        status.validation_step = values["step"] + 1
        status.validation = {n: v for n, v in values.items() if n.startswith("valid/") and "/moe/" not in n}


def _read_checkpoints(status: Status) -> None:
    """The newest checkpoint, the best one, and what is wrong with them. One may be pruned while it is looked at."""
    found = published_folders(status.path)
    broken = []
    for path in reversed(found):
        problem = _problem_of(path, status)
        if problem is None:
            break
        if path.exists():
            broken.append(problem)
    if broken and len(broken) == len(found):
        broken.append("no checkpoint is whole")
    status.problems += broken
    if not (status.path / LATEST).is_file():
        return
    try:
        named = read_text(status.path / LATEST, "name of a checkpoint", CheckpointError).strip()
    except CheckpointError as error:
        status.problems.append(str(error))
    else:
        if found and named not in {path.name for path in published_folders(status.path)}:
            status.problems.append(f"{LATEST} names {named[:80]!r}, which is no checkpoint")


def _problem_of(path: Path, status: Status) -> str | None:
    """What is missing of a checkpoint, by the sizes of its files; a whole one is put into the status."""
    try:
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"checkpoint {path.name}: {name} has {size} bytes, and {entry['size']} were written"
        age = time.time() - (path / "manifest.json").stat().st_mtime
        status.step = max(status.step, int(manifest["state"].get("step", 0)))
    except (ShodhError, OSError, *UNREADABLE) as error:
        return f"checkpoint {path.name}: {' '.join(str(error).split())}"
    status.checkpoint, status.checkpoint_age_s, status.best = path.name, age, manifest["state"].get("best")
    return None
