"""What a study keeps of a trained run: ``result.json`` in its folder."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shodh.checkpoint.folder import checkpoints_of, read_manifest
from shodh.checkpoint.run_files import is_tokenizer
from shodh.checkpoint.weights import read_weights
from shodh.config import RegimeConfig, RunConfig, config_from_dict
from shodh.core.errors import CheckpointError
from shodh.core.precision import ieee_float32
from shodh.core.weights import load_into
from shodh.evaluate.evaluation import evaluate, open_run
from shodh.evaluate.report import write_report
from shodh.experiments.harness.flops import step_flops
from shodh.experiments.harness.run import Run, judged_checkpoint
from shodh.experiments.harness.sizes import model_size
from shodh.experiments.transfer.probe import Probe, gradient_cosines, learning_curve, plasticity
from shodh.experiments.transfer.settings import PlasticityConfig
from shodh.models.factory import build_operator
from shodh.models.init import initialise
from shodh.train.jobs import open_data, train_tokenizer
from shodh.train.metrics import read_metrics
from shodh.train.run_folder import RunFolder
from shodh.train.runtime import start_distributed


@ieee_float32()
def measure(run: Run, device: torch.device) -> dict[str, Any]:
    """Evaluate a finished run, look at its checkpoints, write its report, and return the values of its result.

    ``run.settings``: ``gradient_samples``; and ``fresh``, the plasticity probe with the regime that it learns, which is
    passed over where the run has learned this regime, and for an oracle, which has no group for it.
    """
    config = run.config
    folder = RunFolder(config.run_dir)
    judged = judged_checkpoint(folder.path)
    evaluator = open_run(folder.path, judged, device)
    evaluation = evaluate(evaluator, config.evaluation.split)
    write_report(folder, evaluation)
    probe = Probe(config, device, folder)
    try:
        history = _over_training(probe, folder, run.settings["gradient_samples"])
        held_out, last = probe.errors(evaluator.operator, config.evaluation.split), None
        if judged is not None:
            last = probe.errors(open_run(folder.path, None, device).operator, config.evaluation.split)
        measured = probe.measure
    finally:
        probe.close()
    return {
        "steps": config.operator.train.steps,
        **model_size(config),
        "top_k": config.operator.experts.top_k,
        "flops_per_step": step_flops(config),
        "seconds_per_step": seconds_per_step(folder, config.operator.train.checkpoint_every),
        "measure": measured,
        "checkpoint": evaluator.checkpoint,
        "errors": held_out,
        "last": last,
        "history": history,
        "plasticity": _plasticity(evaluator.operator, config, run.settings["fresh"], folder, device),
        "evaluation": evaluation.metrics,
    }


def prepare(job: dict[str, Any]) -> bool:
    """Train the tokenizer unless it is there, and encode the data once for every mix of regimes."""
    config = config_from_dict(job["config"], "tokenizer")
    if not is_tokenizer(config.tokenizer_dir) and not train_tokenizer(config, "auto"):
        return False
    device = start_distributed()
    by_name = {r.name: r for r in config.data.regimes}
    for mix in job["mixes"]:
        data = config.data.model_copy(update={"regimes": tuple(by_name[name] for name in mix)})
        open_data(config.model_copy(update={"data": data}), None, device)
    return True


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


def scheduled_checkpoints(folder: RunFolder, steps: int, every: int) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of the schedule.

    Where a run was interrupted there are others, which would make its curve one of other points.

    Raises
    ------
    CheckpointError
        One is gone: a run that was measured keeps its last alone.
    """
    expected = [*range(every, steps, every), steps]
    found = {int(read_manifest(path)["state"]["step"]): path for path in checkpoints_of(folder.path)}
    missing = [step for step in expected if step not in found]
    if missing:
        raise CheckpointError(
            f"{folder.checkpoints} has no checkpoint of step {missing[0]}; to measure this run again, remove "
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
    fresh: dict[str, Any] | None,
    folder: RunFolder,
    device: torch.device,
) -> dict[str, Any] | None:
    experts = config.operator.experts
    if fresh is None or fresh["regime"]["name"] in [r.name for r in config.data.regimes]:
        return None
    if experts.num_experts and experts.router.traits.labelled:
        return None
    settings, regime = PlasticityConfig(**fresh["probe"]), RegimeConfig(**fresh["regime"])
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
