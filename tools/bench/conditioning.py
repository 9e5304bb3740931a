"""One operator on a family of viscosities at two time steps, told both, one, or none of them.

Forced two-dimensional flow (vorticity_2d) with a viscosity drawn for each trajectory, log-uniformly over two decades,
and training windows at frame intervals of one and two. One past frame is given, which shows neither. Every arm has the
same data, seeds and steps. Reported of held-out trajectories, at both intervals and at one of three, which was not
trained: VRMSE of one step and of the last step of a rollout, each arm's ratio to the arm that is told nothing, by seed,
with an interval of a nested bootstrap over seeds and trajectories.

example:
  python tools/bench/conditioning.py --steps 400 --seeds 3 --out tools/bench/results/conditioning_cpu.json
  python tools/bench/conditioning.py --tiny --out /tmp/conditioning.json
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import ROOT, call, open_record

from shodh.config import load_config
from shodh.core.cli import command_parser, run_main
from shodh.core.environment import write_record
from shodh.evaluate.evaluation import evaluate, open_run
from shodh.report.statistics import nested_bootstrap

CONFIG = ROOT / "launch" / "configs" / "family_vorticity.yaml"
ARMS = {"none": "[]", "viscosity": "[viscosity]", "time_step": "[time_step]", "both": "[time_step,viscosity]"}
TRAINED, STRIDES = (1, 2), (1, 2, 3)
ROLLOUT = 4


def make_data(folder: Path, tiny: bool) -> None:
    """64 training trajectories of 16 frames, 4 and 16 held out; 10, 1 and 3 of a tiny one."""
    split = ("10", "1", "3") if tiny else ("64", "4", "16")
    call(
        "tools/generate_data.py", "--regime", "vorticity_2d", "--grid", "32", "--frames", "16", "--workers", "1",
        "--trajectories", str(sum(map(int, split))), "--split", *split, "--out", folder, "--trajectories-per-file", "8",
        "--set", "vorticity_2d.initial_scale=3e4", "vorticity_2d.frame_interval=0.25",
        "--vary", "vorticity_2d.viscosity=1e-4:1e-2",
    )  # fmt: skip


def errors_of(run: Path) -> dict[str, list[float]]:
    """VRMSE by stride and step, one a trajectory: ``{"stride 1 step 1": [...]}``, and those of persistence."""
    found: dict[str, list[float]] = {}
    for stride in STRIDES:
        rows = evaluate(open_run(run, None, torch.device("cpu"), stride=stride), "test").trajectories
        for step in (1, ROLLOUT):
            chosen = rows[(rows.measure == "vrmse") & (rows.step == step)].sort_values("trajectory")
            for of in ("model", "persistence"):
                values = chosen[chosen.of == of].value.tolist()
                found[f"stride {stride} step {step}" + (" persistence" if of == "persistence" else "")] = values
    return found


def compare(runs: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean errors of each arm by measure, and ratios to the first arm, over the finished seeds of both."""
    first, table = next(iter(ARMS)), {}
    for arm in ARMS:
        done = [s for s in seeds if f"{arm}-{s}" in runs and f"{first}-{s}" in runs]
        for key in runs[f"{arm}-{done[0]}"]["vrmse"] if done else ():
            if key.endswith("persistence"):
                continue
            own, other = (np.array([runs[f"{a}-{s}"]["vrmse"][key] for s in done]) for a in (arm, first))
            ratios = own.mean(1) / other.mean(1)
            row: dict[str, Any] = {"vrmse": float(own.mean()), "by_seed": own.mean(1).tolist()}
            row["persistence"] = float(np.mean(runs[f"{arm}-{done[0]}"]["vrmse"][f"{key} persistence"]))
            if arm != first:
                interval = nested_bootstrap([own], [other])
                row |= {
                    "ratio": float(math.exp(np.log(ratios).mean())),
                    "ratio_by_seed": ratios.tolist(),
                    "interval": None if interval is None else list(interval),
                }
            table.setdefault(arm, {})[key] = row
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    parser.add_argument("--work", type=Path, help="folder of data and runs; by default one that is removed")
    parser.add_argument("--tiny", action="store_true", help="a minute: nothing but whether it runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    steps, seeds = (4, range(1)) if args.tiny else (args.steps, range(args.seeds))
    chosen = {arm: ARMS[arm] for arm in args.arms}
    record = open_record(args.out, chosen, steps=steps, settings=args.set, tiny=args.tiny)
    with tempfile.TemporaryDirectory() as spare:
        work = (args.work or Path(spare)).absolute()
        data = work / ("tiny" if args.tiny else "data")
        make_data(data, args.tiny)  # What is there is kept.
        common = [
            f"out={work / 'runs'}", f"deepspeed={ROOT / 'ds_configs' / 'cpu.json'}", f"operator.train.steps={steps}",
            f"data.regimes.0.path={data / 'vorticity_2d'}", f"data.strides={list(TRAINED)}",
            "operator.dim=16", "operator.depth=3", "operator.field.residual=true",
            f"operator.train.warmup={max(1, steps // 5)}",
            "operator.train.checkpoint_every=0", "operator.train.valid_every=0", f"evaluation.rollout={ROLLOUT}",
            *args.set,
        ]  # fmt: skip
        record |= {"settings": common, "config": CONFIG.name}
        for seed in seeds:
            for arm in args.arms:
                if (key := f"{arm}-{seed}") not in record["runs"]:
                    settings = [*common, f"name={key}", f"seed={seed}", f"operator.conditions={ARMS[arm]}"]
                    call("launch/pretrain.py", "--config", CONFIG, "--resume", "auto", "--set", *settings)
                    record["runs"][key] = {"vrmse": errors_of(load_config(CONFIG, settings).run_dir)}
                record["summary"] = compare(record["runs"], seeds)
                write_record(args.out, record)
    return 0


if __name__ == "__main__":
    run_main(main)
