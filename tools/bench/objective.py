"""Train the demo's operator in each metric of its loss, and compare the errors of what it decodes to.

Every arm has the same data, tokenizer, seeds and steps; one process trains at a time, each from the command line.
Reported of each regime: mean square error of the decoded forecast of one step over that of persistence, the mean of all
held-out windows; by seed, and the difference of an arm from the first one in pairs of equal seeds. Before that, how
well each metric of latents agrees with the error of what they decode to, around the first run's own forecasts: the
cosine between gradients by the prediction, and the correlation of the errors of samples; ``probed`` weighs channels by
the diagonal of the decoder's pull-back metric, the mean of J^T J, probed with random vectors.

An arm is ``name:setting=value,...``. What is finished is not done again.

example:
  python tools/bench/objective.py --config launch/configs/demo.yaml --set operator.train.steps=300 --seeds 3 \\
    --out tools/bench/results/objective_demo_cpu.json
  python tools/bench/objective.py --tiny --out /tmp/objective.json
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from processes import ROOT, call
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

import shodh
from shodh.config import RunConfig, load_config
from shodh.core.cli import command_parser
from shodh.core.environment import write_record
from shodh.core.reading import read_json
from shodh.models.forecaster import Forecaster
from shodh.schema.measures import mean_over
from shodh.train.datasets import Regimes, open_regimes
from shodh.train.field_task import open_windows
from shodh.train.latent_metric import channel_weights, weighted_square
from shodh.train.latents import load_tokenizer, open_latents, prepare_latents
from shodh.train.metrics import read_metrics

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


@torch.no_grad()
def decoded_errors(config: RunConfig, regimes: Regimes, size: int = 8) -> dict[str, dict[str, float]]:
    """Mean square errors of one step over all test windows, of the model and of persistence, by regime."""
    forecaster, past, found = shodh.from_pretrained(config.run_dir).forecaster, config.data.history, {}
    cache = prepare_latents(config, regimes, load_tokenizer(config), torch.device("cpu"))
    pairs = zip(open_windows(config, regimes, "test"), open_latents(config, regimes, cache, "test"), strict=True)
    for number, (data, latents) in enumerate(pairs):
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(data), size):
            rows = range(start, min(start + size, len(data)))
            given, stored = (default_collate([source[row] for row in rows]) for source in (data, latents))
            fields, static, labels = given["fields"], given["static"], forecaster.labels(number, given["fields"])
            ahead = forecaster.step(stored["latents"][:, :past], stored["static"], labels).latent
            decoded = forecaster.decode(ahead[:, None], static, number)[:, 0]
            for place, guess in enumerate((decoded, fields[:, past - 1])):
                sums[place] += fields_error(forecaster, guess, fields[:, past], static, number).double().sum()
        means = (sums / len(data)).tolist()
        found[regimes.names[number]] = dict(zip(("model", "persistence"), means, strict=True))
    return found


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


def compare(runs: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean over the finished seeds of each arm by regime, and its difference from the first in pairs of equal seeds."""
    table: dict[str, Any] = {}
    first: dict[str, dict[int, float]] = {}
    for arm in (name.partition(":")[0] for name in arms):
        found: dict[str, dict[int, float]] = {}
        for seed in (s for s in seeds if f"{arm}-{s}" in runs):
            for regime, errors in runs[f"{arm}-{seed}"]["test"].items():
                found.setdefault(regime, {})[seed] = errors["model"] / errors["persistence"]
        for regime, values in found.items():
            entry: dict[str, Any] = {"mean": statistics.fmean(values.values()), "by_seed": list(values.values())}
            if pairs := [value - first[regime][s] for s, value in values.items() if s in first.get(regime, {})]:
                entry["difference"] = {"mean": statistics.fmean(pairs), "by_seed": pairs}
            table.setdefault(arm, {})[regime] = entry
        first = first or found
    return table


def measure(config: RunConfig, regimes: Regimes) -> dict[str, Any]:
    """Decoded errors of a finished run, and the seconds of its steps."""
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    steps = [line["perf/step_ms"] for line in lines if "perf/step_ms" in line]
    return {
        "test": decoded_errors(config, regimes),
        "step_ms": statistics.median(steps),
        "steps": config.operator.train.steps,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--config", default=str(ROOT / "launch" / "configs" / "demo.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), metavar="NAME:KEY=VALUE,...", help="the first is the baseline"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder of the runs; by default one that is removed")
    parser.add_argument("--tiny", action="store_true", help="a minute: nothing but whether it runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as spare:
        work = (args.work or Path(spare)).absolute()
        common = [f"out={work / 'runs'}", f"deepspeed={ROOT / 'ds_configs' / 'cpu.json'}", "parallel.ep_size=1"]
        common += [*(TINY + tiny_data(work) if args.tiny else []), *args.set]
        seeds = range(min(args.seeds, 2) if args.tiny else args.seeds)
        record: dict[str, Any] = read_json(args.out, "results") if args.out.exists() else {}
        record |= {"settings": common}
        record.setdefault("runs", {})
        if load_config(args.config, common).tokenizer.run is None:
            call("launch/train_tokenizer.py", "--config", args.config, "--resume", "auto", "--set", *common)
        for seed in seeds:
            for arm in args.arms:
                name, _, changes = arm.partition(":")
                settings = [*common, f"name=objective-{name}-{seed}", f"seed={seed}", *filter(None, changes.split(","))]
                tokenizer = load_config(args.config, common).tokenizer_dir
                settings.append(f"tokenizer.run={tokenizer}")
                config = load_config(args.config, settings)
                key = f"{name}-{seed}"
                if key not in record["runs"]:
                    call("launch/pretrain.py", "--config", args.config, "--resume", "auto", "--set", *settings)
                    regimes = open_regimes(config, shodh.from_pretrained(config.run_dir).space)
                    record["runs"][key] = measure(config, regimes)
                    if "agreement" not in record:
                        record["agreement"] = agreement(config.run_dir, regimes, 3 if args.tiny else 10)
                    regimes.close()
                record["decoded_mse_over_persistence"] = compare(record["runs"], args.arms, seeds)
                write_record(args.out, record)


if __name__ == "__main__":
    main()
