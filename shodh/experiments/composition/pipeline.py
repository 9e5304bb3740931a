"""The stages of a study: data, then for each seed anchor, experts and evaluation, finished pieces passed over."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from shodh.checkpoint.description import is_pretrained
from shodh.config import RunConfig, to_dict
from shodh.core.devices import pick_device
from shodh.core.errors import ConfigError, DataError, ShodhError
from shodh.core.reading import read_object
from shodh.core.strict_json import to_json
from shodh.experiments.composition.data import make_data, missing_files
from shodh.experiments.composition.evaluate import measured_settings
from shodh.experiments.composition.settings import MEMBERS, CCMConfig, Member
from shodh.report.page import Table, text_table
from shodh.train.plan import ASSUMED_UTILISATION, PEAK_FLOPS, make_plan
from shodh.train.ranks import Ranks
from shodh.train.run_folder import RunFolder
from shodh.train.workers import Job, Progress, Workers

WORKER = "shodh.experiments.composition.worker"


@dataclass(frozen=True)
class Stage:
    """One job of a study: to train and convert a member of a seed, or, without a member, to evaluate the seed."""

    seed: int
    member: Member | None

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.member or 'evaluate'}"

    @property
    def after(self) -> tuple[str, ...]:
        """The stages whose results it needs."""
        if self.member == "anchor":
            return ()
        needed: Sequence[Member] = MEMBERS if self.member is None else ("anchor",)
        return tuple(Stage(self.seed, member).name for member in needed)

    def is_finished(self, study: CCMConfig) -> bool:
        if self.member is None:
            return is_evaluated(study, self.seed)
        return is_pretrained(study.folder_of(self.seed, self.member))

    def steps(self, study: CCMConfig) -> int:
        """Optimiser steps."""
        if self.member is None:
            return 0
        return study.anchor_steps if self.member == "anchor" else study.expert_steps


def is_evaluated(study: CCMConfig, seed: int) -> bool:
    """Whether a seed has results of this study's settings."""
    path = study.results_file(seed)
    return path.exists() and read_object(path).get("settings") == to_json(measured_settings(study))


def stages(study: CCMConfig) -> list[Stage]:
    """Every stage, seed by seed."""
    return [Stage(seed, member) for seed in range(study.seeds) for member in (*MEMBERS, None)]


def run_stages(study: CCMConfig, chosen: Sequence[Stage], jobs: int, ranks: Ranks) -> Progress:
    """Make the data, then run every chosen stage that is not finished; one that fails does not keep others from it.

    Raises
    ------
    ConfigError
        Side by side and on several ranks at once; a folder holds data or runs of other settings; or a stage needs
        another that is neither finished nor chosen.
    """
    workers = Workers(WORKER, study.folder, jobs, ranks)
    for stage in chosen:
        check_same(study, stage, ranks.world)
    finished = {stage.name for stage in stages(study) if stage.is_finished(study)}
    todo = ranks.agree("todo", [stage.name for stage in chosen if stage.name not in finished])
    progress = Progress([stage.name for stage in chosen if stage.name not in todo])
    if not todo:
        return progress
    waiting = [stage for stage in chosen if stage.name in todo]
    check_forerunners(waiting, finished)
    _make_data(study, jobs, ranks)
    if jobs > 1:  # All anchors first: they take longest, and everything waits for one.
        waiting.sort(key=lambda stage: len(stage.after))
    _run(study, waiting, workers, progress)
    progress.stopped = workers.stopped.is_set()
    if ranks.rank == 0:
        progress.keep_failures(study.folder)
    return progress


def _make_data(study: CCMConfig, jobs: int, ranks: Ranks) -> None:
    """On rank 0; all ranks learn what went wrong there."""
    error = None
    if ranks.rank == 0:
        try:
            make_data(study, pick_device("auto"), jobs if ranks.world == 1 else None)
        except ShodhError as caught:
            error = str(caught)
            if ranks.world == 1:
                raise
    if error := ranks.agree("data", error):
        raise DataError(error)


