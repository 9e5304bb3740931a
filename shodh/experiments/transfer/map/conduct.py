"""A map for the command line: what its runs are and cost, and how they are made, a group of them a process."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from shodh.core.errors import ConfigError
from shodh.data.fresh import FreshRegime
from shodh.experiments.harness.command import Study
from shodh.experiments.harness.flops import BACKWARD, flop_counter
from shodh.experiments.harness.ranks import Ranks
from shodh.experiments.harness.workers import Job, Progress, Workers
from shodh.experiments.transfer.map.learner import Learner, build_model, part
from shodh.experiments.transfer.map.report import write_map_report
from shodh.experiments.transfer.map.runs import MapRun, by_group, expand
from shodh.experiments.transfer.map.settings import DENSE_ROUTER, DENSE_TOTAL, SPECIALIST, MapConfig
from shodh.experiments.transfer.map.worker import job_of
from shodh.report.page import Table, text_table

_COUNTED: dict[tuple[str, str, int, int], int] = {}  # by study, model, width, and regimes where they matter
WORKER = "shodh.experiments.transfer.map.worker"


def map_study(study: MapConfig) -> Study[MapRun]:
    """A map as the command line needs it: its runs are made in groups."""
    return Study(
        study,
        expand=lambda world: _expand(study, world),
        describe=lambda runs: describe(study, runs),
        make=lambda chosen, _, jobs, ranks: _make(study, chosen, jobs, ranks),
        report=lambda runs: write_map_report(study, runs),
    )


def _expand(study: MapConfig, world: int) -> list[MapRun]:
    if world > 1:
        raise ConfigError(
            f"a map is of runs on one rank each, and there are {world}; start it without a launcher, with --jobs"
        )
    runs = expand(study)
    for run in {run.arm: run for run in runs if run.arm in study.apart}.values():
        _whole_model(run)  # Its patterns are looked at before anything is made.
    return runs


def _make(study: MapConfig, chosen: Sequence[MapRun], jobs: int, ranks: Ranks) -> Progress:
    """Make the chosen runs that are not finished, a process a group."""
    groups = by_group([run for run in chosen if not run.finished])
    progress = Progress([run.name for run in chosen if run.finished])
    if not groups:
        return progress
    workers = Workers(WORKER, study.folder, jobs, ranks)
    asked = {name: Job(job_of(study, name, runs)) for name, runs in groups.items()}
    for name, succeeded in workers.follow(asked, progress):
        progress.finished += [run.name for run in groups[name]] if succeeded else []
    return progress


def describe(study: MapConfig, runs: Sequence[MapRun]) -> str:
    """A line a kind of run: parameters, work, and the time on this machine, from a few steps of the dense model."""
    kinds: dict[tuple[int, int, str], list[MapRun]] = {}
    for run in runs:
        kinds.setdefault((run.dim, len(run.regimes), run.arm), []).append(run)
    rates = {dim: _seconds_per_flop(study, dim) for dim in dict.fromkeys(run.dim for run in runs)}
    rows: list[list[object]] = []
    work = seconds = 0.0
    for (dim, count, arm), same in kinds.items():
        first = same[0]
        train = first.operator.train
        flops = (1 + BACKWARD) * train.global_batch * sample_flops(first) * train.steps
        took = flops * rates[dim]
        size = sum(p.numel() for p in _whole_model(first).parameters())
        left = sum(not run.finished for run in same)
        rows.append([arm, count, dim, size / 1e6, train.steps, flops / 1e12, took, len(same), left])
        work += flops * left
        seconds += took * left
    header = ["model", "regimes", "width", "M parameters", "steps", "TFLOP", "s here", "runs", "to do"]
    groups = len(by_group([run for run in runs if not run.finished]))
    return (
        f"study {study.name}: {study.question}\n{study.folder}: {len(runs)} runs, {study.seeds} seeds\n\n"
        f"{text_table(Table(header, rows))}\n\n"
        f"to do: {work / 1e15:.3g} PFLOP in {groups} groups; {seconds / 60:.3g} minutes of one process here, without "
        "the solvers and what is measured (from the time of a few steps; --jobs divides it)\n"
    )


def _whole_model(run: MapRun) -> torch.nn.Module:
    with torch.device("meta"):
        return part(run, build_model(run), len(run.regimes))


def sample_flops(run: MapRun) -> int:
    """Products of one sample's forward pass; of a sparse model those of the dense one of equal active size."""
    wide = run.arm in (DENSE_ROUTER, DENSE_TOTAL)
    key = run.study.name, run.arm if wide else SPECIALIST, run.dim, len(run.regimes) if wide else 1
    if key not in _COUNTED:
        arm = key[1]
        _COUNTED[key] = _forward_flops(MapRun(run.study, arm, run.regimes, run.dim, run.fields, run.seed))
    return _COUNTED[key]


def _forward_flops(run: MapRun) -> int:
    with torch.device("meta"):
        model = build_model(run)
        history = torch.empty(1, run.study.history, model.latent_channels, *model.token_grid)
        static = torch.empty(1, 0, *model.token_grid)
    with flop_counter() as counter, torch.no_grad():
        model(history, static)
    return int(counter.get_total_flops())


def _seconds_per_flop(study: MapConfig, dim: int) -> float:
    """Of training the specialist of this width, the quickest of a few steps."""
    run = MapRun(study, SPECIALIST, study.regimes[:1], dim, study.fields[0], 0)
    data = {name: FreshRegime(name, study.grid, study.history + 1) for name in run.regimes}
    learner = Learner(run, data, torch.device("cpu"))
    frames = {name: regime.samples([("plan", n) for n in range(study.samples)]) for name, regime in data.items()}
    times = []
    for step in range(6):
        start = time.perf_counter()
        learner.step(step, frames)
        times.append(time.perf_counter() - start)
    return min(times) / ((1 + BACKWARD) * study.samples * sample_flops(run))
