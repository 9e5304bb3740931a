"""From a study to its runs: every combination of model, mix, variant and seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from shodh.config import ExpertsConfig, RouterConfig, RunConfig, config_from_dict, to_dict
from shodh.config.reading import merge_trees
from shodh.core.errors import ConfigError, ShodhError
from shodh.core.topology import fitting_ep_size
from shodh.experiments.harness.results import RESULT
from shodh.experiments.harness.run import Run
from shodh.experiments.harness.workers import Workers
from shodh.experiments.transfer.settings import GROUPED, StudyConfig

#: Balance terms by name, with the weights of the project's own experiments.
BALANCES: dict[str, dict[str, float]] = {
    "switch": {"switch": 0.01, "information": 0.0},
    "information": {"switch": 0.0, "information": 0.05},
    "both": {"switch": 0.01, "information": 0.05},
    "none": {"switch": 0.0, "information": 0.0},
}
CONTROLS = {"sparse_hash": "hash", "sparse_frozen": "frozen", "sparse_oracle": "oracle"}
MEASURE = "shodh.experiments.transfer.measure:measure"
#: With all steps; with the steps that the mix gives a regime; with all steps and the samples that the mix gives it.
SPECIALISTS = ("specialist", "specialist_share", "specialist_batch")


def label_of(model: str, variant: Mapping[str, Any]) -> str:
    """``sparse-context-information-e8-g4``."""
    parts = [model, *(str(variant[k]) for k in ("router", "balance") if k in variant)]
    return "-".join([*parts, *(f"{k[0]}{variant[k]}" for k in ("experts", "groups") if k in variant)])


def expand(study: StudyConfig, world_size: int = 1, keep_checkpoints: bool = False) -> list[Run]:
    """Every run of a study for a number of ranks, seeds outermost.

    So after any number of finished runs the models have had about the same seeds. Labels: ``model`` (a `ModelName`),
    ``label`` (model and variant: what is compared over seeds), ``mix`` (of a specialist its regime), ``regimes``,
    ``variant`` (what the axes set), ``share`` (the number of regimes of the mix whose steps, or samples, a regime a
    specialist is given; 1: all of the study) and ``seed``.

    Raises
    ------
    ConfigError
        A run's configuration is impossible; the message names it.
    """
    base = study.base_config()
    tree = to_dict(base)
    by_name, probe = {r["name"]: r for r in tree["data"]["regimes"]}, study.plasticity
    settings = {
        "fresh": None if probe is None else {"probe": to_dict(probe), "regime": by_name[probe.regime]},
        "gradient_samples": study.gradient_samples,
    }
    changes: dict[tuple[str, int], dict[str, Any]] = {}
    runs = []
    for seed in range(study.seeds):
        for model, mix, regimes, variant, share in _combinations(study):
            label = label_of(model, variant) + (str(share) if share > 1 else "")
            name = f"{mix}-{label}-s{seed}"
            key = label_of(model, variant), len(regimes)
            if key not in changes:
                changes[key] = operator_changes(study, tree, name, model, variant, len(regimes))
            labels: dict[str, Any] = {"model": model, "label": label, "mix": mix, "regimes": regimes}
            labels |= {"variant": variant, "share": share, "seed": seed}
            config = _configure(study, tree, name, changes[key], labels, world_size)
            runs.append(
                Run(
                    name,
                    config,
                    config.run_dir / RESULT,
                    MEASURE,
                    labels,
                    settings,
                    {"keep_checkpoints": keep_checkpoints},
                )
            )
    return runs


Combination = tuple[str, str, tuple[str, ...], dict[str, Any], int]


def _combinations(study: StudyConfig) -> Iterator[Combination]:
    """(model, mix, regimes, variant, share) without repetition."""
    for mix, regimes in study.mixes.items():
        for model in study.models:
            if model in SPECIALISTS or (model == "dense_active" and len(regimes) == 1 and "specialist" in study.models):
                continue  # A dense model of one regime is its specialist.
            for variant in _variants(study) if model == "sparse" else [{}]:
                yield model, mix, regimes, variant, 1
    for regime in dict.fromkeys(r for mix in study.mixes.values() for r in mix):
        if "specialist" in study.models:
            yield "specialist", regime, (regime,), {}, 1
        shares = sorted({len(mix) for mix in study.mixes.values() if regime in mix and len(mix) > 1})
        for model, share in product(SPECIALISTS[1:], shares):
            if model in study.models:
                yield model, regime, (regime,), {}, share


def _variants(study: StudyConfig) -> list[dict[str, Any]]:
    """Settings of the sparse model: the product of the axes; groups, where they fit, for grouped routers alone."""
    variants: list[dict[str, Any]] = []
    axes: dict[str, tuple[Any, ...]] = {"router": study.routers, "balance": study.balances, "experts": study.experts}
    used = {name: values for name, values in axes.items() if values}
    for values in product(*used.values()):
        variant = dict(zip(used, values, strict=True))
        if variant.get("router") in GROUPED and study.groups:
            fitting = [g for g in study.groups if variant.get("experts", g) % g == 0]
            variants += [{**variant, "groups": groups} for groups in fitting]
        else:
            variants.append(variant)
    return variants


def operator_changes(
    study: StudyConfig, tree: Mapping[str, Any], name: str, model: str, variant: Mapping[str, Any], num_regimes: int
) -> dict[str, Any]:
    """What a model changes in the operator of the base run (a tree).

    What the sparse model is compared with has the experts and the balance of its first variant, the compared one.

    Raises
    ------
    ConfigError
        No dense model is as large as the sparse one.
    """
    base = config_from_dict(dict(tree), name)
    compared = _variants(study)[0]
    if model in ("dense_router", "dpot"):
        from shodh.experiments.harness.sizes import (
            widened_dense,  # Builds models, so it needs torch; nothing else here does.
        )

        experts = expert_changes("sparse", compared, base.operator.experts, num_regimes)
        sparse = config_from_dict(merge_trees(tree, {"operator": {"experts": experts}}), name)
        return widened_dense(sparse, as_dpot=model == "dpot")
    if model != "sparse":
        variant = {key: compared[key] for key in ("balance", "experts") if key in compared}
    return {"experts": expert_changes(model, variant, base.operator.experts, num_regimes)}


def expert_changes(model: str, variant: Mapping[str, Any], experts: ExpertsConfig, num_regimes: int) -> dict[str, Any]:
    """What a model changes in the base run's experts.

    ``dense_active`` and the specialists have as many feed-forward weights as a token meets, ``dense_total`` as many as
    there are; the router's own weights, which they lack, are the only difference in size.
    """
    num_experts = variant.get("experts", experts.num_experts)
    if model in ("dense_active", *SPECIALISTS):
        return {"num_experts": 0}
    if model == "dense_total":
        return {"num_experts": 0, "num_shared": experts.num_shared + num_experts - experts.top_k}
    changes: dict[str, Any] = {"router": {}, "balance": dict(BALANCES.get(variant.get("balance", ""), {}))}
    if "router" in variant:
        changes["router"]["kind"] = variant["router"]
    if "experts" in variant:
        changes["num_experts"] = variant["experts"]
    if "groups" in variant:
        changes["router"]["groups"] = variant["groups"]
    if model in CONTROLS:
        changes["router"]["kind"] = CONTROLS[model]
    if changes["router"].get("kind", experts.router.kind) != experts.router.kind and experts.router.traits.observes:
        changes["router"] |= {key: RouterConfig.model_fields[key].default for key in ("groups_by", "cluster_samples")}
    if model == "sparse_hash":
        changes["router"]["granularity"] = "token"
    if model == "sparse_oracle":
        changes["router"]["groups"] = num_regimes
        of_group = max(experts.top_k, math.ceil(num_experts / num_regimes))
        changes["num_experts"] = num_regimes * of_group
    return changes


def _configure(
    study: StudyConfig,
    tree: Mapping[str, Any],
    name: str,
    operator: Mapping[str, Any],
    labels: Mapping[str, Any],
    world_size: int,
) -> RunConfig:
    base = config_from_dict(dict(tree), name)
    share, batch = labels["share"], base.operator.train.global_batch
    steps_of, part = (1, share) if labels["model"] == "specialist_batch" else (share, 1)
    if part > 1 and batch % (part * world_size):
        raise ConfigError(
            f"study {study.name}, run {name}: a batch of {batch} samples has no equal part for each of {part} regimes "
            f"on {world_size} ranks"
        )
    num_experts = operator["experts"].get("num_experts", base.operator.experts.num_experts)
    by_name = {r["name"]: r for r in tree["data"]["regimes"]}
    steps = max(1, base.operator.train.steps // steps_of)
    every = max(1, steps // study.checkpoints)
    best = base.operator.train.best
    train = {
        "steps": steps,
        "warmup": base.operator.train.warmup // steps_of,
        "global_batch": batch // part,
        "valid_every": every,
        "checkpoint_every": every,
        "keep_checkpoints": steps,  # All; they are dropped when the run is measured.
        "best": None if best is None else {"measure": best.measure, "patience": 0},  # All runs take all their steps.
    }
    changed = merge_trees(
        tree,
        {
            "name": name,
            "seed": labels["seed"],
            "out": str(study.folder / "runs"),
            "data": {"regimes": [by_name[r] for r in labels["regimes"]]},
            "tokenizer": {"run": str(tokenizer_dir(study, base))},
            "operator": {**operator, "train": train},
            "parallel": {"ep_size": fitting_ep_size(world_size, base.parallel.ep_size, num_experts)},
        },
    )
    return config_from_dict(changed, f"study {study.name}, run {name}")


def tokenizer_config(study: StudyConfig) -> RunConfig:
    """The run whose tokenizer all others share: the base, with all its regimes."""
    tree = to_dict(study.base_config())
    tree["tokenizer"]["run"] = str(tokenizer_dir(study, config_from_dict(tree)))
    return config_from_dict({**tree, "name": study.name, "out": str(study.out), "parallel": {}})


def tokenizer_dir(study: StudyConfig, base: RunConfig) -> Any:
    """The one that the base run names, or one of the study's own."""
    return base.tokenizer.run or study.folder / "tokenizer"


def make_tokenizer(study: StudyConfig, runs: Sequence[Run], workers: Workers) -> None:
    """Train the tokenizer that all runs share, and encode the data once for every mix, in a job of its own.

    Raises
    ------
    ShodhError
        It could not be trained.
    """
    config = tokenizer_config(study)
    if not config.has_tokenizer:
        return
    mixes = [run.labels["regimes"] for run in runs]
    if study.plasticity is not None:
        mixes.append((study.plasticity.regime,))
    job = {"prepare": "shodh.experiments.transfer.measure:prepare", "mixes": list(dict.fromkeys(mixes))}
    line = workers.run("tokenizer", {**job, "config": to_dict(config)})
    if line is not None and not workers.stopped.is_set():
        raise ShodhError(f"the tokenizer of the study could not be made: {line}")
