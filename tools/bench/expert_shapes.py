"""One expert layer against a dense one of equal active size, compiled, at sizes that are published for one H100.

Forward alone, forward and backward, on a GPU also in a CUDA graph, which leaves out what the host adds. All variants
live in one process and take turns. `tools/bench/experts.py --shapes` runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from timing import in_turns, seconds
from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.experts import ExpertLayerReference, build_dense

Run = Callable[[], object]


class Shape(NamedTuple):
    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    @property
    def forward_flops(self) -> int:
        return 6 * self.tokens * self.dim * self.hidden * self.top_k


SHAPES = {"top1": Shape(32768, 768, 2048, 8, 1), "many": Shape(40960, 768, 512, 64, 4)}
TINY = {"top1": Shape(96, 32, 64, 4, 1), "many": Shape(96, 32, 16, 8, 4)}


def build(shape: Shape, device: torch.device, dtype: torch.dtype, all_on_one: bool = False) -> ExpertLayerReference:
    """The layer, without shared experts; ``all_on_one``: every token goes to the first ``top_k`` experts."""
    layer = ExpertLayerReference(_config(shape), shape.dim)
    initialise(nn.ModuleDict({"layer": layer}), 0)
    layer.to(device, dtype)
    layer.router.selection_bias = layer.router.selection_bias.float()
    layer.router.selection_bias[: shape.top_k] = 10.0 if all_on_one else 0.0
    return layer


def _config(shape: Shape) -> ExpertsConfig:
    router = {"score": "softmax", "normalise": "after" if shape.top_k > 1 else "before"}
    return ExpertsConfig(
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden=shape.hidden,
        num_shared=0,
        router=router,  # type: ignore[arg-type]
    )


def variants(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Run, Run]]:
    """By name: forward alone, and forward and backward."""
    draw = torch.Generator().manual_seed(0)
    x, given = (torch.randn(1, shape.tokens, shape.dim, generator=draw).to(device, dtype) for _ in range(2))
    x.requires_grad_()
    dense = build_dense(_config(shape), shape.dim, shape.top_k)
    initialise(nn.ModuleDict({"layer": dense}), 0)
    dense.to(device, dtype)
    balanced, hot = build(shape, device, dtype), build(shape, device, dtype, all_on_one=True)
    layers: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "dense": (dense, lambda: dense(x)),
        "sparse": (balanced, lambda: balanced(x)[0]),
        "sparse, all on one": (hot, lambda: hot(x)[0]),
    }
    if device.type == "cuda":
        compiled = torch.compile(dense)
        layers["dense, compiled"] = (dense, lambda: compiled(x))

    def pair(layer: nn.Module, forward: Callable[[], Tensor]) -> tuple[Run, Run]:
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def alone() -> object:
            with torch.no_grad():
                return forward()

        return alone, lambda: torch.autograd.grad(forward(), leaves, given, allow_unused=True)

    return {name: pair(*layer) for name, layer in layers.items()}


def in_graph(run: Run) -> Run:
    """``run`` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Medians by variant; a graph that cannot be captured is named in ``failed``."""
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for name, passes in variants(shape, device, dtype).items():
        for part, run in zip(("forward", "both"), passes, strict=True):
            for _ in range(3):
                run()
            runs[f"{name} | {part}"] = run
            if device.type == "cuda":
                try:
                    runs[f"{name}, graph | {part}"] = in_graph(run)
                except RuntimeError as error:  # Say so, and measure the others.
                    failed[f"{name}, graph | {part}"] = str(error).split("\n")[0]
    times = in_turns({name: partial(seconds, run, device) for name, run in runs.items()}, rounds, 0)
    result: dict[str, Any] = {"shape": shape._asdict(), "failed": failed, "variants": {}}
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    for name in dict.fromkeys(n.split(" | ")[0] for n in runs):
        if f"{name} | both" not in medians or f"{name} | forward" not in medians:
            continue
        forward, both = medians[f"{name} | forward"], medians[f"{name} | both"]
        backward = max(both - forward, 1e-9)
        result["variants"][name] = {
            "forward_ms": forward,
            "both_ms": both,
            "tflops": {
                "forward": shape.forward_flops / forward / 1e9,
                "backward": 2 * shape.forward_flops / backward / 1e9,
                "both": 3 * shape.forward_flops / both / 1e9,
            },
        }
    base = "dense, compiled" if device.type == "cuda" else "dense"
    for name, row in result["variants"].items():
        against = base + (", graph" if name.endswith(", graph") else "")
        if against in result["variants"]:
            row["over_dense"] = row["both_ms"] / result["variants"][against]["both_ms"]
    return result


def table(name: str, result: dict[str, Any]) -> str:
    """The numbers for people."""
    lines = [", ".join([name, *(f"{k} {v}" for k, v in result["shape"].items())])]
    lines.append(f"{'':<26}{'ms':>10}{'TFLOP/s':>10}{'forward':>10}{'backward':>10}{'/ dense':>10}")
    for variant, row in result["variants"].items():
        rates = (row["tflops"][part] for part in ("both", "forward", "backward"))
        rest = "".join(f"{rate:>10.4g}" for rate in rates)
        lines.append(f"{variant:<26}{row['both_ms']:>10.3f}{rest}{row.get('over_dense', float('nan')):>10.3f}")
    lines += [f"{variant} failed: {why}" for variant, why in result["failed"].items()]
    return "\n".join(lines) + "\n"
