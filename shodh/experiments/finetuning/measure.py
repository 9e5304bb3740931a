"""What is kept of a fine-tuned cell: ``result.json`` in its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shodh.config import RunConfig, dump_config
from shodh.core.files import write_atomically
from shodh.core.precision import ieee_float32
from shodh.core.strict_json import write_json
from shodh.evaluate.evaluation import evaluate, open_given, open_run
from shodh.evaluate.report import write_report
from shodh.experiments.transfer.measure import RESULT, seconds_per_step
from shodh.models.factory import build_operator
from shodh.moe.groups import is_trained
from shodh.train.run_folder import RunFolder, describe_environment


@ieee_float32()
def measure_tuning(cell: dict[str, Any], config: RunConfig, weights: Path | None, device: torch.device) -> None:
    """Evaluate a finished run, or given ``weights`` as they are, and write its report and its ``result.json``.

    Parameters
    ----------
    cell : dict
        `shodh.experiments.finetuning.cells.TuningCell.describe`; kept in the result.
    """
    folder = RunFolder(config.run_dir)
    if weights is None:
        evaluator = open_run(folder.path, None, device)
    else:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_atomically(folder.path / "config.yaml", dump_config(config))
        evaluator = open_given(config, weights, device)
    evaluation = evaluate(evaluator, config.evaluation.split)
    write_report(folder, evaluation)
    result = {
        "cell": cell,
        "parameters": count_trained(config, trains=weights is None),
        "seconds_per_step": seconds_per_step(folder, config.operator.train.steps) if weights is None else None,
        "evaluation": evaluation.metrics,
        "env": describe_environment(),
    }
    write_json(folder.path / RESULT, result)


def count_trained(config: RunConfig, *, trains: bool) -> dict[str, int]:
    """Parameters of the operator: all, and those that learn."""
    with torch.device("meta"):
        named = [(name, p.numel()) for name, p in build_operator(config).named_parameters() if p.requires_grad]
    tuned = config.finetune
    learning = sum(count for name, count in named if tuned is None or is_trained(name, tuned))
    return {"total": sum(count for _, count in named), "trained": learning if trains else 0}
