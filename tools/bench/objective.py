"""Train an operator in ways that differ in settings, and compare what they decode to.

Every arm has the same data, tokenizer, seeds and steps; one process trains at a time, each from the command line. An
arm is ``name:setting=value,...``; if it keeps an average of the weights or a best checkpoint, these are judged beside
the last weights of the same training, as ``name ema`` and ``name best``. Reported of each regime, on all test
trajectories: decoded mean square error of one step over persistence's, VRMSE of one step and of rollouts (mean over
fields); and of each arm the ratio to the first one, paired by seed, with its t interval, Holm's p over all ratios of
the file, and an interval over seeds and trajectories.

With ``--agreement``: how well each metric of latents agrees with the error of what they decode to, around the first
run's own forecasts: the cosine between gradients by the prediction, and the correlation of the errors of samples;
``probed`` weighs channels by the diagonal of the decoder's pull-back metric, the mean of J^T J, probed with random
vectors. What is finished is not done again; a file of other settings is refused.

example:
  python tools/bench/objective.py --config launch/configs/demo.yaml --set operator.train.steps=300 --seeds 3 \\
    --out tools/bench/results/objective_demo_cpu.json
  python tools/bench/objective.py --arms plain 'unrolled:operator.unroll={steps: 2}' --out unroll.json
  python tools/bench/objective.py --tiny --out /tmp/objective.json
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from processes import ROOT, call, open_record
from torch import Tensor
from torch.nn import functional as F

import shodh
from shodh.checkpoint.description import Kind
from shodh.checkpoint.folder import BEST
from shodh.config import RunConfig, load_config
from shodh.core.cli import command_parser, positive, run_main
from shodh.core.environment import write_record
from shodh.evaluate.evaluation import evaluate, open_run
from shodh.evaluate.rows import trajectory_errors
from shodh.models.forecaster import Forecaster
from shodh.report.page import Table, text_table
from shodh.report.statistics import Comparison, bootstrap_by_seed, compare, holm
from shodh.schema.measures import mean_over
from shodh.train.datasets import Regimes, open_regimes
from shodh.train.field_task import open_windows
from shodh.train.latent_metric import channel_weights, weighted_square
from shodh.train.metrics import read_metrics

Groups = list[list[float]]  # errors of trajectories, a list a field
DECODED = "decoded_mse_over_persistence"
ARMS = ("whitened:operator.metric=whitened", "variance:operator.metric=variance")
TINY = [
    "data.grid=[16, 16, 16]",
    "tokenizer={latent_channels: 8, widths: [8, 8], strides: [4, 2]}",
    "tokenizer.train={steps: 2, global_batch: 4, warmup: 1, valid_batches: 1}",
    "operator={dim: 32, depth: 1, heads: 2, experts: {num_experts: 2, hidden: 32}}",
    "operator.train={steps: 4, global_batch: 4, warmup: 1, valid_batches: 1}",
]


def tiny_data(folder: Path) -> list[str]:
    """Settings of data that are made here."""
    regimes = ("open_channel", "porous_media")
    sizes = ["--grid", "16", "--trajectories", "4", "--frames", "6"]
    call("tools/generate_data.py", "--regime", *regimes, *sizes, "--out", folder / "data")
    return [f"data.regimes.{n}.path={folder / 'data' / name}" for n, name in enumerate(regimes)]


def fields_error(forecaster: Forecaster, fields: Tensor, truth: Tensor, static: Tensor, regime: int) -> Tensor:
    """Mean square error of each sample, ``[B]``, over the cells and channels that exist, in model units."""
    labels = forecaster.labels(regime, fields)
    exists, cells = forecaster.space.exists(labels), forecaster.space.cells(static, labels)
    by_channel = mean_over((fields - truth).square(), cells, 2)
    return torch.where(exists, by_channel, 0.0).sum(1) / exists.sum(1)


def agreement(run: Path, regimes: Regimes, samples: int, probes: int = 4) -> dict[str, Any]:
    """How well metrics of latents agree with decoded errors, by regime: gradient cosine and correlation of errors."""
    model = shodh.from_pretrained(run)
    forecaster, past = model.forecaster, model.config.data.history
    assert forecaster.tokenizer is not None
    draw = torch.Generator().manual_seed(0)
    weights = channel_weights(forecaster.tokenizer, regimes.space.domains)
    rows: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
    pulled = torch.zeros_like(weights)
    for number, data in enumerate(open_windows(model.config, regimes, "valid")):
        for place in torch.linspace(0, len(data) - 1, min(samples, len(data))).long().tolist():
            item = data[place]
            fields, static = item["fields"][None], item["static"][None]
            labels = forecaster.labels(number, fields)
            with torch.no_grad():
                states, features = forecaster.encode(fields, static, number)
                guess = forecaster.step(states[:, :past], features, labels).latent
            target, guess = states[:, past], guess.requires_grad_()
            truth, decoded = (forecaster.decode(z[:, None], static, number)[:, 0] for z in (target, guess))
            error = fields_error(forecaster, decoded, truth, static, number).sum()
            (gradient,) = torch.autograd.grad(error, guess, retain_graph=True)
            for _ in range(probes):  # The mean square of J^T v over random v is the diagonal of J^T J.
                noise = torch.randn(decoded.shape, generator=draw)
                (back,) = torch.autograd.grad(decoded, guess, noise, retain_graph=True)
                pulled[number] += back.square().mean((0, 2, 3, 4))
            rows.setdefault(number, []).append((guess.detach(), target, gradient, error.detach()))
    probed = pulled / pulled.mean(1, keepdim=True)
    metrics = {"whitened": torch.ones_like(weights), "variance": weights, "probed": probed}
    found: dict[str, Any] = {}
    for name, table in metrics.items():
        for number, parts in rows.items():
            own = table[number].view(1, -1, 1, 1, 1)
            cosines = [float(F.cosine_similarity((own * (u - v)).flatten(), g.flatten(), 0)) for u, v, g, _ in parts]
            pairs = [torch.stack((weighted_square(u, v, table[number, None])[0], e)) for u, v, _, e in parts]
            found.setdefault(name, {})[regimes.names[number]] = {
                "gradient_cosine": statistics.fmean(cosines),
                "correlation_of_errors": float(torch.corrcoef(torch.stack(pairs, 1))[0, 1]),
                "samples": len(parts),
            }
    logs = torch.stack((probed.log().flatten(), weights.log().flatten()))
    ascending = weights.sort(1).values
    half = weights.shape[1] // 2
    return {
        **found,
        "correlation_of_log_probed_and_variance": float(torch.corrcoef(logs)[0, 1]),
        "variance_in_the_weaker_half_of_channels": (ascending[:, :half].sum(1) / ascending.sum(1)).tolist(),
    }


def judge(config: RunConfig, checkpoint: str | None, kind: Kind) -> dict[str, dict[str, Groups]]:
    """Errors of the test trajectories by regime and measure, a list a field."""
    evaluator = open_run(config.run_dir, checkpoint, torch.device("cpu"), kind)
    frame = evaluate(evaluator, "test").trajectories
    found: dict[str, dict[str, Groups]] = {}
    for regime, means in frame.groupby("regime", sort=False):
        decoded = means[(means["measure"] == "decoded_mse") & (means["step"] == 1)]
        sides = (decoded[decoded["of"] == of].groupby("trajectory")["value"].mean() for of in ("model", "persistence"))
        model, persistence = sides
        fields = {name: list(by_field.values()) for name, by_field in trajectory_errors(means).items()}
        found[str(regime)] = {DECODED: [(model / persistence.mean()).tolist()], **fields}
    return found


def measure(config: RunConfig) -> dict[str, Any]:
    """Errors of the weights that a finished run has kept, by their names, and the milliseconds of a step."""
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    train = config.operator.train
    kinds: dict[str, tuple[str | None, Kind]] = {"": (None, "raw")}
    if train.ema:
        kinds[" ema"] = (None, "ema")
    if train.best is not None:
        kinds[" best"] = (BEST, "ema" if train.ema else "raw")
    return {
        "test": {name: judge(config, *which) for name, which in kinds.items()},
        "step_ms": statistics.median(line["perf/step_ms"] for line in lines if "perf/step_ms" in line),
        "steps": train.steps,
    }


def compare_arms(runs: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row a regime, measure and arm: its mean, and its ratio to the first arm over the seeds that both have.

    Means are over fields; ratios are of geometric means over fields, as in the pages of studies.
    """
    errors: dict[tuple[str, str, str], dict[int, Groups]] = {}
    for arm, seed in product(arms, seeds):
        for weights, regimes in runs.get(f"{arm}-{seed}", {"test": {}})["test"].items():
            for regime, measures in regimes.items():
                for name, groups in measures.items():
                    errors.setdefault((regime, name, arm + weights), {})[seed] = groups
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    claims: dict[tuple[str, str, str], Comparison] = {}
    for (regime, name, arm), by_seed in errors.items():
        values = [statistics.fmean(map(statistics.fmean, groups)) for groups in by_seed.values()]
        row = {"regime": regime, "measure": name, "arm": arm, "mean": statistics.fmean(values), "by_seed": values}
        rows[regime, name, arm] = row
        first = errors.get((regime, name, arms[0]), {})
        both = sorted(first.keys() & by_seed.keys())
        if arm == arms[0] or not both:
            continue
        ours, theirs = (
            [statistics.geometric_mean(map(statistics.fmean, found[s])) for s in both] for found in (by_seed, first)
        )
        claims[regime, name, arm] = compare(ours, theirs)
        nested = bootstrap_by_seed(by_seed, first)
        row["nested"] = None if nested is None else list(nested)
    for key, found in holm(claims).items():
        ends = {"ratio": found.ratio, "low": found.low, "high": found.high}
        rows[key] |= {**ends, "p": found.p, "p_holm": found.p_holm, "verdict": found.verdict}
    order = list(dict.fromkeys(key[:2] for key in rows))
    return [rows[key] for key in sorted(rows, key=lambda key: order.index(key[:2]))]


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as text."""
    header = ["regime", "measure", "arm", "mean", "ratio", "low", "high", "nested low", "nested high", "verdict"]
    cells = [
        [*(row.get(name) for name in header[:7]), *(row.get("nested") or (None, None)), row.get("verdict")]
        for row in rows
    ]
    return Table(header, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--config", default=str(ROOT / "launch" / "configs" / "demo.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), metavar="NAME:KEY=VALUE,...", help="the first is the baseline"
    )
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--agreement", action="store_true", help="also of gradients and errors, around the first run")
    parser.add_argument("--work", type=Path, help="folder of the runs; by default one that is removed")
    parser.add_argument("--tiny", action="store_true", help="a minute: nothing but whether it runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    arms = {name: changes for name, _, changes in (arm.partition(":") for arm in args.arms)}
    record = open_record(args.out, arms, config=Path(args.config).name, settings=args.set, tiny=args.tiny)
    with tempfile.TemporaryDirectory() as spare:
        work = (args.work or Path(spare)).absolute()
        common = [f"out={work / 'runs'}", f"deepspeed={ROOT / 'ds_configs' / 'cpu.json'}", "parallel.ep_size=1"]
        common += [*(TINY + tiny_data(work) if args.tiny else []), *args.set]
        seeds = range(min(args.seeds, 2) if args.tiny else args.seeds)
        record |= {"settings": common}
        shared = load_config(args.config, common)
        if shared.has_tokenizer and shared.tokenizer.run is None:
            call("launch/train_tokenizer.py", "--config", args.config, "--resume", "auto", "--set", *common)
        for seed in seeds:
            for name, changes in arms.items():
                settings = [*common, f"name=objective-{name}-{seed}", f"seed={seed}", *filter(None, changes.split(","))]
                if shared.has_tokenizer:
                    settings.append(f"tokenizer.run={shared.tokenizer_dir}")
                config = load_config(args.config, settings)
                key = f"{name}-{seed}"
                if key not in record["runs"]:
                    call("launch/pretrain.py", "--config", args.config, "--resume", "auto", "--set", *settings)
                    record["runs"][key] = measure(config)
                if args.agreement and "agreement" not in record:
                    regimes = open_regimes(config, shodh.from_pretrained(config.run_dir).space)
                    record["agreement"] = agreement(config.run_dir, regimes, 3 if args.tiny else 10)
                    regimes.close()
                record["comparisons"] = compare_arms(record["runs"], list(arms), seeds)
                write_record(args.out, record)
        sys.stdout.write(text_table(table_of(record["comparisons"])))
    return 0


if __name__ == "__main__":
    run_main(main)