def _run(study: CCMConfig, waiting: Sequence[Stage], workers: Workers, progress: Progress) -> None:
    by_name = {stage.name: stage for stage in stages(study)}
    total = sum(stage.steps(study) for stage in by_name.values())
    done = sum(by_name[name].steps(study) for name in progress.finished)
    hidden = workers.ranks.rank != 0 or not sys.stderr.isatty()
    jobs = {stage.name: stage_job(study, stage) for stage in waiting}
    with tqdm(total=total, initial=done, unit="step", desc=study.name, disable=hidden) as bar:
        for name, line in workers.run_all(jobs):
            bar.set_postfix_str(name)
            bar.update(by_name[name].steps(study))
            if line is None:
                progress.finished.append(name)
            elif not workers.stopped.is_set():
                progress.failed[name] = line


def stage_job(study: CCMConfig, stage: Stage) -> Job:
    """What the worker of a stage is told."""
    return Job({"study": to_dict(study), "seed": stage.seed, "member": stage.member}, stage.after)


def check_forerunners(waiting: Sequence[Stage], finished: set[str]) -> None:
    """Refuse stages whose forerunners are neither finished nor to be run."""
    at_hand = finished | {stage.name for stage in waiting}
    for stage in waiting:
        if missing := [name for name in stage.after if name not in at_hand]:
            raise ConfigError(f"{stage.name} needs {', '.join(missing)}, which is not finished; choose it too")


def check_same(study: CCMConfig, stage: Stage, world_size: int) -> None:
    """Refuse a stage whose run was made with other settings."""
    if stage.member is None:
        return
    config = study.run_config(stage.seed, stage.member, world_size)
    if not (config.run_dir / "config.yaml").exists():
        return
    old, new = to_dict(RunFolder(config.run_dir).config()), to_dict(config)
    changed = [key for key in ("seed", "data", "operator", "family") if old[key] != new[key]]
    if changed:
        raise ConfigError(
            f"{config.run_dir} was trained with other settings of {' and '.join(changed)}; choose another --name, or "
            f"remove {study.folder}"
        )


def describe_study(study: CCMConfig, chosen: Sequence[Stage]) -> str:
    """What a study will make and cost, for ``--dry-run``: values, stages, sizes and floating-point work."""
    family = study.family
    missing = missing_files(study)
    rows: list[list[Any]] = []
    for value in family.values:
        files = sum(part.path.is_relative_to(study.value_folder(value)) for _, part in missing)
        part = "low" if value == family.low else "high" if value == family.high else ""
        rows.append([repr(value), family.role_of(value), part, files])
    values = Table([family.parameter, "role", "expert", "files to solve"], rows)
    rows, work, seconds = [], 0.0, 0.0
    configs: Mapping[Member, RunConfig] = {member: study.run_config(0, member) for member in MEMBERS}
    plan = make_plan(configs["anchor"])
    for stage in chosen:
        total = plan.flops_per_step * stage.steps(study)
        work += total
        seconds += total / (PEAK_FLOPS[configs["anchor"].operator.train.precision] * ASSUMED_UTILISATION)
        state = "finished" if stage.is_finished(study) else "to do"
        rows.append([stage.name, stage.steps(study) or "", total / 1e12 or "", state])
    size, active = plan.dense_parameters + plan.expert_parameters, plan.active_parameters
    return (
        f"study {study.name}: {study.question}\n{study.folder}: {study.seeds} seeds, base {study.base}, backbone "
        f"{study.backbone}: {size / 1e6:.3g} M parameters, {active / 1e6:.3g} M active\n\n"
        f"data in {study.data}\n{text_table(values)}\n\n"
        f"{text_table(Table(['stage', 'steps', 'TFLOP', 'state'], rows))}\n\n"
        f"{work / 1e15:.3g} PFLOP of training in all: {seconds / 3600:.3g} H100 hours at {ASSUMED_UTILISATION:.0%} of "
        f"the peak (assumed, not measured)\nmethods: {', '.join(study.methods)}\n"
    )
