"""Held-out evaluation of a run: errors, rollouts, spectra, conserved quantities, divergence and routing, by regime.

With the plain-torch twin, from the exchange-format weights, on one device or on all ranks of a launcher. Every error is
set beside that of persistence (the last known frame) on the same windows, and beside what the tokenizer alone loses.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from shodh.checkpoint.description import Kind
from shodh.checkpoint.folder import find_checkpoint
from shodh.checkpoint.run_files import is_tokenizer
from shodh.checkpoint.weights import kind_of, read_initial_weights
from shodh.config import RunConfig
from shodh.core.distributed import from_first, gather, rank, together, world_size
from shodh.core.errors import CheckpointError
from shodh.core.precision import Precision, float32_products, ieee_float32
from shodh.core.weights import load_into
from shodh.data import Split
from shodh.evaluate.divergence import divergence_of
from shodh.evaluate.regime_evaluation import Evaluator, Example, RegimeEvaluation, RegimeParts
from shodh.evaluate.rows import by_trajectory, valid_times
from shodh.evaluate.summary import summarise
from shodh.models.factory import build_operator
from shodh.moe.routing import regime_information
from shodh.report.statistics import what_trajectories_can_show
from shodh.schema.conditions import TIME_STEP
from shodh.train.data_identity import kept_choice, new_choice
from shodh.train.datasets import Regimes
from shodh.train.latents import TrainedTokenizer, prepare_latents
from shodh.train.opening import kept_space, open_run_data
from shodh.train.run_folder import RunFolder

log = logging.getLogger("shodh")

__all__ = ["Evaluation", "Evaluator", "Example", "RegimeEvaluation", "evaluate", "open_run"]


@dataclass
class Evaluation:
    """What `evaluate` found; `metrics` is JSON-able, the rest serves tables and figures.

    Attributes
    ----------
    trajectories : DataFrame
        `by_trajectory` of every regime: what every mean and interval is made of.
    """

    metrics: dict[str, Any]
    trajectories: pd.DataFrame = field(default_factory=pd.DataFrame)
    examples: list[Example] = field(default_factory=list)


def open_run(
    run: Path,
    checkpoint: str | None,
    device: torch.device,
    kind: Kind | None = None,
    precision: Precision = "fp32",
    stride: int | None = None,
    shared: bool = False,
) -> Evaluator:
    """Open a run folder with its newest, its best, or a named checkpoint (`find_checkpoint`).

    Parameters
    ----------
    kind : {"ema", "raw"}, optional
        Weights of the checkpoint: `shodh.checkpoint.description.read_pretrained`.
    precision : {"fp32", "bf16"}
        Of the networks.
    stride : int, optional
        Frames between two model steps, where they are not to be those of the run; the report has a folder of its own.
    shared : bool
        All ranks open it together, the checkpoint that the first one finds.

    Raises
    ------
    ConfigError, CheckpointError, DataError
        One line that names what is missing or does not fit; a `SharedError` where ranks open it together.
    """
    folder = RunFolder(run)
    with together(shared):
        config = folder.config()
        if is_tokenizer(run):
            raise CheckpointError(
                f"{run} is the run of a tokenizer; give the run of an operator, of launch/pretrain.py"
            )
    if stride is not None and stride != config.data.stride:
        if TIME_STEP not in config.operator.conditions and stride not in config.data.strides:
            log.warning("%s was not trained at stride %d, and is not told the time step", run, stride)
        folder.report = run / f"report-stride{stride}"
        config = config.model_copy(update={"data": config.data.model_copy(update={"stride": stride})})
    find = partial(find_checkpoint, run, checkpoint)
    source = from_first(find) if shared else find()
    with together(shared):
        space, choose = kept_space(config, source, run), kept_choice(run)
    regimes, trained = open_run_data(config, space, choose, run, shared=shared)
    with together(shared):
        opened = _opened(config, folder, source.name, regimes, trained, source, device, kind)
    return replace(opened, precision=precision)


def open_given(config: RunConfig, weights: Path, device: torch.device, kind: Kind | None = None) -> Evaluator:
    """Weights of an operator (`read_initial_weights`) on the regimes of a configuration, which they need not know.

    Fields are normalised by the regimes' own training statistics.
    """
    folder = RunFolder(config.run_dir)
    regimes, trained = open_run_data(config, None, new_choice(config, weights), weights=weights)
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


def lowered(evaluator: Evaluator) -> Evaluator:
    """With networks that compute in bf16, as in a bf16 run: weights rounded, buffers as they are."""

    def cast(model: nn.Module) -> Any:
        model = copy.deepcopy(model)
        for weight in model.parameters():
            weight.data = weight.data.to(torch.bfloat16)
        return model

    trained = evaluator.trained and replace(evaluator.trained, model=cast(evaluator.trained.model))
    return replace(evaluator, operator=cast(evaluator.operator), trained=trained)


@torch.no_grad()
@ieee_float32()
def evaluate(evaluator: Evaluator, split: Split) -> Evaluation:
    """Evaluate a run on a split, regime by regime. Collective; every rank returns the same numbers.

    Each rank measures its share of the windows. Means are of values in float64 in a fixed order, so they differ between
    numbers of ranks and sizes of batches by what a batch changes in the rounding of float32 alone.
    """
    names = evaluator.regimes.names
    cache = None
    if evaluator.trained is not None:  # Every frame is needed in several windows: encoded once, in float32.
        cache = prepare_latents(evaluator.config, evaluator.regimes, evaluator.trained, evaluator.device)
    if evaluator.precision == "bf16":
        evaluator = lowered(evaluator)
    result = Evaluation({})
    by_regime: dict[str, Any] = {}
    windows: dict[str, int] = {}
    means: list[pd.DataFrame] = []
    table: Tensor | None = None
    for number, name in enumerate(names):
        with together():
            part = RegimeEvaluation(evaluator, number, split, cache)
            for batch in _shown(part, name):
                part.add(batch)
        windows[name] = part.schedule.count
        measured: list[RegimeParts] = gather(part.parts())
        rows = pd.concat([m.rows for m in measured if len(m.rows)], ignore_index=True)
        means.append(by_trajectory(pd.concat([rows, valid_times(rows)], ignore_index=True)))
        by_regime[name] = summarise(means[-1], part.schedule.steps if evaluator.config.evaluation.rollout else 0)
        if part.divergence is not None:
            by_regime[name]["divergence"] = divergence_of([m.divergence for m in measured])
        else:  # As it is published, of operators on fields.
            by_regime[name]["l2re_physical"] = by_regime[name]["nrmse"]
        if part.example is not None:
            result.examples.append(part.example)
        for m in measured:
            if m.table is not None:
                table = m.table if table is None else table + m.table
    counts = {name: regime["trajectories"] for name, regime in by_regime.items()}
    result.trajectories = pd.concat(means, ignore_index=True)
    result.metrics = {
        "run": str(evaluator.folder.path),
        "checkpoint": evaluator.checkpoint,
        "weights": evaluator.weights,
        "split": split,
        "stride": evaluator.config.data.stride,
        "windows": windows,
        "trajectories": counts,
        "cannot_be_concluded": what_trajectories_can_show(counts),
        "precision": evaluator.precision,
        "ranks": world_size(),
        "float32_products": float32_products(),
        "regimes": by_regime,
        "routing": routing_summary(table, names),
    }
    return result


def _shown(part: RegimeEvaluation, name: str) -> Iterator[Any]:
    """The windows of a regime with a bar on a terminal."""
    total = len(part.schedule.batches(part.e.config.evaluation.batch))
    hidden = rank() != 0 or not sys.stderr.isatty()
    return tqdm(part.windows(), total=total, desc=name, unit="batch", disable=hidden)  # type: ignore[return-value]


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
