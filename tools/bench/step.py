"""Time and memory of a training step: the sparse operator against a dense one of equal active size.

Both models live in one process and take turns, so that whatever else the machine does hits both alike. A step is
forward, backward, clipping and AdamW; the sparse model has its balance terms, runs the expert-parallel layer on one
rank, and updates all its experts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shodh.cli import run_main
from shodh.config import OperatorConfig, load_config
from shodh.errors import ConfigError
from shodh.files import write_atomically
from shodh.models.domain import num_static_features
from shodh.models.init import initialise
from shodh.models.kernels import adamw
from shodh.models.operator import LatentTransformer
from shodh.moe.balance import GlobalBalance
from shodh.moe.groups import decay_groups
from shodh.train.run_folder import describe_environment
from shodh.train.runtime import start_distributed

DEMO = Path(__file__).resolve().parents[2] / "launch" / "configs" / "demo.yaml"
PHASES = ("forward", "backward", "optimizer")
KINDS = ("dense", "sparse")
EXAMPLES = """examples:
  python tools/bench/step.py --config launch/configs/demo.yaml --out bench/step_demo.json
  python tools/bench/step.py --dim 256 --heads 4 --hidden 1024 --tokens 4096 --batch 1 --experts 8
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEMO, help="where defaults are from")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--hidden", type=int, help="hidden width of one expert")
    parser.add_argument("--experts", type=int, help="routed experts of the sparse model")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--router", choices=("token", "context", "two_level"))
    parser.add_argument("--tokens", type=int, help="tokens of a sample (default: the latent grid of the configuration)")
    parser.add_argument("--batch", type=int, help="samples of a step (default: those of one of the planned ranks)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16: weights and activations, as on GPUs")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each model that are timed")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers, machine, versions and command as JSON")
    parser.add_argument("--measure-memory", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def token_grid(tokens: int) -> tuple[int, int, int]:
    """The most cube-like ``x >= y >= z`` with ``x y z = tokens``."""
    grids = [
        (tokens // (y * z), y, z)
        for z in range(1, round(tokens ** (1 / 3)) + 1)
        if tokens % z == 0
        for y in range(z, tokens // z + 1)
        if tokens // z % y == 0 and tokens // (y * z) >= y
    ]
    return min(grids, key=lambda grid: grid[0] - grid[2])


class Bench:
    """Settings of a comparison: the configuration with the options put over it."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = load_config(args.config)
        operator = config.operator.model_dump()
        for name in ("dim", "depth", "heads"):
            operator[name] = getattr(args, name) or operator[name]
        for name, value in (("hidden", args.hidden), ("num_experts", args.experts), ("top_k", args.top_k)):
            operator["experts"][name] = value or operator["experts"][name]
        operator["experts"]["router"]["kind"] = args.router or operator["experts"]["router"]["kind"]
        train = config.operator.train
        self.operator = OperatorConfig.model_validate(operator)
        if self.operator.experts.num_experts == 0:
            raise ConfigError(f"{args.config} is a dense model; give --experts to compare it with a sparse one")
        x, y, z = (n // self.operator.patch for n in config.latent_grid)
        self.tokens = token_grid(args.tokens) if args.tokens else (x, y, z)
        planned = config.parallel.nodes * config.parallel.gpus_per_node
        self.batch = args.batch or train.micro_batch or max(1, train.global_batch // planned)
        self.dtype = torch.bfloat16 if (args.precision or train.precision) == "bf16" else torch.float32
        self.history = config.data.history
        self.latent_channels = config.tokenizer.latent_channels
        self.static_channels = num_static_features(sum(f.static for f in config.data.fields))
        self.seed = args.seed
        self.clip = train.clip
        self.device = start_distributed()
        if args.threads:
            torch.set_num_threads(args.threads)

    def build(self, kind: str) -> LatentTransformer:
        """The sparse model, or the dense one whose feed-forward has the size that a token meets in the sparse one."""
        from shodh.moe.layer import ExpertLayer, expert_layer_factory

        settings = self.operator
        if kind == "dense":
            settings = settings.model_copy(update={"experts": settings.experts.model_copy(update={"num_experts": 0})})
        grid = tuple(n * settings.patch for n in self.tokens)
        model = LatentTransformer(
            settings,
            self.latent_channels,
            self.static_channels,
            grid,  # type: ignore[arg-type]
            self.history,
            expert_layer_factory(1, 0),
        )
        initialise(model, self.seed)
        model.to(self.device, self.dtype)
        for module in model.modules():
            if isinstance(module, ExpertLayer):
                module.set_deepspeed_parallelism()
        return model

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """History, static inputs and target; samples of two kinds, so that routing has something to tell apart."""
        draw = torch.Generator().manual_seed(self.seed)
        grid = tuple(n * self.operator.patch for n in self.tokens)
        shape = (self.batch, self.history + 1, self.latent_channels, *grid)
        latents = torch.randn(shape, generator=draw)
        latents[::2] += torch.randn(self.latent_channels, 1, 1, 1, generator=draw)
        static = torch.randn(self.batch, self.static_channels, *grid, generator=draw)
        latents, static = latents.to(self.device), static.to(self.device)
        return latents[:, :-1], static, latents[:, -1]

    def describe(self) -> dict[str, Any]:
        experts = self.operator.experts
        return {
            "dim": self.operator.dim,
            "depth": self.operator.depth,
            "heads": self.operator.heads,
            "hidden": experts.hidden,
            "num_experts": experts.num_experts,
            "num_shared": experts.num_shared,
            "top_k": experts.top_k,
            "router": experts.router.kind,
            "token_grid": list(self.tokens),
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }


def make_step(bench: Bench, model: nn.Module) -> Callable[[], list[float]]:
    """A function that makes one training step and returns the seconds of each of `PHASES`."""
    train = bench.operator.train
    optimizer = adamw(decay_groups(model, train.weight_decay), train.lr, train.betas, "torch")
    history, static, target = bench.inputs()
    balance = GlobalBalance()
    parameters = list(model.parameters())

    def clock() -> float:
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> list[float]:
        start = clock()
        balance.start_step()
        output = model(history, static)
        loss = (output.latent - target).square().mean()
        if output.routing:
            loss = loss + balance(output.routing).weighted(bench.operator.experts.balance)
        forward = clock()
        loss.backward()
        backward = clock()
        nn.utils.clip_grad_norm_(parameters, bench.clip)
        optimizer.step()
        optimizer.zero_grad()
        return [forward - start, backward - forward, clock() - backward]

    return step


def time_steps(bench: Bench, rounds: int) -> dict[str, Any]:
    """Median milliseconds by model and phase, and the median over the rounds of sparse over dense."""
    models = {kind: bench.build(kind) for kind in KINDS}
    steps = {kind: make_step(bench, model) for kind, model in models.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for number in tqdm(range(rounds), desc="rounds", disable=not sys.stderr.isatty()):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            times[kind].append(steps[kind]())
    result: dict[str, Any] = {}
    for kind in KINDS:
        columns = list(zip(*times[kind], strict=True))
        result[kind] = {
            "parameters": sum(p.numel() for p in models[kind].parameters()),
            "step_ms": 1e3 * statistics.median(map(sum, times[kind])),
            **{f"{phase}_ms": 1e3 * statistics.median(column) for phase, column in zip(PHASES, columns, strict=True)},
        }
    ratios = sorted(sum(s) / sum(d) for s, d in zip(times["sparse"], times["dense"], strict=True))
    result["ratio"] = statistics.median(ratios)
    result["ratio_quartiles"] = [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]]
    return result


def _status(key: str) -> int:
    """Bytes from ``/proc/self/status``: ``VmRSS`` is resident now, ``VmHWM`` at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure_memory(bench: Bench, kind: str) -> float:
    """Peak MiB of two steps: of CUDA's allocator, or of resident memory above that before the model was built."""
    if bench.device.type == "cuda":
        make_step_twice(bench, kind)
        return torch.cuda.max_memory_allocated() / 2**20
    # Forget the peak of the imports (Linux: proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    make_step_twice(bench, kind)
    return (_status("VmHWM") - before) / 2**20


def make_step_twice(bench: Bench, kind: str) -> None:
    step = make_step(bench, bench.build(kind))
    step()
    step()


def memory_in_own_process(kind: str) -> float:
    """`measure_memory` in a process of its own: the peak of one model must not hide that of the other."""
    command = [sys.executable, *sys.argv, "--measure-memory", kind]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode != 0:
        raise RuntimeError(f"memory of the {kind} model: {finished.stderr.strip().splitlines()[-1]}")
    return float(finished.stdout.split()[-1])


def table(result: dict[str, Any]) -> str:
    """The numbers for people."""
    columns = ("parameters", "step_ms", *(f"{phase}_ms" for phase in PHASES), "peak_mib")
    lines = ["".join(["model ".ljust(8), *(name.rjust(14) for name in columns)])]
    for kind in KINDS:
        row = result[kind]
        cells = [f"{row[name]:,d}" if name == "parameters" else f"{row[name]:.1f}" for name in columns]
        lines.append("".join([kind.ljust(8), *(cell.rjust(14) for cell in cells)]))
    low, high = result["ratio_quartiles"]
    lines.append(f"sparse / dense: {result['ratio']:.3f} (quartiles {low:.3f} to {high:.3f})")
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse()
    bench = Bench(args)
    if args.measure_memory:
        sys.stdout.write(f"{measure_memory(bench, args.measure_memory)}\n")
        return 0
    result = time_steps(bench, args.rounds)
    for kind in KINDS:
        result[kind]["peak_mib"] = memory_in_own_process(kind)
    settings = bench.describe()
    sys.stdout.write(", ".join(f"{k} {v}" for k, v in settings.items()) + "\n" + table(result))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        date = time.strftime("%Y-%m-%d")
        content = {"date": date, "env": describe_environment(), "settings": settings, "result": result}
        write_atomically(args.out, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
