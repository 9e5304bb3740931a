"""Make the runs of a study: on all ranks one after another, or several side by side on one rank each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from shodh.core.errors import ConfigError, DataError, ShodhError
from shodh.experiments.harness.ranks import Ranks
from shodh.experiments.harness.run import Run
from shodh.experiments.harness.workers import Job, Progress, Workers

WORKER = "shodh.experiments.harness.worker"


def run_all(
    folder: Path,
    runs: Sequence[Run],
    jobs: int,
    ranks: Ranks,
    title: str,
    prepare: Callable[[Workers], None] | None = None,
) -> Progress:
    """Make every run that is not finished; one that fails does not keep others from running, but for those after it.

    Parameters
    ----------
    folder : Path
        Where jobs, their logs and the failures are kept.
    title : str
        Of the progress bar.
    prepare : callable, optional
        What all runs need: called on every rank before the first run, if there is one to make.

    Raises
    ------
    ConfigError
        Side by side and on several ranks at once.
    ShodhError
        ``prepare`` failed, on some rank.
    """
    workers = Workers(WORKER, folder, jobs, ranks)
    todo = ranks.agree("todo", [run.name for run in runs if not run.finished])
    waiting = [run for run in runs if run.name in todo]
    progress = Progress([run.name for run in runs if run.name not in todo])
    if not waiting:
        return progress
    if prepare is not None:
        prepare(workers)
    if jobs > 1:  # Those that others wait for come first.
        waiting.sort(key=lambda run: len(run.after))
    steps = {run.name: run.steps for run in runs}
    done = sum(steps[name] for name in progress.finished)
    hidden = ranks.rank != 0 or not sys.stderr.isatty()
    with tqdm(total=sum(steps.values()), initial=done, unit="step", desc=title, disable=hidden) as bar:
        for name, succeeded in workers.follow({run.name: Job(run.to_job(), run.after) for run in waiting}, progress):
            bar.set_postfix_str(name)
            bar.update(steps[name])
            progress.finished += [name] * succeeded
    return progress


def check_forerunners(chosen: Sequence[Run], every: Sequence[Run]) -> None:
    """Refuse a choice of runs that need others which are neither finished nor chosen; raises `ConfigError`."""
    at_hand = {run.name for run in every if run.finished} | {run.name for run in chosen}
    for run in chosen:
        if not run.finished and (missing := [name for name in run.after if name not in at_hand]):
            raise ConfigError(f"{run.name} needs {', '.join(missing)}, which is not finished; choose it too")


def on_first_rank(ranks: Ranks, what: str, make: Callable[[], object]) -> None:
    """Call ``make`` on rank 0; all ranks learn what went wrong there."""
    error = None
    if ranks.rank == 0:
        try:
            make()
        except ShodhError as caught:
            if ranks.world == 1:
                raise
            error = str(caught)
    if error := ranks.agree(what, error):
        raise DataError(error)
