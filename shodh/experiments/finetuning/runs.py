"""From fine-tuning settings to runs: every method of training by number of trajectories and seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
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
from shodh.experiments.harness.costs import describe_costs
from shodh.experiments.harness.results import RESULT
from shodh.experiments.harness.run import Run
from shodh.train.data_identity import new_choice
from shodh.train.datasets import open_sources
from shodh.train.plan import plan_ranks

ZERO_SHOT, SCRATCH = "zero_shot", "scratch"


def expand_tuning(tuning: TuningConfig, base: Base, world_size: int = 1) -> list[Run]:
    """Every run, seeds outermost.

    Labels: ``regime``, ``method`` (``zero_shot``, ``scratch``, or a `shodh.experiments.finetuning.settings.Method`),
    ``count`` (training trajectories) and ``seed``.

    Raises
    ------
    ConfigError, DataError, TopologyError
        A regime was learned, its data is missing or does not fit, there are fewer trajectories than asked for, or a
        run's configuration is impossible; the message names it.
    """
    experts = base.config.operator.experts
    if experts.num_experts and experts.router.traits.labelled:
        kind = experts.router.kind
        raise ConfigError(f"{base.path}: its router kind {kind} has no experts for a regime it was not trained on")
    if experts.num_added and "new_expert" in tuning.train:
        raise ConfigError(f"{base.path} has added experts already; leave out new_expert")
    tree = apply_overrides(to_dict(base.config), (*tuning.set, *tuning.overrides))
    tokenizer = find_tokenizer(base, tuning.folder)
    runs = []
    for seed in range(tuning.seeds):
        for regime in tuning.regimes:
            chosen = draw_trajectories(regime, base, seed, tuning.trajectories)
            for count, method in product(sorted(tuning.trajectories), methods(tuning)):
                name = f"{regime.name}-n{count}-{method}-s{seed}"
                learned = regime.model_copy(update={"trajectories": chosen[:count]})
                config = _configure(tuning, tree, name, method, learned, seed, world_size, tokenizer)
                labels = {"regime": regime.name, "method": method, "count": count, "seed": seed}
                runs.append(
                    Run(
                        name,
                        config,
                        config.run_dir / RESULT,
                        "shodh.experiments.finetuning.measure:measure",
                        labels,
                        weights=() if method == SCRATCH else (base.weights,),
                        kind=None if method == SCRATCH else tuning.weights,
                        trains=method != ZERO_SHOT,
                    )
                )
    return runs


def methods(tuning: TuningConfig) -> tuple[str, ...]:
    """All methods, in the order of the report."""
    return (ZERO_SHOT, *tuning.train, SCRATCH)


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
    method: str,
    regime: RegimeConfig,
    seed: int,
    world_size: int,
    tokenizer: Path | None,
) -> RunConfig:
    """The run's configuration with one regime, its own steps, and what the method trains."""
    base = config_from_dict(tree, str(tuning.run))
    train: dict[str, Any] = {
        "steps": tuning.steps,
        "warmup": tuning.steps // 10,
        "valid_every": 0,
        "checkpoint_every": 0,
    }
    if (best := base.operator.train.best) is not None:  # By the same measure, over the one regime; with all steps.
        measure = "/".join(best.measure.split("/")[:2])
        train |= {"valid_every": max(1, tuning.steps // 10), "best": {"measure": measure, "patience": 0}}
    changes: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "out": str(tuning.folder / "runs"),
        "data": {"regimes": [to_dict(regime)]},
        "operator": {"train": {**train, "lr": tuning.rate(method, base.operator.train.lr), "keep_checkpoints": 1}},
        "parallel": {"ep_size": _expert_ranks(tuning, base, world_size)},
        "family": None,
    }
    if tokenizer is not None:
        changes["tokenizer"] = {"run": str(tokenizer), "unseen_regimes": True}
    if method not in (ZERO_SHOT, SCRATCH):
        router = method == "experts" and tuning.router
        changes["finetune"] = {"train": method, "router": router}
        if method != "all" and not router:
            changes["operator"]["experts"] = _still_router(base)
        if method == "new_expert":
            changes["operator"]["experts"]["num_added"] = tuning.num_added
    config = config_from_dict(merge_trees(tree, changes), f"{tuning.name}, run {name}")
    plan_ranks(config, world_size)
    return config


def _expert_ranks(tuning: TuningConfig, base: RunConfig, world_size: int) -> int:
    """The degree that ``set`` names, or the run's as far as it fits the ranks."""
    if any(setting.startswith("parallel.ep_size=") for setting in (*tuning.set, *tuning.overrides)):
        return base.parallel.ep_size
    return fitting_ep_size(world_size, base.parallel.ep_size, base.operator.experts.num_experts)


def _still_router(base: RunConfig) -> dict[str, Any]:
    """A frozen router keeps its temperature and selection biases too, and no balance term pushes on its inputs."""
    changes: dict[str, Any] = {"balance": dict.fromkeys(BalanceConfig.model_fields, 0.0)}
    schedule = base.operator.experts.router.temperature_schedule
    if schedule is not None:
        changes["router"] = {"temperature_schedule": {**to_dict(schedule), "decay": 1.0}}
    return changes


def describe_runs(tuning: TuningConfig, runs: Sequence[Run]) -> str:
    """What there is to run, one line a run."""

    def columns(run: Run) -> dict[str, Any]:
        trained = count_trained(run.config, trains=run.trains)["trained"]
        return {"method": run.labels["method"], "trajectories": run.labels["count"], "M trained": trained / 1e6}

    return describe_costs(tuning, tuning.run, runs, columns)
