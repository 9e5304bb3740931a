"""From requests to files: what is missing is solved, with a bar over all trajectories."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from shodh.generation.plan import Job, Part, Request, check_space, pending_parts, plan
from shodh.generation.solve import pick_workers, solve_all, write_missing_statistics


class Bar:
    """Progress over all trajectories, whatever the order in which files are solved."""

    def __init__(self, tasks: Sequence[tuple[Job, Part]]) -> None:
        self._weight = {str(part.path): part.count for _, part in tasks}
        self._done: dict[str, float] = {}
        total = sum(self._weight.values())
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        hidden = not total or not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc="trajectories", disable=hidden, bar_format=bar_format)

    def report(self, path: str, fraction: float) -> None:
        self._done[path] = fraction * self._weight[path]
        self._bar.update(sum(self._done.values()) - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def generate(
    requests: Request | Sequence[Request], device: str, workers: int | None = None, *, overwrite: bool = False
) -> list[tuple[Job, int]]:
    """Make the files of one or several requests that are not there yet; resumable.

    Parameters
    ----------
    requests : Request or sequence of Request
        Several: with folders of their own, on one disk.
    device : {"cpu", "cuda"}
    workers : int, optional
        Files solved side by side on a CPU; by default as many as cores.
    overwrite : bool
        Replace files that were made with other settings.

    Returns
    -------
    list of (Job, int)
        Every data set, and how many of its files were made now.

    Raises
    ------
    ConfigError, DataError
        The request is impossible, there are files of other settings, or there is no room.
    """
    wanted = [requests] if isinstance(requests, Request) else list(requests)
    jobs = [job for request in wanted for job in plan(request)]
    for request in wanted:
        request.out.mkdir(parents=True, exist_ok=True)
    pending = pending_parts(jobs, overwrite=overwrite)
    check_space(pending, wanted[0].out)
    bar = Bar(pending)
    try:
        solve_all(pending, device, pick_workers(workers, device, len(pending)), bar.report)
    finally:
        bar.close()
    write_missing_statistics(jobs)
    return [(job, sum(1 for other, _ in pending if other is job)) for job in jobs]
