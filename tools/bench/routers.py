"""Compare router kinds, numbers of experts and the dense baseline of equal active size, several seeds each.

Every cell is an ordinary run (launch/pretrain.py, then launch/evaluate.py) on the tokenizer of --config, so a cell can
be opened and looked at like any other. Finished cells are kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from shodh.cli import run_main
from shodh.config import load_config
from shodh.errors import ShodhError
from shodh.files import write_atomically
from shodh.train.run_folder import describe_environment

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = """example:
  python tools/bench/routers.py --config launch/configs/demo.yaml --seeds 3 --out runs/routers
"""

KINDS = {
    "token": ["operator.experts.router.kind=token"],
    "context": ["operator.experts.router.kind=context"],
    "two_level": ["operator.experts.router.kind=two_level"],
}


def cells(seeds: int, experts: list[int]) -> list[tuple[str, list[str]]]:
    """Name and overrides of every run."""
    variants = [("dense", ["operator.experts.num_experts=0", "parallel.ep_size=1"])]
    for kind, number in itertools.product(KINDS, experts):
        variants.append((f"{kind}-{number}", [*KINDS[kind], f"operator.experts.num_experts={number}"]))
    # Seeds outermost: after any number of finished cells the variants have had the same seeds.
    return [(f"{name}-s{seed}", [*sets, f"seed={seed}"]) for seed in range(seeds) for name, sets in variants]


def run_cell(args: argparse.Namespace, name: str, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate one cell, unless its report is there already; returns its metrics."""
    report = args.out / name / "report" / "metrics.json"
    if not report.exists():
        tokenizer = load_config(args.config, args.set).tokenizer_dir
        common = [f"name={name}", f"out={args.out}", f"tokenizer.run={tokenizer}", "parallel.ep_size=1"]
        sets = [*args.set, *common, *overrides]
        train = ["launch/pretrain.py", "--config", str(args.config), "--resume", "auto", "--set", *sets]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        for command in (train, ["launch/evaluate.py", "--run", str(args.out / name)]):
            command = [sys.executable, *command]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **threads})
            if done.returncode != 0:
                raise ShodhError(f"cell {name}: {done.stderr.strip().splitlines()[-1]}")
    metrics: dict[str, Any] = json.loads(report.read_text())
    return metrics


def summarise(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers that are compared: errors over persistence by regime, and routing."""
    out: dict[str, float] = {}
    for regime, values in metrics["regimes"].items():
        for measure in ("latent_mse", "decoded_mse"):
            out[f"{measure}/{regime}"] = values[measure]["model"]
            out[f"{measure}_over_persistence/{regime}"] = values[measure]["model"] / values[measure]["persistence"]
        for field, kinds in values["vrmse"].items():
            out[f"vrmse_{field}_over_persistence/{regime}"] = kinds["model"] / kinds["persistence"]
    ratios = [v for k, v in out.items() if k.startswith("latent_mse_over_persistence")]
    out["latent_mse_over_persistence/mean"] = math.exp(statistics.fmean(math.log(r) for r in ratios))
    routing = metrics["routing"]
    if routing is not None:
        for number, layer in enumerate(routing["layers"]):
            out[f"U/{number}"], out[f"NMI/{number}"] = layer["regime_information"], layer["nmi"]
            load = [sum(c) for c in zip(*layer["counts"].values(), strict=True)]
            out[f"max_share/{number}"] = max(load) / sum(load)
            out[f"dead/{number}"] = sum(n < 0.01 * sum(load) / len(load) for n in load)
    return out


def table(results: dict[str, dict[str, float]]) -> str:
    """Mean and range over seeds of each variant."""
    variants: dict[str, list[dict[str, float]]] = {}
    for name, values in results.items():
        variants.setdefault(name.rsplit("-s", 1)[0], []).append(values)
    lines = []
    for variant, seeds in variants.items():
        cells_of = [f"{variant:<14} seeds {len(seeds)}"]
        for key in ("latent_mse_over_persistence", "decoded_mse_over_persistence"):
            for regime in sorted({k.split("/")[1] for s in seeds for k in s if k.startswith(key + "/")}):
                numbers = [s[f"{key}/{regime}"] for s in seeds]
                span = f"{min(numbers):.3f}..{max(numbers):.3f}"
                cells_of.append(f"{key.split('_')[0]} {regime} {statistics.fmean(numbers):.3f} ({span})")
        layers = sorted(k for k in seeds[0] if k.startswith("U/"))
        if layers:
            cells_of.append("U " + " ".join("[" + " ".join(f"{s[k]:.2f}" for k in layers) + "]" for s in seeds))
        lines.append("  ".join(cells_of))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, and of results.json")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one rank")
    args = parser.parse_args(argv)
    results: dict[str, dict[str, float]] = {}
    started = time.time()
    todo = cells(args.seeds, args.experts)
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = pool.map(lambda cell: run_cell(args, *cell), todo)
        for (name, _), metrics in tqdm(zip(todo, runs), total=len(todo), unit="run", disable=not sys.stderr.isatty()):
            results[name] = summarise(metrics)
            content = {"env": describe_environment(), "seconds": time.time() - started, "results": results}
            write_atomically(args.out / "results.json", json.dumps(content, indent=1) + "\n")
    sys.stdout.write(table(results) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
