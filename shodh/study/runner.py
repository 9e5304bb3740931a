"""Run the cells of a study: on all ranks one after another, or several side by side on one rank each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

import shodh
from shodh.config import RunConfig, to_dict
from shodh.errors import ConfigError, ShodhError
from shodh.files import write_atomically
from shodh.study.cells import Cell, tokenizer_config
from shodh.study.measure import RESULT
from shodh.study.ranks import Ranks
from shodh.study.settings import StudyConfig
from shodh.study.worker import STOPPED
from shodh.train.run_folder import RunFolder

ROOT = Path(shodh.__file__).resolve().parents[1]
FAILURES = "failures.json"


@dataclass
class Progress:
    """How a study stands: names of finished cells, the last line of those that failed, whether a signal ended it."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


class Runnable(Protocol):
    """What a runner needs of a cell: a name, and the configuration of its run."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> RunConfig: ...


CellType = TypeVar("CellType", bound=Runnable)


def run_cells(
    study: StudyConfig, cells: Sequence[Cell], jobs: int, ranks: Ranks, keep_checkpoints: bool = False
) -> Progress:
    """Train and measure every cell of a study that has no result yet; see `run_jobs`.

    A measured cell keeps its last checkpoint, or all with ``keep_checkpoints``.

    Raises
    ------
    ShodhError
        The tokenizer, which all cells need, could not be trained.
    """
    regimes = {r.name: r for r in study.base_config().data.regimes}
    probe = study.plasticity
    fresh = None if probe is None else {"probe": to_dict(probe), "regime": to_dict(regimes[probe.regime])}
    common = {
        "kind": "cell",
        "fresh": fresh,
        "gradient_samples": study.gradient_samples,
        "keep_checkpoints": keep_checkpoints,
    }

    def prepare(runner: Runner) -> None:
        _prepare_tokenizer(runner, study, cells)

    return run_jobs(
        study.folder, cells, lambda cell: {**common, "cell": cell.describe()}, jobs, ranks, study.name, prepare
    )


def run_jobs(
    folder: Path,
    cells: Sequence[CellType],
    describe: Callable[[CellType], dict[str, Any]],
    jobs: int,
    ranks: Ranks,
    title: str,
    prepare: Callable[[Runner], None] = lambda runner: None,
) -> Progress:
    """Run the job of every cell that has no result yet; one that fails does not keep the others from running.

    Parameters
    ----------
    folder : Path
        Where jobs, their logs and the failures are kept.
    describe : callable
        The job of a cell, for `shodh.study.worker`; its configuration is added.
    title : str
        Of the progress bar.
    prepare : callable
        Called before the first cell, if there is one to run.

    Raises
    ------
    ConfigError
        Side by side and on several ranks at once; or a cell's folder holds a run with other settings.
    """
    if jobs > 1 and ranks.world > 1:
        raise ConfigError(f"--jobs {jobs} is for cells on one rank each; on {ranks.world} ranks they run one by one")
    for cell in cells:
        check_same(cell)
    todo = ranks.agree("todo", [cell.name for cell in cells if not (cell.config.run_dir / RESULT).exists()])
    by_name = {cell.name: cell for cell in cells}
    progress = Progress([cell.name for cell in cells if cell.name not in todo])
    if not todo:
        return progress
    runner = Runner(folder, jobs, ranks)
    prepare(runner)
    total = sum(cell.config.operator.train.steps for cell in cells)
    done = sum(by_name[name].config.operator.train.steps for name in progress.finished)
    hidden = ranks.rank != 0 or not sys.stderr.isatty()
    with tqdm(total=total, initial=done, unit="step", desc=title, disable=hidden) as bar:
        for name, line in runner.run([(by_name[name], describe(by_name[name])) for name in todo], bar):
            if line is None:
                progress.finished.append(name)
            elif not runner.stopped.is_set():
                progress.failed[name] = line
    progress.stopped = runner.stopped.is_set()
    if ranks.rank == 0:
        failed = {**read_failures(folder), **progress.failed}
        write_atomically(folder / FAILURES, json.dumps(failed, indent=1) + "\n")
    return progress


def read_failures(folder: Path) -> dict[str, str]:
    """Cells that have failed, and why, when they last did; some may be finished by now."""
    path = folder / FAILURES
    failed: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return failed


def check_same(cell: Runnable) -> None:
    """Refuse a cell whose folder was made with other settings."""
    path = cell.config.run_dir / "config.yaml"
    if not path.exists():
        return
    old, new = to_dict(RunFolder(cell.config.run_dir).config()), to_dict(cell.config)
    changed = [
        key for key in ("seed", "data", "tokenizer", "operator", "evaluation", "finetune") if old[key] != new[key]
    ]
    if changed:
        raise ConfigError(
            f"cell {cell.name} in {cell.config.run_dir} has other settings of {' and '.join(changed)}; choose another "
            "--name, or remove the folder"
        )


def _prepare_tokenizer(runner: Runner, study: StudyConfig, cells: Sequence[Cell]) -> None:
    """Train the tokenizer of a study on latents, and encode the data once for every mix."""
    config = tokenizer_config(study)
    if config.operator.in_field_space:
        return
    mixes = list(dict.fromkeys(cell.regimes for cell in cells))
    if study.plasticity is not None:
        mixes.append((study.plasticity.regime,))
    line = runner.job("tokenizer", {"kind": "prepare", "mixes": list(dict.fromkeys(mixes))}, config)
    if line is not None and not runner.stopped.is_set():
        raise ShodhError(f"the tokenizer of the study could not be made: {line}")


class Runner:
    """Starts jobs in processes of their own, and hands signals on to them."""

    def __init__(self, folder: Path, jobs: int, ranks: Ranks) -> None:
        self.folder, self.jobs, self.ranks = folder, jobs, ranks
        self.stopped = threading.Event()
        self._children: set[subprocess.Popen[str]] = set()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        """Hand the signal on: every cell at work saves a checkpoint and ends; no other is started."""
        self.stopped.set()
        for child in list(self._children):
            child.terminate()

    def run(self, work: Sequence[tuple[Runnable, dict[str, Any]]], bar: Any) -> Iterator[tuple[str, str | None]]:
        """Yield (name, None or the last line of the error) of each cell as it ends."""
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = {pool.submit(self.job, cell.name, job, cell.config): cell for cell, job in work}
            for done in as_completed(waiting):
                cell = waiting[done]
                bar.set_postfix_str(cell.name)
                bar.update(cell.config.operator.train.steps)
                yield cell.name, done.result()

    def job(self, name: str, job: dict[str, Any], config: RunConfig) -> str | None:
        """Run one job on this rank, with the others on theirs; None, or one line that says what went wrong."""
        if self.stopped.is_set():
            return "not started"
        path = self.folder / "jobs" / f"{name}.json"
        if self.ranks.rank == 0:
            write_atomically(path, json.dumps({**job, "config": to_dict(config)}, indent=1) + "\n")
        log = path.with_suffix(f".rank{self.ranks.rank}.log" if self.ranks.world > 1 else ".log")
        environment = {**os.environ, **self.ranks.environment(name)}
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * self.ranks.world_here))
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stderr:
            command = [sys.executable, "-m", "shodh.study.worker", str(path)]
            child = subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr, text=True)
            self._children.add(child)
            if self.stopped.is_set():  # The signal came while it was started.
                child.terminate()
            code = _wait(child, lambda: self.ranks.failed(name))
            self._children.discard(child)
        if code == STOPPED:
            self.stopped.set()
        line = None if code == 0 else f"{what_ended(code, log)}; see {log}"
        return self.ranks.finish(name, line)


def _wait(child: subprocess.Popen[str], failed_elsewhere: Callable[[], bool], patience: float = 5.0) -> int:
    """The exit code of a child; it is ended some seconds after another rank's has failed, for which it would wait."""
    deadline: float | None = None
    while child.poll() is None:
        if deadline is None and failed_elsewhere():
            deadline = time.monotonic() + patience
        if deadline is not None and time.monotonic() > deadline:
            child.kill()
        time.sleep(0.1)
    return child.wait()


def what_ended(code: int, log: Path) -> str:
    """The error of a job that ended with this code; one that a signal ended had no time to say why."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"{last_error(log)} (exit code {code})"


def last_error(log: Path) -> str:
    """The line of a log that says what went wrong: its last ``error:`` line, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line.lower()]
    return (errors or lines or ["no output"])[-1]
