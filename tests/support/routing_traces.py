"""Synthetic traces whose statistics are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shodh.moe.trace import VERSION

GRID = (4, 4, 2)
TOKENS = 32


def line(step: int, counts: Mapping[str, Sequence[int]], layer: int = 0, split: str = "train", **more: Any) -> str:
    """One line of a trace with these counts."""
    experts = len(next(iter(counts.values())))
    tokens = int(sum(map(sum, counts.values())))
    record = {"v": VERSION, "step": step, "split": split, "layer": layer, "rank": 0, "num_tokens": tokens, "top_k": 1}
    record |= {"num_experts": experts, "counts": {k: [int(n) for n in v] for k, v in counts.items()}}
    record |= {"mean_score": [1 / experts] * experts, "confidence": 1.0, **more}
    return json.dumps(record, separators=(",", ":")) + "\n"


def sample(step: int, regime: str, trajectory: int, frame: int, top1: np.ndarray, experts: int, layer: int = 0) -> str:
    """The sample record of these first choices ``[*grid]``."""
    counts = {regime: np.bincount(top1.ravel(), minlength=experts)}
    name = f"{regime}/{trajectory}:{frame}"
    more = {"sample": name, "regime": regime, "trajectory": trajectory, "frame": frame, "top1": top1.tolist()}
    return line(step, counts, layer, "valid", **more)


def validation(
    step: int,
    choose: Callable[[int, np.random.Generator], np.ndarray],
    regimes: Sequence[str],
    experts: int,
    rng: np.random.Generator,
    *,
    trajectories: int = 8,
    frames: int = 4,
    layer: int = 0,
) -> Iterable[str]:
    """Sample records of a validation, and the record of their batch; ``choose(regime number, rng) -> [*GRID]``."""
    totals = {regime: np.zeros(experts, dtype=int) for regime in regimes}
    for number, regime in enumerate(regimes):
        for trajectory in range(trajectories):
            for frame in range(frames):
                top1 = choose(number, rng)
                totals[regime] += np.bincount(top1.ravel(), minlength=experts)
                yield sample(step, regime, trajectory, frame, top1, experts, layer)
    yield line(step, totals, layer, "valid")


def write(folder: Path, *ranks: Iterable[str]) -> Path:
    """A folder with one file a rank."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, lines in enumerate(ranks):
        (folder / f"rank{rank}.jsonl").write_text("".join(lines))
    return folder


def megatron_trace(folder: Path, order: Callable[[list[int]], list[int]], top_k: int = 2) -> Path:
    """A trace of Megatron: two layers of 8 experts, any of which may be first; ``order`` arranges those of a token."""
    rng, text = np.random.default_rng(0), ""
    for step in range(4):
        for layer in range(2):
            indices = [order(rng.permutation(8)[:top_k].tolist()) for _ in range(64)]
            head = f'"step":{step},"block":"decoder","layer":{layer},"rank":0,"num_tokens":64,"topk":{top_k}'
            text += f'{{{head},"top_indices":{indices}}}\n'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "router_trace_rank0.jsonl").write_text(text)
    return folder
