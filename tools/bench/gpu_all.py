"""Everything that has a CUDA path, in one call: build, correctness, speed, a short real run; most valuable first.

Each step has its own time limit and log; the time of all is bounded. After every step ``OUT/summary.json`` is written
anew, aside and renamed, so that what was measured survives a kill: seconds and outcome of each step, and each figure
beside its aim. Needs torch, nvcc and the packages of the project; no network.
"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shodh.core.cli import command_parser, run_main
from shodh.core.strict_json import write_json

ROOT = Path(__file__).resolve().parents[2]
BENCH = "tools/bench"
REGIMES = ("open_channel", "porous_media")
SINGLE = "launch/configs/h100_single.yaml"
EXAMPLES = """examples:
  bash tools/bench/gpu_all.sh OUT
  bash tools/bench/gpu_all.sh OUT --only decode 'experts*' --minutes 3
  bash tools/bench/gpu_all.sh OUT --tiny               on a CPU: nothing but whether it runs
  bash tools/bench/gpu_profile.sh OUT                  profiles of a sparse and a dense training
"""


@dataclass(frozen=True)
class Aim:
    """A figure in the JSON of a step: where it lies, and what it is to be."""

    name: str
    path: tuple[str, ...]
    at_most: float | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class Step:
    """A command with a time limit; ``{out}`` stands for its own JSON file."""

    name: str
    command: list[str]
    seconds: int
    aims: list[Aim] = field(default_factory=list)
    needs_card: bool = False


def decode_aims() -> list[Aim]:
    rows = ("rows", "name")
    return [
        Aim("decode forward / copy", (*rows, "fused", "over_copy"), at_most=1.1),
        Aim("decode backward / copy", (*rows, "fused backward alone", "over_copy"), at_most=1.1),
        Aim("exact decode / copy", (*rows, "fused exact", "over_copy"), at_most=1.8),
    ]


def step_aims(batch: int) -> list[Aim]:
    return [
        Aim(f"sparse / dense step, batch {batch}", ("result", "ratios", "sparse / dense", "median")),
        Aim(f"sparse step ms, batch {batch}", ("result", "sparse", "step_ms")),
        Aim(f"dense step ms, batch {batch}", ("result", "dense", "step_ms")),
    ]


def steps(out: Path, tiny: bool, profile: bool) -> list[Step]:
    """All steps, most valuable first; or those that profile a sparse and a dense training."""
    device, grid, batch = ("cpu", "16", "1") if tiny else ("cuda", "128", "8")
    config = "launch/configs/demo.yaml" if tiny else SINGLE
    small = ["--set", "data.grid=[16, 16, 16]"] if tiny else []
    rounds = "2" if tiny else "15"
    data, runs = out / "data", out / "runs"

    def python(script: str, *arguments: str) -> list[str]:
        return [sys.executable, script, *arguments]

    def decode(dtype: str) -> Step:
        options = ["--device", device, "--grid", grid, "--batch", batch, "--dtype", dtype, "--rounds", rounds]
        skip = ["--skip", "compile", "physicsnemo"]
        aims = decode_aims() if dtype == "float32" else decode_aims()[:2]
        return Step(f"decode_{dtype}", python(f"{BENCH}/decode.py", *options, *skip, "--json", "{out}"), 40, aims)

    def whole_step(batch: int) -> Step:
        options = ["--config", config, "--batch", str(batch), "--kinds", "sparse", "dense", "--rounds", rounds]
        command = python(f"{BENCH}/step.py", *options, "--no-memory", "--out", "{out}", *small)
        return Step(f"step_{batch}", command, 60, step_aims(batch))

    tokenizer = ["--config", config, "--batch", "1" if tiny else "4", "--rounds", rounds, "--out", "{out}", *small]
    frames = ["--trajectories", "4", "--frames", "6", "--grid", grid, "--device", device, "--out", str(data)]
    short = ["--config", config, "--set", f"out={runs}", "name=gpu", *small[1:]]
    for number, regime in enumerate(REGIMES):
        short.append(f"data.regimes.{number}.path={data / regime}")
    lengths = {"tokenizer": 3, "operator": 8 if profile else 3} if tiny else {"tokenizer": 100, "operator": 200}
    for part, count in lengths.items():
        short += [f"{part}.train.steps={count}", f"{part}.train.log_every={max(1, count // 10)}"]
        short += [f"{part}.train.valid_every=0", f"{part}.train.checkpoint_every=0", f"{part}.train.warmup=1"]
        short += [f"{part}.train.global_batch=2", "parallel.gpus_per_node=1", "parallel.ep_size=1"] if tiny else []
    quick = ["open_channel.spin_up=0.2"]
    build = ["-m", "shodh.ops", "--build", "cpu" if tiny else "cuda"]
    prepare = [
        Step("data", python("tools/generate_data.py", "--regime", *REGIMES, *frames, "--set", *quick), 100),
        Step("train_tokenizer", python("launch/train_tokenizer.py", *short, "--resume", "auto"), 60),
    ]
    train = python("launch/pretrain.py", *short)
    if profile:
        train += [f"tokenizer.run={runs / 'gpu-tokenizer'}", "--profile", "1" if tiny else "10", "--set"]
        return [
            *prepare,
            Step("profile_sparse", [*train, "name=gpu-sparse"], 90),
            Step("profile_dense", [*train, "name=gpu-dense", "operator.experts.num_experts=0"], 90),
        ]
    return [
        Step("environment", python("-c", "import torch; torch.cuda.is_available() and torch.cuda.init()"), 60),
        Step("build", [sys.executable, *build], 150),
        decode("float32"),
        decode("bfloat16"),
        Step("experts", python(f"{BENCH}/experts.py", *expert_options(tiny), "--out", "{out}"), 60, expert_aims()),
        whole_step(1 if tiny else 8),
        *([] if tiny else [whole_step(16)]),
        Step(
            "tokenizer",
            python(f"{BENCH}/tokenizer.py", *tokenizer),
            60,
            [
                Aim("tokenizer training samples/s", ("result", "training", "samples_per_s"), at_least=60),
                Aim("tokenizer encoding samples/s", ("result", "encoding", "samples_per_s"), at_least=200),
            ],
        ),
        Step("gpu_tests", python("-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"), 60, [], True),
        *prepare,
        Step("pretrain", train, 120),
        Step("evaluate", python("launch/evaluate.py", "--run", str(runs / "gpu")), 60),
    ]


def expert_options(tiny: bool) -> list[str]:
    return ["--shapes", "top1", "many", *(["--tiny", "--rounds", "2"] if tiny else ["--precision", "bf16"])]


def expert_aims() -> list[Aim]:
    top1, many = ("shapes", "top1", "variants"), ("shapes", "many", "variants")
    return [
        Aim("sparse / compiled dense", (*top1, "sparse", "over_dense"), at_most=1.45),
        Aim("sparse / compiled dense, all on one expert", (*top1, "sparse, all on one", "over_dense"), at_most=1.45),
        Aim("sparse / compiled dense, CUDA graphs", (*top1, "sparse, graph", "over_dense"), at_most=1.3),
        Aim("64 experts forward, TFLOP/s", (*many, "sparse", "tflops", "forward"), at_least=200),
        Aim("64 experts backward, TFLOP/s", (*many, "sparse", "tflops", "backward"), at_least=280),
    ]


def find(content: Any, path: tuple[str, ...]) -> float | None:
    """A number in a step's JSON; a list of rows is searched by the name that follows ``name``."""
    while path:
        if isinstance(content, list):
            key, value, *rest = path
            content = next((row for row in content if row.get(key) == value), None)
            path = tuple(rest)
        elif isinstance(content, dict):
            content, path = content.get(path[0]), path[1:]
        else:
            return None
    return content if isinstance(content, int | float) else None


