"""From fine-tuning settings to cells: every way of training by number of trajectories and seed, as a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shodh.config import BalanceConfig, RegimeConfig, RunConfig, apply_overrides, config_from_dict, to_dict
from shodh.config.reading import merge_trees
from shodh.core.errors import ConfigError
from shodh.core.seeding import generator
from shodh.core.topology import fitting_ep_size
from shodh.experiments.finetuning.base import Base, check_regime, find_tokenizer
from shodh.experiments.finetuning.measure import count_trained
from shodh.experiments.finetuning.settings import TuningConfig
from shodh.experiments.transfer.measure import RESULT
from shodh.report.page import Table, text_table
from shodh.train.data_identity import new_choice
from shodh.train.datasets import open_sources
from shodh.train.jobs import plan_operator

ZERO_SHOT, SCRATCH = "zero_shot", "scratch"


@dataclass(frozen=True)
class TuningCell:
    """One way of meeting an unseen regime with ``count`` training trajectories; ``start``: the weights it begins with.

    ``way`` is ``zero_shot``, ``scratch``, or one of `shodh.experiments.finetuning.settings.Way`.
    """

    name: str
    regime: str
    way: str
    count: int
    seed: int
    start: Path | None
    config: RunConfig

    def describe(self) -> dict[str, Any]:
        """JSON-able, without the configuration."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("config", "start")}
        return {**kept, "steps": 0 if self.way == ZERO_SHOT else self.config.operator.train.steps}

    def job(self) -> dict[str, Any]:
        """What `shodh.experiments.transfer.worker` is told."""
        start = None if self.start is None else str(self.start)
        return {"kind": "tune", "cell": self.describe(), "start": start}


def expand_tuning(tuning: TuningConfig, base: Base, world_size: int = 1) -> list[TuningCell]:
    """Every cell, seeds outermost.

    Raises
    ------
    ConfigError, DataError, TopologyError
        A regime was learned, its data is missing or does not fit, there are fewer trajectories than asked for, or a
        cell's configuration is impossible; the message names it.
    """
    experts = base.config.operator.experts
    if experts.num_experts and experts.router.kind == "oracle":
        raise ConfigError(f"{base.path} has an oracle router, which has no experts for a regime it was not trained on")
    if experts.num_added and "new_expert" in tuning.train:
        raise ConfigError(f"{base.path} has added experts already; leave out new_expert")
    tree = apply_overrides(to_dict(base.config), tuning.set)
    tokenizer = find_tokenizer(base, tuning.out)
    cells = []
    for seed in range(tuning.seeds):
        for regime in tuning.regimes:
            chosen = draw_trajectories(regime, base, seed, tuning.trajectories)
            for count, way in _combinations(tuning):
                name = f"{regime.name}-n{count}-{way}-s{seed}"
                learned = regime.model_copy(update={"trajectories": chosen[:count]})
                config = _configure(tuning, tree, name, way, learned, seed, world_size, tokenizer)
                start = None if way == SCRATCH else base.weights
                cells.append(TuningCell(name, regime.name, way, count, seed, start, config))
    return cells


def ways(tuning: TuningConfig) -> tuple[str, ...]:
    """All ways, in the order of the report."""
    return (ZERO_SHOT, *tuning.train, SCRATCH)


def _combinations(tuning: TuningConfig) -> Iterator[tuple[int, str]]:
    for count in sorted(tuning.trajectories):
        for way in ways(tuning):
            yield count, way


def draw_trajectories(regime: RegimeConfig, base: Base, seed: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of as many training trajectories as the largest count, drawn by seed; the fewer are the first of these.

    Raises
    ------
    ConfigError
        The regime has fewer training trajectories.
    DataError
        Its data is missing or does not fit the base.
    """
    check_regime(regime, base)
    data = to_dict(base.config)
    data["data"]["regimes"] = [to_dict(regime)]
    config = config_from_dict(data, f"regime {regime.name!r}")
    choose = new_choice(config, base.weights)
    (source,) = open_sources(config, choose=choose)
    total = source.num_trajectories("train")
    if max(counts) > total:
        raise ConfigError(
            f"--trajectories {max(counts)}: regime {regime.name!r} has {total} training trajectories in {regime.path}; "
            f"use at most {total}"
        )
    order = torch.randperm(total, generator=generator(seed, "few-shot", regime.name))
    return tuple(order[: max(counts)].tolist())


def _configure(
    tuning: TuningConfig,
    tree: dict[str, Any],
    name: str,
    way: str,
    regime: RegimeConfig,
    seed: int,
    world_size: int,
    tokenizer: Path | None,
) -> RunConfig:
    """The run's configuration with one regime, its own steps, and what the way trains."""
    base = config_from_dict(tree, str(tuning.run))
    train = {"steps": tuning.steps, "warmup": tuning.steps // 10, "valid_every": 0, "checkpoint_every": 0}
    changes: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "out": str(tuning.out / "cells"),
        "data": {"regimes": [to_dict(regime)]},
        "operator": {"train": {**train, "lr": tuning.rate(way, base.operator.train.lr), "keep_checkpoints": 1}},
        "parallel": {"ep_size": _expert_ranks(tuning, base, world_size)},
        "family": None,
    }
    if tokenizer is not None:
        changes["tokenizer"] = {"run": str(tokenizer), "unseen_regimes": True}
    if way not in (ZERO_SHOT, SCRATCH):
        router = way == "experts" and tuning.router
        changes["finetune"] = {"train": way, "router": router}
        if way != "all" and not router:
            changes["operator"]["experts"] = _still_router(base)
        if way == "new_expert":
            changes["operator"]["experts"]["num_added"] = tuning.num_added
    config = config_from_dict(merge_trees(tree, changes), f"{tuning.name}, cell {name}")
    plan_operator(config, world_size)
    return config


def _expert_ranks(tuning: TuningConfig, base: RunConfig, world_size: int) -> int:
    """The degree that ``set`` names, or the run's as far as it fits the ranks."""
    if any(setting.startswith("parallel.ep_size=") for setting in tuning.set):
        return base.parallel.ep_size
    return fitting_ep_size(world_size, base.parallel.ep_size, base.operator.experts.num_experts)


def _still_router(base: RunConfig) -> dict[str, Any]:
    """A frozen router keeps its temperature and selection biases too, and no balance term pushes on its inputs."""
    changes: dict[str, Any] = {"balance": dict.fromkeys(BalanceConfig.model_fields, 0.0)}
    schedule = base.operator.experts.router.temperature_schedule
    if schedule is not None:
        changes["router"] = {"temperature_schedule": {**to_dict(schedule), "decay": 1.0}}
    return changes


def describe_cells(tuning: TuningConfig, cells: Sequence[TuningCell]) -> str:
    """What there is to run, one line a cell."""
    rows: list[list[Any]] = []
    counted: dict[str, dict[str, int]] = {}
    for cell in cells:
        if cell.way not in counted:
            counted[cell.way] = count_trained(cell.config, trains=cell.way != ZERO_SHOT)
        size = counted[cell.way]
        done = "finished" if (cell.config.run_dir / RESULT).exists() else "to do"
        steps = cell.describe()["steps"]
        rows.append([cell.name, cell.way, cell.count, steps, size["trained"] / 1e6, size["total"] / 1e6, done])
    header = ["cell", "way", "trajectories", "steps", "M trained", "M parameters", "state"]
    return f"{tuning.out}: {len(cells)} cells, from {tuning.run}\n\n{text_table(Table(header, rows))}\n"
