"""Kill a training on two ranks at random moments, run it again, and compare with an undisturbed run.

Half of the kills are aimed: at a save while its files are written, at its publication and the pruning after it, and at
a resume before its first step. Every other kill hits one rank first and the other, as a launcher would, half a second
later. Compared are metrics but those of the clock, traces, weights, the optimiser's state, and what a person left in
the folder of checkpoints. Ends with one line of JSON; exit code 1 if something differs.

example:
  python tools/bench/killing_training.py --kills 100
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# What the ranks need is imported once, here: they are forks.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401
from torch.distributed import TCPStore  # noqa: E402

import shodh.moe.layer  # noqa: E402
import shodh.train.jobs  # noqa: E402, F401
from shodh.core.cli import command_parser  # noqa: E402
from shodh.core.strict_json import dumps  # noqa: E402
from shodh.train.metrics import read_metrics  # noqa: E402
from shodh.train.runtime import AGENT_STORE  # noqa: E402

WORLD = 2
AIMS = ("anywhere", "writing", "anywhere", "publishing", "anywhere", "resuming")
FIELDS = [
    {"name": "velocity", "kind": "vector", "solenoidal": True},
    {"name": "tracer"},
    {"name": "solid", "static": True},
]


def configure(folder: Path, steps: int, width: int, every: int) -> Path:
    """Data, a tokenizer and a configuration of an operator whose checkpoints take a while to write."""
    data, regimes = folder / "data", ("open_channel", "porous_media")
    options = ["--grid", "16", "--trajectories", "8", "--frames", "6", "--out", str(data)]
    assert run("tools/generate_data.py", "--regime", *regimes, *options, world=1) == 0
    small = {"global_batch": 8, "warmup": 2, "log_every": 10, "valid_batches": 1}
    experts = {"num_experts": 4, "hidden": width, "router": {"kind": "two_level"}, "balance": {"bias_rate": 1e-3}}
    saved = {"steps": steps, "checkpoint_every": every, "keep_checkpoints": 2, "valid_every": 20}
    operator = {"dim": 64, "depth": 2, "heads": 2, "input_noise": 0.05, "experts": experts, "train": small | saved}
    tree = {
        "name": "whole",
        "out": str(folder / "runs"),
        "data": {
            "grid": [16, 16, 16],
            "history": 2,
            "fields": FIELDS,
            "regimes": [{"name": name, "path": str(data / name)} for name in regimes],
        },
        "tokenizer": {
            "run": str(folder / "tokenizer"),
            "latent_channels": 8,
            "widths": [8, 8, 16],
            "train": {**small, "steps": 2},
        },
        "operator": operator,
        "parallel": {"ep_size": 2},
    }
    path = folder / "config.yaml"
    path.write_text(dumps(tree))  # JSON is YAML.
    assert run("launch/train_tokenizer.py", "--config", str(path), world=1) == 0
    return path


def _rank(script: str, arguments: Sequence[str], environment: dict[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    os.chdir(ROOT)
    runpy.run_path(script, run_name="__main__")


def start(script: str, *arguments: str, world: int = WORLD, log: str = os.devnull) -> list[BaseProcess]:
    """The ranks of a command, as forks of this process, which has imported all they need."""
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, AGENT_STORE: "True", "OMP_NUM_THREADS": 1}
        environment = {name: str(value) for name, value in place.items()}
        process = multiprocessing.get_context("fork").Process(
            target=_rank, args=(str(ROOT / script), arguments, environment, log)
        )
        process.start()
        process.store = store  # type: ignore[attr-defined]  # It listens as long as the ranks may ask.
        ranks.append(process)
    return ranks


def run(script: str, *arguments: str, world: int = WORLD) -> int:
    """Run a command to its end; its first exit code that is not 0."""
    ranks = start(script, *arguments, world=world)
    for process in ranks:
        process.join()
    return next((process.exitcode or 1 for process in ranks if process.exitcode), 0)


def wait_until(reached: Callable[[], bool], ranks: list[BaseProcess], limit: float = 120.0) -> None:
    deadline = time.monotonic() + limit
    while not reached() and all(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.001)


def kill(ranks: list[BaseProcess], *, one_first: bool) -> bool:
    """SIGKILL; whether the command was still at work."""
    alive = all(process.is_alive() for process in ranks)
    for process in random.sample(ranks, len(ranks)):
        process.kill()
        if one_first and alive:
            time.sleep(0.5)
            one_first = False
    for process in ranks:
        process.join()
    return alive


def aim(target: str, ranks: list[BaseProcess], folder: Path, moments: random.Random, step_seconds: float) -> None:
    """Return at a moment of the kind that is asked for."""
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"

    def size() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    def published() -> set[str]:
        return {path.name for path in checkpoints.glob("step_*")}

    if target == "resuming":
        time.sleep(moments.uniform(0.3, 0.9 * starts[-1] if starts else 3.0))
        return
    began, first = time.monotonic(), size()
    wait_until(lambda: size() > first, ranks)  # A resume has cut it before, or there is none yet.
    starts.append(time.monotonic() - began)
    for _ in range(moments.randrange(1, 3) if target != "anywhere" else 0):
        known = published()
        if target == "writing":
            wait_until(lambda: any(checkpoints.glob(".step_*.partial")), ranks)
        else:
            wait_until(lambda known=known: bool(published() - known), ranks)
    spread = {"anywhere": 8.0, "writing": 2.0, "publishing": 0.05}[target]
    time.sleep(moments.uniform(0.0, spread * step_seconds))


starts: list[float] = []  # seconds from a start to its first line


def content(folder: Path) -> dict[str, Any]:
    """What must not depend on kills."""
    clock = ("time", "perf/")
    lines = [
        {k: v for k, v in line.items() if not k.startswith(clock)} for line in read_metrics(folder / "metrics.jsonl")
    ]
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
    traces = {p.name: p.read_bytes() for p in (folder / "routing").glob("*")}
    names = sorted(p.name for p in (folder / "checkpoints").glob("*"))
    return {"metrics": lines, "traces": traces, "weights and moments": files, "names": names}


def leave_a_copy(folder: Path) -> None:
    """What a person may put beside the checkpoints."""
    copy = folder / "checkpoints" / "best"
    newest = sorted((folder / "checkpoints").glob("step_*"))
    if not copy.exists() and newest:
        shutil.copytree(newest[-1], folder / "checkpoints" / "copying", dirs_exist_ok=True)
        (folder / "checkpoints" / "copying").rename(copy)
        (folder / "checkpoints" / "first").symlink_to("best")


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=40, help="of a run; when it is done, the next one begins")
    parser.add_argument("--every", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--width", type=int, default=1024, help="of an expert: how much a checkpoint holds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--log", default=os.devnull, help="what the ranks say, appended to this file")
    parser.add_argument("--keep", type=Path, help="folder to work in, and to leave")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        config = str(configure(folder, args.steps, args.width, args.every))
        began = time.monotonic()
        assert run("launch/pretrain.py", "--config", config) == 0, "the undisturbed run failed"
        duration = time.monotonic() - began
        expected = content(folder / "runs" / "whole")
        hits, different, complaints, runs = Counter[str](), [], 0, 0
        while sum(hits.values()) < args.kills:
            runs += 1
            name = f"killed{runs}"
            victim = folder / "runs" / name
            command = ("launch/pretrain.py", "--config", config, "--set", f"name={name}", "--resume", "auto")
            code = None
            while code is None:
                ranks = start(*command, log=args.log)
                done = sum(hits.values())
                if done < args.kills:
                    target = AIMS[done % len(AIMS)]
                    aim(target, ranks, victim, moments, duration / args.steps)
                    if kill(ranks, one_first=done % 2 == 1):
                        hits[target] += 1
                        leave_a_copy(victim)
                        continue
                for process in ranks:
                    process.join()
                codes = [process.exitcode for process in ranks]
                code = next((c for c in codes if c), 0)
            complaints += code != 0
            found = content(victim)
            kept = (victim / "checkpoints" / "best").exists()
            theirs = [n for n in found["names"] if n in ("best", "first")]
            found["names"] = [n for n in found["names"] if n not in theirs]
            found["weights and moments"] = {
                n: b for n, b in found["weights and moments"].items() if "/best/" not in n and "/first/" not in n
            }
            different += [f"{name}: {key}" for key in expected if found[key] != expected[key]]
            different += [f"{name}: what a person left"] if kept and len(theirs) != 2 else []
            shutil.rmtree(victim)
    result = {
        "kills_at_work": sum(hits.values()),
        "aimed": dict(hits),
        "runs": runs,
        "failed_runs": complaints,
        "different": different,
        "checkpoint_mb": round(sum(len(b) for b in expected["weights and moments"].values()) / 2e6, 1),
        "undisturbed_seconds": round(duration, 1),
    }
    sys.stdout.write(dumps(result) + "\n")
    return 1 if different or complaints else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
