"""Evaluate all methods of a study for one seed, and keep the result as one file."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from shodh.config import to_dict
from shodh.core.precision import ieee_float32
from shodh.experiments.composition.bench import Bench
from shodh.experiments.composition.calibrate import Chosen, TaskVectors, choose
from shodh.experiments.composition.diagnose import diagnose_family
from shodh.experiments.composition.members import open_members, read_case
from shodh.experiments.composition.methods import Trial, possible
from shodh.experiments.composition.settings import CCMConfig
from shodh.merge.readout import BANK


@ieee_float32()
def evaluate_seed(study: CCMConfig, seed: int, device: torch.device) -> dict[str, Any]:
    """Every method on every value of the family: the values of ``results/seedN.json``.

    The models of the seed must be converted, and the data be there. Factors, maps and rates are chosen on the
    validation split of the validation values; everything else is of the test split.

    Raises
    ------
    ShodhError
        Models or data are missing, or do not fit each other or the study.
    """
    started = time.perf_counter()
    family = open_members(study, seed, device)
    bench = Bench(family, study.prefix, study.rollout)
    cases = [read_case(study, family, value, "test") for value in study.family.values]
    vectors = TaskVectors(family, study.methods, seed)
    chosen = _choose(study, bench, vectors)
    total = len(cases) * len(study.methods)
    with tqdm(total=total, unit="method", desc=f"seed {seed}", disable=not sys.stderr.isatty()) as progress:
        values = [_measure(study, Trial(bench, chosen, vectors, case, seed), progress) for case in cases]
    return {
        "regime": family.regime,
        "parameter": {"name": family.range.name, "low": family.range.low, "high": family.range.high},
        "history": bench.history,
        "chosen": chosen.to_dict(),
        "values": values,
        "diagnostics": diagnose_family(bench, cases),
        "seconds": time.perf_counter() - started,
    }


def measured_settings(study: CCMConfig) -> dict[str, Any]:
    """What results must share to be compared; JSON-able."""
    keys = ("backbone", "anchor_steps", "expert_steps", "expert_lr", "prefix", "rollout", "maps", "methods", "family")
    tree = to_dict(study)
    return {key: tree[key] for key in keys}


def _choose(study: CCMConfig, bench: Bench, vectors: TaskVectors) -> Chosen:
    cases = [read_case(study, bench.family, value, "valid") for value in study.family.validation]
    rate = study.expert_lr if "prefix_finetune" in study.methods else None
    return choose(bench, cases, vectors, study.maps, rate)


def _measure(study: CCMConfig, trial: Trial, progress: Any) -> dict[str, Any]:
    """All methods at one value, and the whole bank."""
    methods = {}
    for method in study.methods:
        progress.set_postfix_str(f"{trial.case.value:g} {method}")
        if possible(method, trial):
            methods[method] = trial.outcome(method).to_dict()
        progress.update()
    return {
        "value": trial.case.value,
        "role": study.family.role_of(trial.case.value),
        "trajectories": len(trial.case.frames),
        "methods": methods,
        "bank": {
            "alphas": list(BANK),
            "observed": [trial.line.observed_mean(a) for a in BANK],
            "later": [trial.line.later_mean(a) for a in BANK],
        },
    }
