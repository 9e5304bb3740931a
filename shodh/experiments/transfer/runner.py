"""Run the cells of a study: on all ranks one after another, or several side by side on one rank each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from shodh.config import RunConfig, to_dict
from shodh.core.errors import ConfigError, ShodhError
from shodh.experiments.transfer.cells import Cell, tokenizer_config
from shodh.experiments.transfer.measure import RESULT
from shodh.experiments.transfer.settings import StudyConfig
from shodh.train.ranks import Ranks
from shodh.train.run_folder import RunFolder
from shodh.train.workers import Job, Progress, Workers


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
    regimes, probe = {r.name: r for r in study.base_config().data.regimes}, study.plasticity
    common = {
        "kind": "cell",
        "fresh": None if probe is None else {"probe": to_dict(probe), "regime": to_dict(regimes[probe.regime])},
        "gradient_samples": study.gradient_samples,
        "keep_checkpoints": keep_checkpoints,
    }

    def describe(cell: Cell) -> dict[str, Any]:
        return {**common, "cell": cell.describe()}

    def prepare(workers: Workers) -> None:
        _prepare_tokenizer(study, cells, workers)

    return run_jobs(study.folder, cells, describe, jobs, ranks, study.name, prepare)


def run_jobs(
    folder: Path,
    cells: Sequence[CellType],
    describe: Callable[[CellType], dict[str, Any]],
    jobs: int,
    ranks: Ranks,
    title: str,
    prepare: Callable[[Workers], None] = lambda workers: None,
) -> Progress:
    """Run the job of every cell that has no result yet; one that fails does not keep the others from running.

    Parameters
    ----------
    folder : Path
        Where jobs, their logs and the failures are kept.
    describe : callable
        The job of a cell, for `shodh.experiments.transfer.worker`; its configuration is added.
    title : str
        Of the progress bar.
    prepare : callable
        Called before the first cell, if there is one to run.

    Raises
    ------
    ConfigError
        Side by side and on several ranks at once; or a cell's folder holds a run with other settings.
    """
    workers = Workers("shodh.experiments.transfer.worker", folder, jobs, ranks)
    for cell in cells:
        check_same(cell)
    todo = ranks.agree("todo", [cell.name for cell in cells if not (cell.config.run_dir / RESULT).exists()])
    by_name = {cell.name: cell for cell in cells}
    progress = Progress([cell.name for cell in cells if cell.name not in todo])
    if not todo:
        return progress
    prepare(workers)
    work = {name: Job({**describe(by_name[name]), "config": to_dict(by_name[name].config)}) for name in todo}
    total = sum(cell.config.operator.train.steps for cell in cells)
    done = sum(by_name[name].config.operator.train.steps for name in progress.finished)
    hidden = ranks.rank != 0 or not sys.stderr.isatty()
    with tqdm(total=total, initial=done, unit="step", desc=title, disable=hidden) as bar:
        for name, line in workers.run_all(work):
            bar.set_postfix_str(name)
            bar.update(by_name[name].config.operator.train.steps)
            if line is None:
                progress.finished.append(name)
            elif not workers.stopped.is_set():
                progress.failed[name] = line
    progress.stopped = workers.stopped.is_set()
    if ranks.rank == 0:
        progress.keep_failures(folder)
    return progress


def check_same(cell: Runnable) -> None:
    """Refuse a cell whose folder was made with other settings."""
    path = cell.config.run_dir / "config.yaml"
    if not path.exists():
        return
    old, new = to_dict(RunFolder(cell.config.run_dir).config()), to_dict(cell.config)
    keys = ("seed", "data", "tokenizer", "operator", "evaluation", "finetune")
    changed = [key for key in keys if old[key] != new[key]]
    if changed:
        raise ConfigError(
            f"cell {cell.name} in {cell.config.run_dir} has other settings of {' and '.join(changed)}; choose another "
            "--name, or remove the folder"
        )


def _prepare_tokenizer(study: StudyConfig, cells: Sequence[Cell], workers: Workers) -> None:
    """Train the tokenizer that all cells share, and encode the data once for every mix."""
    config = tokenizer_config(study)
    if not config.has_tokenizer:
        return
    mixes = [cell.regimes for cell in cells]
    if study.plasticity is not None:
        mixes.append((study.plasticity.regime,))
    job = {"kind": "prepare", "mixes": list(dict.fromkeys(mixes)), "config": to_dict(config)}
    line = workers.run("tokenizer", job)
    if line is not None and not workers.stopped.is_set():
        raise ShodhError(f"the tokenizer of the study could not be made: {line}")
