"""Runs of the tiny configuration, each made once a session and shared by all tests and workers that look at it."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from helper import ROOT, made_once, run_ranks
from msgspec import UNSET

from shodh.config import RunConfig, load_config
from shodh.models.operator import OperatorOutput
from shodh.moe.trace import read_trace
from shodh.train.metrics import read_metrics

# Stages of ZeRO beside the third, which shares most: in every test that has them all, left to `make test-all`.
MORE_STAGES = tuple(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (1, 2))


def assert_same_output(found: OperatorOutput, expected: Mapping[str, Any], config: RunConfig) -> None:
    """The same choices of experts, and the same latents but for the order in which sums are taken.

    How a library orders the sum of a matrix product depends on the number of rows and on where they lie in memory, so
    two layouts, or an engine and a model read from a file, agree to rounding. A sum of K products in two orders differs
    by at most 2 K eps of the sum of their sizes (Higham 2002, section 3.1); a token meets these one after another.
    """
    operator, data = config.operator, config.data
    inputs = (data.history * config.tokenizer.latent_channels + len(data.fields)) * operator.patch**3
    tokens = math.prod(config.latent_grid)
    block = 3 * operator.dim + operator.dim // operator.heads + tokens + operator.experts.hidden
    terms = inputs + operator.depth * block + operator.dim
    bound = 2 * terms * torch.finfo(torch.float32).eps * float(expected["latent"].abs().max())
    torch.testing.assert_close(found.latent, expected["latent"], rtol=0, atol=bound)
    assert all(torch.equal(r.selected, s) for r, s in zip(found.routing, expected["selected"], strict=True))


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what each rank returned."""

    path: Path
    overrides: list[str]
    ranks: list[dict[str, Any]]

    def training(self, name: str) -> list[float]:
        """A training metric, step by step."""
        return [line[name] for line in read_metrics(self.path / "metrics.jsonl") if name in line]

    def lines(self) -> list[dict[str, float]]:
        """All metrics but those of the clock."""
        lines = read_metrics(self.path / "metrics.jsonl")
        return [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]

    def counts(self) -> dict[tuple[int, str, int], dict[str, list[int]]]:
        """Assignments by (step, split, layer) and regime, summed over ranks and micro-batches."""
        table: dict[tuple[int, str, int], dict[str, list[int]]] = {}
        for path in sorted((self.path / "routing").glob("rank*.jsonl")):
            for record in read_trace(path):
                if record.sample is not UNSET:
                    continue
                cell = table.setdefault((record.step, record.split, record.layer), {})
                for regime, counts in record.counts.items():
                    old = cell.get(regime, [0] * record.num_experts)
                    cell[regime] = [a + b for a, b in zip(old, counts, strict=True)]
        return table

    def samples(self) -> dict[tuple[int, str, int], Any]:
        """First choices on the token grid by (step, sample, layer), of all ranks."""
        paths = sorted((self.path / "routing").glob("rank*.jsonl"))
        records = [r for path in paths for r in read_trace(path) if isinstance(r.sample, str)]
        return {(r.step, str(r.sample), r.layer): r.top1 for r in records}

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:08d}"


class Laboratory:
    """Makes runs: ``run(world, ep_size, stage, "key=value", ...)``; equal arguments give the same run again."""

    def __init__(self, config: Path, stages: dict[int, Path], tokenizer: Path) -> None:
        self.config, self._stages, self._tokenizer = config, stages, tokenizer
        self._runs: dict[tuple[Any, ...], Run] = {}

    def overrides(self, name: str, ep_size: int, stage: int, *more: str) -> list[str]:
        fixed = [f"name={name}", f"tokenizer.run={self._tokenizer}", f"deepspeed={self._stages[stage]}"]
        return [*fixed, f"parallel.ep_size={ep_size}", *more]

    def run(self, world: int, ep_size: int, stage: int, *more: str) -> Run:
        key = (world, ep_size, stage, *more)
        if key not in self._runs:
            name = "run-" + hashlib.sha256(repr(key).encode()).hexdigest()[:12]
            overrides = self.overrides(name, ep_size, stage, *more)

            def train() -> Run:
                ranks = run_ranks(world, rank_jobs.pretrain, self.config, overrides)
                return Run(self.load(overrides).run_dir, overrides, ranks)

            self._runs[key] = made_once(self.config.with_name(f"{name}.pickle"), train)
        return self._runs[key]

    def load(self, overrides: list[str]) -> RunConfig:
        return load_config(self.config, overrides)

    def raw(self, run: Run) -> Path:
        """What plain ``engine.save_checkpoint`` leaves of the last step of a run of `run`, beside its configuration."""
        folder = run.path.with_name(f"raw-{run.path.name}")

        def save() -> Path:
            again = self.copy(run, f"again-{run.path.name}")  # What resumes writes to logs that other tests look at.
            run_ranks(len(run.ranks), rank_jobs.save_with_deepspeed, self.config, again.overrides, folder)
            shutil.copy(run.path / "config.yaml", folder)
            return next(folder.glob("global_step*"))

        return made_once(self.config.with_name(f"{folder.name}.pickle"), save)

    def copy(self, run: Run, name: str, until: int | None = None) -> Run:
        """A copy of a run's folder under another name; with ``until``, as if it had been lost after that step."""
        path = run.path.with_name(name)
        shutil.copytree(run.path, path)
        if until is not None:
            for checkpoint in (path / "checkpoints").glob("step_*"):
                if int(checkpoint.name.split("_")[1]) > until:
                    shutil.rmtree(checkpoint)
            (path / "latest").write_text(f"step_{until:08d}\n")
        return Run(path, [f"name={name}", *run.overrides[1:]], run.ranks)


def make_laboratory(folder: Path, write_config: Callable[..., Path]) -> Laboratory:
    """A laboratory with a trained tokenizer.

    Noise, shifts and a selection bias are on, so that whatever a checkpoint could forget is in play.
    """
    stages = {stage: ROOT / "ds_configs" / f"zero{stage}.json" for stage in (1, 2, 3)}
    operator = {
        "input_noise": 0.05,
        "random_shifts": True,
        "experts": {"balance": {"bias_rate": 1.0e-3}},
        "train": {"checkpoint_every": 5, "keep_checkpoints": 3, "valid_every": 5},
    }
    config = write_config(folder / "tiny.yaml", operator=operator)
    run_ranks(1, rank_jobs.train_tokenizer, config, [f"deepspeed={stages[1]}"])
    return Laboratory(config, stages, load_config(config).tokenizer_dir)
