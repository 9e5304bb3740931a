"""Time and memory of a training step of a whole operator: sparse, dense, and with all experts evaluated.

The models live in one process and take turns, so that whatever else the machine does hits all alike. A step is
forward, backward, clipping and AdamW. The sparse model has its balance terms, runs the expert-parallel layer on one
rank, and updates all its experts; so does the model that evaluates every expert on every token, as MoE-POT's public
code does. The dense one has as many parameters as the sparse one has active, router and all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from all_experts import AllExperts
from processes import ROOT, answer_of, read_status
from timing import clock, in_turns, quartiles, ratios
from torch import Tensor, nn

from shodh.config import RunConfig, config_from_dict, load_config, to_dict
from shodh.config.reading import merge_trees
from shodh.core.cli import command_parser, run_main
from shodh.core.environment import write_record
from shodh.core.errors import ConfigError
from shodh.experiments.harness.flops import sample_inputs
from shodh.experiments.harness.sizes import widened_dense
from shodh.models.factory import build_operator
from shodh.models.init import initialise
from shodh.models.kernels import adamw
from shodh.moe.balance import GlobalBalance
from shodh.moe.groups import decay_groups
from shodh.moe.step import router_arguments
from shodh.report.page import Table, text_table
from shodh.train.runtime import start_distributed

DEMO = ROOT / "launch" / "configs" / "demo.yaml"
PHASES = ("forward", "backward", "optimizer")
KINDS = ("sparse", "dense", "all_experts")
EXAMPLES = """examples:
  python tools/bench/step.py --config launch/configs/demo.yaml --out bench/step_demo.json
  python tools/bench/step.py --config launch/configs/moe_pot_tiny.yaml --set operator.field.mlp=256
  python tools/bench/step.py --batch 1 --set "data.grid=[128, 128, 128]" operator.dim=256 operator.experts.num_experts=8
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--config", type=Path, default=DEMO, help="configuration of a sparse run")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings of the run"
    )
    parser.add_argument("--batch", type=int, help="samples of a step (default: those of one of the planned ranks)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16: weights and activations, as on GPUs")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=15, help="steps of each model that are timed")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="write the numbers, machine, versions and command as JSON")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory: a process for each model")
    parser.add_argument("--measure-memory", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Bench:
    """A run's operator in its kinds, and one batch for all of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.config = load_config(args.config, args.set)
        if self.config.operator.experts.num_experts == 0:
            raise ConfigError(f"{args.config} is a dense model; give one with experts")
        if "sparse" not in args.kinds:
            raise ConfigError("--kinds: every kind is compared with sparse; name it too")
        train, parallel = self.config.operator.train, self.config.parallel
        ranks = parallel.nodes * parallel.gpus_per_node
        self.batch = args.batch or train.micro_batch or max(1, train.global_batch // ranks)
        self.dtype = torch.bfloat16 if (args.precision or train.precision) == "bf16" else torch.float32
        self.device = start_distributed()
        if args.threads:
            torch.set_num_threads(args.threads)

    def configuration(self, kind: str) -> RunConfig:
        """The run, or that of the dense model."""
        if kind != "dense":
            return self.config
        changes = {"operator": widened_dense(self.config)}
        return config_from_dict(merge_trees(to_dict(self.config), changes), "the dense model")

    def build(self, kind: str) -> nn.Module:
        from shodh.moe.layer import ExpertLayer, expert_layer_factory

        factory = AllExperts if kind == "all_experts" else expert_layer_factory(1, 0)
        model = build_operator(self.configuration(kind), factory)
        initialise(model, self.config.seed)
        model.to(self.device, self.dtype)
        for module in model.modules():
            if isinstance(module, ExpertLayer):
                module.set_deepspeed_parallelism()
        return model

    def inputs(self) -> tuple[Tensor, Tensor]:
        """History and static inputs; samples of two kinds, so that routing has something to tell apart."""
        draw = torch.Generator().manual_seed(self.config.seed)
        history, static = (
            torch.randn(self.batch, *x.shape[1:], generator=draw) for x in sample_inputs(self.config, "meta")
        )
        history[::2] += torch.randn(1, 1, history.shape[2], *(1,) * (history.ndim - 3), generator=draw)
        return history.to(self.device), static.to(self.device)

    def describe(self) -> dict[str, Any]:
        operator = self.config.operator
        experts = operator.experts
        return {
            "kind": operator.kind,
            "dim": operator.dim,
            "depth": operator.depth,
            "form": experts.form,
            "hidden": experts.hidden,
            "num_experts": experts.num_experts,
            "num_shared": experts.num_shared,
            "top_k": experts.top_k,
            "router": experts.router.kind,
            "granularity": experts.router.granularity,
            "grid": list(self.config.data.grid),
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }


def make_step(bench: Bench, model: nn.Module) -> Callable[[], list[float]]:
    """A function that makes one training step and returns the seconds of each of `PHASES`."""
    train, experts = bench.config.operator.train, bench.config.operator.experts
    optimizer = adamw(decay_groups(model, train.weight_decay), train.lr, train.betas, "torch")
    history, static = bench.inputs()
    target = torch.zeros_like(history[:, -1])
    regime = torch.arange(bench.batch, device=bench.device) % len(bench.config.data.regimes)
    balance = GlobalBalance()
    parameters = list(model.parameters())
    sparse = any(hasattr(m, "router") for m in model.modules())

    def step() -> list[float]:
        start = clock(bench.device)
        balance.start_step()
        names = [(sample,) for sample in range(bench.batch)]
        told = router_arguments(experts, regime, names, bench.config.seed) if sparse else {}
        output = model(history, static, **told)
        loss = (output.latent - target).square().mean()
        if output.routing:
            loss = loss + balance(output.routing).weighted(experts.balance)
        forward = clock(bench.device)
        loss.backward()
        backward = clock(bench.device)
        nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizer.step()
        optimizer.zero_grad()
        return [forward - start, backward - forward, clock(bench.device) - backward]

    return step


def time_steps(bench: Bench, kinds: list[str], rounds: int) -> dict[str, Any]:
    """Median milliseconds by model and phase, and quartiles over the rounds of sparse over each other kind."""
    models = {kind: bench.build(kind) for kind in kinds}
    steps = {kind: make_step(bench, model) for kind, model in models.items()}
    times = in_turns(steps, rounds, 3)
    totals = {kind: [sum(phases) for phases in rows] for kind, rows in times.items()}
    result: dict[str, Any] = {}
    for kind in kinds:
        columns = list(zip(*times[kind], strict=True))
        result[kind] = {
            "parameters": sum(p.numel() for p in models[kind].parameters()),
            "step_ms": 1e3 * statistics.median(totals[kind]),
            **{f"{phase}_ms": 1e3 * statistics.median(column) for phase, column in zip(PHASES, columns, strict=True)},
        }
    others = [kind for kind in kinds if kind != "sparse"]
    result["ratios"] = {f"sparse / {kind}": quartiles(ratios(totals["sparse"], totals[kind])) for kind in others}
    return result


def measure_memory(bench: Bench, kind: str) -> float:
    """Peak MiB of two steps: of CUDA's allocator, or of resident memory above that before the model was built."""
    if bench.device.type == "cuda":
        make_step_twice(bench, kind)
        return torch.cuda.max_memory_allocated() / 2**20
    # Forget the peak of the imports (Linux: proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    make_step_twice(bench, kind)
    return (read_status("VmHWM") - before) / 2**20


def make_step_twice(bench: Bench, kind: str) -> None:
    step = make_step(bench, bench.build(kind))
    step()
    step()


def memory_in_own_process(kind: str) -> float:
    """`measure_memory` in a process of its own: the peak of one model must not hide that of the other."""
    return float(answer_of([sys.executable, *sys.argv, "--measure-memory", kind]))


def table(result: dict[str, Any]) -> str:
    """The numbers for people."""
    rows = [[kind, *result[kind].values()] for kind in KINDS if kind in result]
    lines = [text_table(Table(["model", *result["sparse"]], rows))]
    for name, q in result["ratios"].items():
        lines.append(f"{name}: {q['median']:.3f} (quartiles {q['low']:.3f} to {q['high']:.3f})")
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse()
    bench = Bench(args)
    if args.measure_memory:
        sys.stdout.write(f"{measure_memory(bench, args.measure_memory)}\n")
        return 0
    kinds = [kind for kind in KINDS if kind in args.kinds]
    result = time_steps(bench, kinds, args.rounds)
    for kind in [] if args.no_memory else kinds:
        result[kind]["peak_mib"] = memory_in_own_process(kind)
    settings = bench.describe()
    sys.stdout.write(", ".join(f"{k} {v}" for k, v in settings.items()) + "\n" + table(result))
    write_record(args.out, {"settings": settings, "result": result})
    return 0


if __name__ == "__main__":
    run_main(main)
