"""What a study keeps of a trained cell: ``result.json`` in its run folder."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shodh.checkpoint.folder import checkpoints_of, prune, read_manifest
from shodh.checkpoint.weights import read_weights
from shodh.config import RegimeConfig, RunConfig
from shodh.core.errors import CheckpointError
from shodh.core.precision import ieee_float32
from shodh.core.reading import read_object
from shodh.core.strict_json import write_json
from shodh.core.weights import load_into
from shodh.evaluate.evaluation import evaluate, open_run
from shodh.evaluate.report import write_report
from shodh.experiments.transfer.flops import step_flops
from shodh.experiments.transfer.probe import Probe, gradient_cosines, learning_curve, plasticity
from shodh.experiments.transfer.settings import PlasticityConfig
from shodh.experiments.transfer.sizes import model_size
from shodh.models.factory import build_operator
from shodh.models.init import initialise
from shodh.train.metrics import read_metrics
from shodh.train.run_folder import RunFolder, describe_environment

RESULT = "result.json"


@ieee_float32()
def measure_cell(
    cell: dict[str, Any],
    config: RunConfig,
    gradient_samples: int,
    fresh: tuple[PlasticityConfig, RegimeConfig] | None,
    device: torch.device,
    keep_checkpoints: bool = False,
) -> None:
    """Evaluate a finished run, look at its checkpoints, and write its report and its ``result.json``.

    Parameters
    ----------
    cell : dict
        `shodh.experiments.transfer.cells.Cell.describe`; kept in the result.
    fresh : tuple, optional
        The plasticity probe, and the regime that it learns; passed over where the run has learned this regime, and for
        an oracle, which has no group for it.
    keep_checkpoints : bool
        Keep all checkpoints; by default the last one alone is left.
    """
    folder = RunFolder(config.run_dir)
    evaluator = open_run(folder.path, None, device)
    evaluation = evaluate(evaluator, config.evaluation.split)
    write_report(folder, evaluation)
    probe = Probe(config, device, folder)
    try:
        history = _over_training(probe, folder, gradient_samples)
        held_out = probe.errors(evaluator.operator, config.evaluation.split)
        measure = probe.measure
    finally:
        probe.close()
    result = {
        "cell": cell,
        "steps": config.operator.train.steps,
        **model_size(config),
        "top_k": config.operator.experts.top_k,
        "flops_per_step": step_flops(config),
        "seconds_per_step": seconds_per_step(folder, config.operator.train.checkpoint_every),
        "measure": measure,
        "errors": held_out,
        "history": history,
        "plasticity": _plasticity(evaluator.operator, config, fresh, folder, device),
        "evaluation": evaluation.metrics,
        "env": describe_environment(),
    }
    write_json(folder.path / RESULT, result)
    if not keep_checkpoints:
        prune_checkpoints(folder)


def seconds_per_step(folder: RunFolder, validated_every: int) -> float | None:
    """Median over the logging intervals but the first, and but those in which a validation and a checkpoint fell.

    Where all are such, the median over all.
    """
    timed = [line for line in read_metrics(folder.path / "metrics.jsonl") if "perf/step_ms" in line]
    ends = [int(line["step"]) + 1 for line in timed]
    clean = [
        line
        for line, start, end in zip(timed[1:], ends, ends[1:], strict=False)
        if (end - 1) // validated_every == (start - 1) // validated_every
    ]
    times = [float(line["perf/step_ms"]) for line in clean or timed]
    return statistics.median(times) / 1e3 if times else None


def prune_checkpoints(folder: RunFolder) -> None:
    """Drop all checkpoints but the last, which a resume, a conversion or a new evaluation starts from."""
    latest = folder.latest()
    if latest is not None:
        prune(folder.path, latest, keep=1)


def scheduled_checkpoints(folder: RunFolder, steps: int, every: int) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of the schedule.

    Where a run was interrupted there are others, which would make its curve one of other points.

    Raises
    ------
    CheckpointError
        One is gone: a cell that was measured keeps its last alone.
    """
    expected = [*range(every, steps, every), steps]
    found = {int(read_manifest(path)["state"]["step"]): path for path in checkpoints_of(folder.path)}
    missing = [step for step in expected if step not in found]
    if missing:
        raise CheckpointError(
            f"{folder.checkpoints} has no checkpoint of step {missing[0]}; to measure this cell again, remove "
            f"{folder.path} and train it again (--keep-checkpoints keeps them all)"
        )
    return [(step, found[step]) for step in expected]


def _over_training(probe: Probe, folder: RunFolder, gradient_samples: int) -> list[dict[str, Any]]:
    """Held-out errors and cosines between gradients before the first step, and at every checkpoint of the schedule."""
    train = probe.config.operator.train
    batches = probe.fixed_batches(gradient_samples)
    model = build_operator(probe.config)
    initialise(model, probe.config.seed)
    model.to(probe.device)
    history = [_point(probe, model, batches, 0)]
    for step, checkpoint in scheduled_checkpoints(folder, train.steps, train.checkpoint_every):
        load_into(model, read_weights(checkpoint), checkpoint)
        history.append(_point(probe, model, batches, step))
    return history


def _point(probe: Probe, model: nn.Module, batches: dict[str, Any], step: int) -> dict[str, Any]:
    between, within = gradient_cosines(probe, model, batches)
    return {"step": step, "errors": probe.errors(model), "cosines": between, "cosines_within": within}


def _plasticity(
    model: nn.Module,
    config: RunConfig,
    fresh: tuple[PlasticityConfig, RegimeConfig] | None,
    folder: RunFolder,
    device: torch.device,
) -> dict[str, Any] | None:
    experts = config.operator.experts
    if fresh is None or fresh[1].name in [r.name for r in config.data.regimes]:
        return None
    if experts.num_experts and experts.router.kind == "oracle":
        return None
    settings, regime = fresh
    probe = Probe(_learning_only(config, regime), device)
    untrained = build_operator(config)
    initialise(untrained, config.seed)
    try:
        curves = [learning_curve(probe, start.to(device), settings.steps, settings.lr) for start in (model, untrained)]
    finally:
        probe.close()
    return {"regime": regime.name, "lr": settings.lr, **plasticity(*curves)}


def _learning_only(config: RunConfig, regime: RegimeConfig) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"regimes": (regime,)})})


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a cell, None if there is none yet."""
    path = folder / RESULT
    if not path.exists():
        return None
    return read_object(path)