def run(step: Step, out: Path, limit: float) -> dict[str, Any]:
    """Run a step; its outcome and its figures. A step that meets its limit is ended with all it has started."""
    file, log = out / f"{step.name}.json", out / f"{step.name}.log"
    command = [part.replace("{out}", str(file)) for part in step.command]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("w") as text:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=text, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = "time limit"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome = {"seconds": round(time.monotonic() - start, 1), "outcome": "passed" if code == 0 else code}
    content = json.loads(file.read_text()) if file.exists() else None
    return {**outcome, "command": command, "figures": list(judge(step, content))}


def judge(step: Step, content: Any) -> Iterator[dict[str, Any]]:
    """Each figure beside its aim."""
    for aim in step.aims:
        value = find(content, aim.path)
        met = None
        if value is not None and (aim.at_most is not None or aim.at_least is not None):
            met = (aim.at_most is None or value <= aim.at_most) and (aim.at_least is None or value >= aim.at_least)
        yield {"name": aim.name, "value": value, "at_most": aim.at_most, "at_least": aim.at_least, "met": met}


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = []
    for name, row in summary["steps"].items():
        lines.append(f"{name:18s} {row['seconds']:7.1f} s  {row['outcome']}")
        for figure in row["figures"]:
            if figure["value"] is None:
                continue
            aim = [f"{sign} {figure[key]:g}" for key, sign in (("at_most", "<="), ("at_least", ">=")) if figure[key]]
            verdict = {None: "", True: "met", False: "missed"}[figure["met"]]
            lines.append(f"    {figure['name']:40s} {figure['value']:10.4g}  {' '.join(aim)} {verdict}".rstrip())
    return "\n".join(lines) + "\n"


def describe() -> dict[str, Any]:
    """Machine and versions, asked for in a process of its own: this one does not touch the card."""
    code = "import json, shodh.core.environment as e; print(json.dumps(e.describe_environment()))"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    known: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1]) if asked.returncode == 0 else {}
    return known


def main() -> int:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("out", type=Path, help="folder of logs, JSON and short runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of all steps (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="steps whose names match, as in a shell")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at the smallest sizes")
    parser.add_argument("--profile", action="store_true", help="profile a sparse and a dense training instead")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    summary: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M"), "env": describe(), "steps": {}}
    for step in steps(out, args.tiny, args.profile):
        if args.tiny:  # Nothing to judge.
            step = replace(step, aims=[replace(aim, at_most=None, at_least=None) for aim in step.aims])
        if args.only and not any(fnmatch.fnmatch(step.name, pattern) for pattern in args.only):
            continue
        if step.needs_card and args.tiny:
            continue
        left = end - time.monotonic()
        sys.stdout.write(f"== {step.name}\n")
        sys.stdout.flush()
        if left < 5:
            summary["steps"][step.name] = {"seconds": 0.0, "outcome": "no time left", "figures": []}
        else:
            summary["steps"][step.name] = run(step, out, left if args.tiny else min(step.seconds, left))
        write_json(out / "summary.json", summary)
    sys.stdout.write(table(summary))
    failed = [name for name, row in summary["steps"].items() if row["outcome"] != "passed"]
    if failed:
        sys.stdout.write(f"not passed: {', '.join(failed)}; see {out}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
