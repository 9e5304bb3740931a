"""Time of one expert layer, forward and backward: by the number of experts and by those a token meets.

Beside the sparse layer stand the same experts evaluated densely, all of them on every token as MoE-POT's public code
does it, and one dense layer of equal active size. All variants live in one process and take turns, so that whatever
else the machine does hits all alike. The optimiser is left out: its time grows with all parameters, whoever used them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from all_experts import AllExperts
from expert_shapes import SHAPES, TINY
from expert_shapes import measure as measure_shape
from expert_shapes import table as shape_table
from timing import in_turns, quartiles, ratios, seconds
from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.core.cli import command_parser, run_main
from shodh.core.environment import write_record
from shodh.models.init import initialise
from shodh.moe.experts import build_dense
from shodh.train.runtime import start_distributed

EXAMPLES = """examples:
  python tools/bench/experts.py --threads 1 --out tools/bench/results/experts_cpu.json
  python tools/bench/experts.py --form gated --dim 1024 --tokens 4096 --experts 8 64 --all-experts 8 --top-k 1 2
  python tools/bench/experts.py --shapes top1 many --precision bf16 --out experts_h100.json
"""
Step = Callable[[], float]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--all-experts", type=int, nargs="+", default=[4, 8, 16], help="sizes that are also run densely"
    )
    parser.add_argument("--form", choices=("linear", "gated"), default="linear")
    parser.add_argument("--dim", type=int, default=512, help="width of a token, and of an expert")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=11, help="passes of each variant that are timed")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=tuple(SHAPES),
        help="instead: layers of published sizes against a dense one, compiled on a GPU: 32,768 tokens, 8 experts, "
        "top-1; 40,960 tokens, 64 experts of 512, top-4",
    )
    parser.add_argument("--tiny", action="store_true", help="--shapes at sizes that a CPU runs in seconds")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="write the numbers, machine, versions and command as JSON")
    return parser.parse_args(argv)


class Dense(nn.Module):
    """A dense layer as large as the experts that a token meets."""

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        self.layer = build_dense(config, dim, config.top_k)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x), None


class Bench:
    """Layers and their input on this device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = start_distributed()
        if args.threads:
            torch.set_num_threads(args.threads)
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, args.tokens, args.dim, generator=draw).to(self.device, dtype).requires_grad_()

    def config(self, experts: int, top_k: int) -> ExpertsConfig:
        router = {"score": "softmax", "normalise": "after" if top_k > 1 else "before"}
        form, hidden = self.args.form, self.args.dim
        return ExpertsConfig(
            num_experts=experts,
            top_k=top_k,
            form=form,
            hidden=hidden,
            num_shared=0,
            router=router,  # type: ignore[arg-type]
        )

    def build(self, kind: str, experts: int, top_k: int) -> nn.Module:
        from shodh.moe.layer import ExpertLayer

        config, dim = self.config(experts, top_k), self.args.dim
        layer: nn.Module
        if kind == "sparse":
            layer = ExpertLayer(config, dim, 1, 0)
            layer.set_deepspeed_parallelism()
        else:
            layer = AllExperts(config, dim) if kind == "all experts" else Dense(config, dim)
        initialise(nn.ModuleDict({"layer": layer}), 0)
        return layer.to(self.x)

    def step(self, layer: nn.Module) -> Step:
        """A function that runs forward and backward once and returns its milliseconds."""

        def clear() -> None:
            layer.zero_grad()
            self.x.grad = None

        def run() -> None:
            layer(self.x)[0].square().mean().backward()

        return lambda: 1e3 * seconds(run, self.device, clear)


def variants(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Kind, experts and top-k of all that is timed; the dense kinds do not depend on one of the two numbers."""
    sparse = [("sparse", e, k) for e, k in itertools.product(args.experts, args.top_k) if k <= e]
    every = [("all experts", e, min(max(args.top_k), e)) for e in args.all_experts]
    return [*sparse, *every, *(("dense", max(args.experts), k) for k in args.top_k)]


Times = dict[tuple[str, int, int], list[float]]


def measure(bench: Bench, args: argparse.Namespace) -> Times:
    """Milliseconds of every variant, round by round."""
    return in_turns({variant: bench.step(bench.build(*variant)) for variant in variants(args)}, args.rounds, 1)


def answers(times: Times, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The answers, each the median and quartiles over rounds of the ratio within a round."""
    few, many = min(args.experts), max(args.experts)
    small, large = min(args.top_k), max(args.top_k)
    wanted = {
        f"top-{k}: sparse of {many} experts / of {few}": (("sparse", many, k), ("sparse", few, k)) for k in args.top_k
    }
    wanted |= {
        f"{e} experts: sparse top-{large} / top-{small}": (("sparse", e, large), ("sparse", e, small))
        for e in args.experts
    }
    wanted |= {
        f"{e} experts: all of them / sparse top-{large}": (("all experts", e, large), ("sparse", e, large))
        for e in args.all_experts
    }
    wanted |= {
        f"top-{k}: sparse of {e} experts / dense of equal active size": (("sparse", e, k), ("dense", many, k))
        for e, k in itertools.product(args.experts, args.top_k)
    }
    return {
        name: quartiles(ratios(times[above], times[below]))
        for name, (above, below) in wanted.items()
        if above in times and below in times
    }


def table(times: Times, found: dict[str, dict[str, float]]) -> str:
    """The numbers for people."""
    lines = [f"{'layer':<14}{'experts':>9}{'top-k':>7}{'ms':>10}{'quartiles':>22}"]
    for (kind, experts, top_k), values in times.items():
        q = quartiles(values)
        shown = "-" if kind == "dense" else experts
        span = f"{q['low']:.1f} to {q['high']:.1f}"
        lines.append(f"{kind:<14}{shown:>9}{top_k:>7}{q['median']:>10.1f}{span:>22}")
    lines += [f"{name}: {q['median']:.2f} ({q['low']:.2f} to {q['high']:.2f})" for name, q in found.items()]
    return "\n".join(lines) + "\n"


def write(args: argparse.Namespace, bench: Bench, content: dict[str, Any]) -> None:
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    settings |= {"device": str(bench.device), "threads": torch.get_num_threads()}
    write_record(args.out, {"settings": settings, **content})


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    bench = Bench(args)
    if args.shapes:
        sizes = TINY if args.tiny else SHAPES
        results = {name: measure_shape(sizes[name], bench.device, bench.x.dtype, args.rounds) for name in args.shapes}
        sys.stdout.write("".join(shape_table(name, result) for name, result in results.items()))
        write(args, bench, {"shapes": results})
        return 0
    times = measure(bench, args)
    found = answers(times, args)
    sys.stdout.write(table(times, found))
    rows = [
        {"kind": kind, "experts": experts, "top_k": top_k, "ms": quartiles(values)}
        for (kind, experts, top_k), values in times.items()
    ]
    write(args, bench, {"result": rows, "ratios": found})
    return 0


if __name__ == "__main__":
    run_main(main)
