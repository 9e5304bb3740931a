"""What is kept of a fine-tuned run: ``result.json`` in its folder."""

from __future__ import annotations

from typing import Any

import torch

from shodh.config import RunConfig, dump_config
from shodh.core.files import write_atomically
from shodh.core.precision import ieee_float32
from shodh.data.identity import DataRecord
from shodh.evaluate.evaluation import evaluate, open_given, open_run
from shodh.evaluate.report import write_report
from shodh.evaluate.rows import trajectory_errors
from shodh.experiments.harness.run import Run, judged_checkpoint
from shodh.experiments.transfer.measure import seconds_per_step
from shodh.models.factory import operator_shapes
from shodh.moe.groups import is_trained
from shodh.train.run_folder import RunFolder


@ieee_float32()
def measure(run: Run, device: torch.device) -> dict[str, Any]:
    """Evaluate a finished run, or the weights that it was given, as they are; write its report, return its values."""
    config = run.config
    folder = RunFolder(config.run_dir)
    if run.trains:
        evaluator = open_run(folder.path, judged_checkpoint(folder.path), device)
    else:
        folder.path.mkdir(parents=True, exist_ok=True)
        evaluator = open_given(config, run.weights[0], device, run.kind)
        write_atomically(folder.path / "config.yaml", dump_config(config))
        DataRecord.of(evaluator.regimes.sources, folder.path).save()
    evaluation = evaluate(evaluator, config.evaluation.split)
    write_report(folder, evaluation)
    last = None
    if run.trains and judged_checkpoint(folder.path) is not None:
        same = evaluator.checkpoint == folder.latest()
        newest = evaluation if same else evaluate(open_run(folder.path, None, device), config.evaluation.split)
        last = newest.metrics["regimes"]
    train = config.operator.train
    return {
        "parameters": count_trained(config, trains=run.trains),
        "seconds_per_step": seconds_per_step(folder, train.valid_every or train.steps) if run.trains else None,
        "evaluation": evaluation.metrics,
        "by_trajectory": trajectory_errors(evaluation.trajectories),
        "last": last,
    }


def count_trained(config: RunConfig, *, trains: bool) -> dict[str, int]:
    """Parameters of the operator: all, and those that learn."""
    named = [(name, p.numel()) for name, p in operator_shapes(config).named_parameters() if p.requires_grad]
    tuned = config.finetune
    learning = sum(count for name, count in named if tuned is None or is_trained(name, tuned))
    return {"total": sum(count for _, count in named), "trained": learning if trains else 0}
