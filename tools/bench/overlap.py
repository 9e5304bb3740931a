"""What a slow network costs an expert layer whose rows travel beside its work, on gloo ranks of this machine.

    python tools/bench/overlap.py --rounds 11 --out tools/bench/results/overlap_cpu.json

Each transfer of rows takes so many milliseconds longer; a layer has four, in training. ``serial`` waits for each at
once, ``overlapped`` where the layer does; they take turns, forward and backward, and times are medians of the slowest
rank. ``hidden``: by how much of the four delays a step is shorter, 0.75 where only the way out is seen. ``wall`` is the
time that passed; ``own`` leaves out that others used the processors: a rank's processor time, and what was left of each
delay when it was waited for.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from timing import in_turns
from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.core.cli import command_parser
from shodh.core.environment import write_record
from shodh.core.seeding import generator
from shodh.core.strict_json import dumps
from shodh.moe.experts import ExpertLayerReference

TRANSFERS = 4


class Network:
    """All-to-alls of this process, whose rows arrive ``delay`` seconds after their start or later.

    With ``serial``, the caller waits for every transfer at once. ``own`` is a clock that the machine's other work does
    not move: processor time of this thread, and what is left of the delays when they are waited for.
    """

    def __init__(self, delay: float, serial: bool) -> None:
        self._original: Callable[..., Any] = dist.all_to_all_single
        self._delay, self._serial, self._stood = delay, serial, 0.0

    def own(self) -> float:
        return time.thread_time() + self._stood

    def __call__(self, out: Tensor, given: Tensor, *splits: Any, group: Any, async_op: bool = False) -> Any:
        work = self._original(out, given, *splits, group=group, async_op=True)
        delay = self._delay if out.ndim == 2 else 0.0
        wait = partial(self._wait, work, time.perf_counter() + delay, self.own() + delay)
        if self._serial or not async_op:
            wait()
            return SimpleNamespace(wait=lambda: None)
        return SimpleNamespace(wait=wait)

    def _wait(self, work: dist.Work, until: float, own: float) -> None:
        self._stood += max(0.0, own - self.own())
        work.wait()
        time.sleep(max(0.0, until - time.perf_counter()))


def train(layer: nn.Module, x: Tensor, delay: float, serial: bool) -> tuple[float, float]:
    """Milliseconds of a forward and a backward pass, by the wall's clock and by its own; of the slowest rank."""
    dist.barrier()
    network = Network(delay / 1e3, serial)
    begun = time.perf_counter(), network.own()
    with mock.patch.object(dist, "all_to_all_single", network):
        layer(x)[0].square().mean().backward()
    taken = torch.tensor([time.perf_counter() - begun[0], network.own() - begun[1]])
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    wall, own = (1e3 * taken).tolist()
    return wall, own


def measure(layer: nn.Module, x: Tensor, delays: list[float], rounds: int) -> list[dict[str, float]]:
    """A row a delay."""
    calls = {(delay, serial): partial(train, layer, x, delay, serial) for delay in delays for serial in (True, False)}
    taken = in_turns(calls, rounds, warm_up=1)
    rows = []
    for delay in delays:
        row = {"delay_ms": delay}
        pairs = zip(*(np.array(taken[delay, kind]).T for kind in (True, False)), strict=True)
        for clock, (serial, overlapped) in zip(("wall", "own"), pairs, strict=True):
            row[f"{clock}_serial_ms"], row[f"{clock}_overlapped_ms"] = np.median(serial), np.median(overlapped)
            for name, quartile in (("ratio", 50), ("ratio_low", 25), ("ratio_high", 75)):
                row[f"{clock}_{name}"] = np.percentile(overlapped / serial, quartile)
            if delay:
                row[f"{clock}_hidden"] = np.median(serial - overlapped) / (TRANSFERS * delay)
        rows.append({name: round(float(value), 3) for name, value in row.items()})
    return rows


def start(rank: int, args: argparse.Namespace, store: str, answers: Any) -> None:
    """A rank: its half of the experts, its own samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    config = ExpertsConfig(num_experts=2 * args.ranks, hidden=args.hidden, top_k=1, num_shared=args.shared)
    layer = ExpertLayerReference(config, args.dim, args.ranks, rank)
    layer.ep_group = dist.group.WORLD
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, std=args.dim**-0.5, generator=generator("overlap", name, rank))
    x = torch.randn(1, args.tokens, args.dim, generator=generator("overlap", "x", rank)).requires_grad_()
    rows = measure(layer, x, args.delays, args.rounds)
    if rank == 0:
        answers.put(rows)
        answers.close()
        answers.join_thread()
    dist.barrier()
    os._exit(0)


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 5, 20, 50], help="milliseconds")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=512, help="of a rank")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--shared", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    context = processes.get_context("fork")
    answers = context.Queue()

    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=start, args=(r, args, f"{folder}/store", answers)) for r in range(args.ranks)]
        for process in ranks:
            process.start()
        rows = answers.get(timeout=600)
        for process in ranks:
            process.join()
    sizes = {name: getattr(args, name) for name in ("ranks", "tokens", "dim", "hidden", "shared", "rounds")}
    sys.stdout.write("".join(dumps(row) + "\n" for row in rows))
    write_record(args.out, {"load": os.getloadavg(), **sizes, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
