"""Held-out evaluation of a run: errors, rollouts, divergence and routing, by regime.

Runs on one device with the plain-torch twin, from the exchange-format weights; DeepSpeed is not needed. Every error is
set beside that of persistence (the last known frame) on the same windows, and beside what the tokenizer alone loses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shodh.checkpoint.description import Kind
from shodh.checkpoint.folder import find_checkpoint
from shodh.checkpoint.run_files import is_tokenizer
from shodh.checkpoint.weights import kind_of, read_initial_weights
from shodh.config import RunConfig
from shodh.core.errors import CheckpointError
from shodh.core.precision import float32_products, ieee_float32
from shodh.core.weights import load_into
from shodh.data import Split
from shodh.evaluate.regime_evaluation import Evaluation, Evaluator, Example, Means, RegimeEvaluation
from shodh.models.factory import build_operator
from shodh.moe.routing import regime_information
from shodh.train.data_identity import kept_choice, new_choice
from shodh.train.datasets import Regimes
from shodh.train.latents import TrainedTokenizer, prepare_latents
from shodh.train.opening import kept_space, open_run_data
from shodh.train.run_folder import RunFolder

__all__ = ["Evaluation", "Evaluator", "Example", "Means", "RegimeEvaluation", "evaluate", "open_run"]


def open_run(run: Path, checkpoint: str | None, device: torch.device, kind: Kind | None = None) -> Evaluator:
    """Open a run folder with its newest, its best, or a named checkpoint (`find_checkpoint`).

    Parameters
    ----------
    kind : {"ema", "raw"}, optional
        Weights of the checkpoint: `shodh.checkpoint.description.read_pretrained`.

    Raises
    ------
    ConfigError, CheckpointError, DataError
        One line that names what is missing or does not fit.
    """
    folder = RunFolder(run)
    config = folder.config()
    if is_tokenizer(run):
        raise CheckpointError(f"{run} is the run of a tokenizer; give the run of an operator, of launch/pretrain.py")
    source = find_checkpoint(run, checkpoint)
    regimes, trained = open_run_data(config, kept_space(config, source, run), kept_choice(run), run)
    return _opened(config, folder, source.name, regimes, trained, source, device, kind)


def open_given(config: RunConfig, weights: Path, device: torch.device, kind: Kind | None = None) -> Evaluator:
    """Weights of an operator (`read_initial_weights`) on the regimes of a configuration, which they need not know.

    Fields are normalised by the regimes' own training statistics.
    """
    folder = RunFolder(config.run_dir)
    regimes, trained = open_run_data(config, None, new_choice(config, weights))
    return _opened(config, folder, weights.name, regimes, trained, weights, device, kind)


def _opened(
    config: RunConfig,
    folder: RunFolder,
    checkpoint: str,
    regimes: Regimes,
    trained: TrainedTokenizer | None,
    source: Path,
    device: torch.device,
    kind: Kind | None,
) -> Evaluator:
    operator = build_operator(config)
    load_into(operator, read_initial_weights(source, kind), source)
    if trained is not None:
        trained.model.to(device)
    weights = kind_of(source, kind)
    return Evaluator(config, folder, checkpoint, regimes, trained, operator.to(device).eval(), device, weights)


@torch.no_grad()
@ieee_float32()
def evaluate(evaluator: Evaluator, split: Split) -> Evaluation:
    """Evaluate a run on a split, regime by regime."""
    names, size = evaluator.regimes.names, evaluator.config.evaluation.batch
    cache = None
    if evaluator.trained is not None:  # Every frame is needed in several windows: encoded once.
        cache = prepare_latents(evaluator.config, evaluator.regimes, evaluator.trained, evaluator.device)
    by_regime: dict[str, Any] = {}
    windows: dict[str, int] = {}
    result = Evaluation({})
    table: Tensor | None = None
    hidden = not sys.stderr.isatty()
    for number, name in enumerate(names):
        part = RegimeEvaluation(evaluator, number, split, cache)
        windows[name] = part.num_windows
        total = -(-part.num_windows // size)
        for batch in tqdm(part.windows(), total=total, desc=name, unit="batch", disable=hidden):
            part.add(batch)
        for batch in part.rollouts():
            part.rollout(batch)
        by_regime[name] = part.result()
        if part.example is not None:
            result.examples.append(part.example)
        if part.table is not None:
            table = part.table if table is None else table + part.table
    result.metrics = {
        "run": str(evaluator.folder.path),
        "checkpoint": evaluator.checkpoint,
        "weights": evaluator.weights,
        "split": split,
        "windows": windows,
        "float32_products": float32_products(),
        "regimes": by_regime,
        "routing": routing_summary(table, names),
    }
    return result


def routing_summary(table: Tensor | None, names: list[str]) -> dict[str, Any] | None:
    """Shares of each regime's tokens by expert, U and NMI, layer by layer; None for a dense model."""
    if table is None:
        return None
    layers = []
    for counts in table:
        u, nmi = regime_information(counts)
        shares = (counts.double() / counts.sum(1, keepdim=True)).tolist()
        layers.append(
            {
                "regime_information": u,
                "nmi": nmi,
                "shares": dict(zip(names, shares, strict=True)),
                "counts": dict(zip(names, counts.tolist(), strict=True)),
            }
        )
    return {"num_experts": table.shape[-1], "layers": layers}
