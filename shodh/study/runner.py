"""Run the cells of a study: on all ranks one after another, or several side by side on one rank each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from shodh.config import to_dict
from shodh.errors import ConfigError, ShodhError
from shodh.study.cells import Cell, tokenizer_config
from shodh.study.measure import RESULT
from shodh.study.settings import StudyConfig
from shodh.train.ranks import Ranks
from shodh.train.run_folder import RunFolder
from shodh.train.workers import Job, Progress, Workers


def run_cells(
    study: StudyConfig, cells: Sequence[Cell], jobs: int, ranks: Ranks, keep_checkpoints: bool = False
) -> Progress:
    """Train and measure every cell that has no result yet; one that fails does not keep the others from running.

    A measured cell keeps its last checkpoint, or all with ``keep_checkpoints``.

    Raises
    ------
    ConfigError
        Side by side and on several ranks at once; or a cell's folder holds a run with other settings.
    ShodhError
        The tokenizer, which all cells need, could not be trained.
    """
    workers = Workers("shodh.study.worker", study.folder, jobs, ranks)
    for cell in cells:
        check_same(cell)
    todo = ranks.agree("todo", [cell.name for cell in cells if not (cell.config.run_dir / RESULT).exists()])
    by_name = {cell.name: cell for cell in cells}
    progress = Progress([cell.name for cell in cells if cell.name not in todo])
    if not todo:
        return progress
    prepare(study, cells, workers)
    total = sum(cell.config.operator.train.steps for cell in cells)
    done = sum(by_name[name].config.operator.train.steps for name in progress.finished)
    hidden = ranks.rank != 0 or not sys.stderr.isatty()
    with tqdm(total=total, initial=done, unit="step", desc=study.name, disable=hidden) as bar:
        for name, line in workers.run_all(cell_jobs(study, [by_name[name] for name in todo], keep_checkpoints)):
            bar.set_postfix_str(name)
            bar.update(by_name[name].config.operator.train.steps)
            if line is None:
                progress.finished.append(name)
            elif not workers.stopped.is_set():
                progress.failed[name] = line
    progress.stopped = workers.stopped.is_set()
    if ranks.rank == 0:
        progress.keep_failures(study.folder)
    return progress


def check_same(cell: Cell) -> None:
    """Refuse a cell whose folder was made by a study with other settings."""
    path = cell.config.run_dir / "config.yaml"
    if not path.exists():
        return
    old, new = to_dict(RunFolder(cell.config.run_dir).config()), to_dict(cell.config)
    changed = [key for key in ("seed", "data", "tokenizer", "operator", "evaluation") if old[key] != new[key]]
    if changed:
        raise ConfigError(
            f"cell {cell.name} in {cell.config.run_dir} has other settings of {' and '.join(changed)}; choose another "
            "--name, or remove the folder"
        )


def prepare(study: StudyConfig, cells: Sequence[Cell], workers: Workers) -> None:
    """Train the tokenizer that all cells share, and encode the data once for every mix."""
    config = tokenizer_config(study)
    if config.operator.in_field_space:
        return
    mixes = [cell.regimes for cell in cells]
    if study.plasticity is not None:
        mixes.append((study.plasticity.regime,))
    job = {"kind": "prepare", "mixes": list(dict.fromkeys(mixes)), "config": to_dict(config)}
    line = workers.run("tokenizer", job)
    if line is not None and not workers.stopped.is_set():
        raise ShodhError(f"the tokenizer of the study could not be made: {line}")


def cell_jobs(study: StudyConfig, cells: Sequence[Cell], keep_checkpoints: bool = False) -> dict[str, Job]:
    """What the workers of the cells are told."""
    regimes, probe = {r.name: r for r in study.base_config().data.regimes}, study.plasticity
    fresh = None if probe is None else {"probe": to_dict(probe), "regime": to_dict(regimes[probe.regime])}
    common = {
        "kind": "cell",
        "fresh": fresh,
        "gradient_samples": study.gradient_samples,
        "keep_checkpoints": keep_checkpoints,
    }
    return {cell.name: Job({**common, "cell": cell.describe(), "config": to_dict(cell.config)}) for cell in cells}
