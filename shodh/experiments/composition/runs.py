"""The runs of a study: for each seed anchor, experts and evaluation; and the data they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shodh.checkpoint.convert import convert
from shodh.checkpoint.description import is_pretrained
from shodh.config import to_dict
from shodh.config.reading import section_from_dict
from shodh.core.devices import pick_device
from shodh.experiments.composition.data import make_data, missing_files
from shodh.experiments.composition.evaluate import evaluate_seed, measured_settings
from shodh.experiments.composition.settings import MEMBERS, CCMConfig, Member
from shodh.experiments.harness.costs import describe_costs
from shodh.experiments.harness.results import RESULT
from shodh.experiments.harness.run import Run, judged_checkpoint
from shodh.experiments.harness.runner import on_first_rank
from shodh.experiments.harness.workers import Workers
from shodh.report.page import Table, text_table


def expand(study: CCMConfig, world_size: int = 1) -> list[Run]:
    """Every run, seed by seed; labels: ``seed`` and ``member``, None for the evaluation.

    Raises
    ------
    ConfigError
        A member's configuration is impossible.
    """
    return [make(study, seed, member, world_size) for seed in range(study.seeds) for member in (*MEMBERS, None)]


def make(study: CCMConfig, seed: int, member: Member | None, world_size: int = 1) -> Run:
    """The run that trains and converts a member of a seed, experts from the anchor; or, without one, evaluates it."""
    needed: tuple[Member, ...] = MEMBERS if member is None else () if member == "anchor" else ("anchor",)
    return Run(
        f"seed{seed}-{member or 'evaluate'}",
        study.run_config(seed, member or "anchor", world_size),
        study.results_file(seed) if member is None else study.folder_of(seed, member) / RESULT,
        f"shodh.experiments.composition.runs:{'measure' if member is None else 'convert_member'}",
        {"seed": seed, "member": member},
        settings=measured_settings(study) if member is None else {},
        told={"study": to_dict(study)},
        weights=tuple(study.folder_of(seed, other) for other in needed),
        trains=member is not None,
        after=tuple(f"seed{seed}-{other}" for other in needed),
    )


def convert_member(run: Run, device: torch.device) -> dict[str, Any]:
    """Convert a trained member, unless it is; merging and evaluation read the converted folder."""
    out = run.result.parent
    if not is_pretrained(out):
        convert(run.config.run_dir, out, tag=judged_checkpoint(run.config.run_dir), verify=True)
    return {"converted": str(out)}


def measure(run: Run, device: torch.device) -> dict[str, Any]:
    """`evaluate_seed` of the study that the run was told."""
    return evaluate_seed(section_from_dict(CCMConfig, run.told["study"], run.name), run.labels["seed"], device)


def prepare(study: CCMConfig, runs: Sequence[Run], workers: Workers) -> None:
    """Make the data that are missing, on rank 0."""
    ranks = workers.ranks
    on_first_rank(
        ranks, "data", lambda: make_data(study, pick_device("auto"), workers.jobs if ranks.world == 1 else None)
    )


def describe_study(study: CCMConfig, chosen: Sequence[Run]) -> str:
    """What a study will make and cost, for ``--dry-run``: values, runs, sizes and floating-point work."""
    family = study.family
    missing = missing_files(study)
    rows: list[list[Any]] = []
    for value in family.values:
        files = sum(part.path.is_relative_to(study.value_folder(value)) for _, part in missing)
        part = "low" if value == family.low else "high" if value == family.high else ""
        rows.append([repr(value), family.role_of(value), part, files])
    values = text_table(Table([family.parameter, "role", "expert", "files to solve"], rows))
    costs = describe_costs(study, f"{study.base}, backbone {study.backbone}", chosen, lambda run: {})
    return f"{costs}\ndata in {study.data}\n{values}\n\nmethods: {', '.join(study.methods)}\n"
