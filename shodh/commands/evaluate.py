"""Evaluate a run on held-out trajectories: errors by regime, rollouts, divergence, routing, as table, JSON and page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from shodh.checkpoint.folder import BEST, latest_checkpoint, read_manifest, tag_of
from shodh.core.cli import add_weights, command_parser, positive
from shodh.core.devices import pick_device
from shodh.core.distributed import rank, together, world_size
from shodh.evaluate.evaluation import evaluate, open_run
from shodh.evaluate.report import write_report
from shodh.train.runtime import quiet_logs, start_distributed

EXAMPLES = """examples:
  shodh evaluate --run runs/demo
  shodh evaluate --run runs/demo --checkpoint best
  shodh evaluate --run runs/demo --stride 2                  at twice the time step
  shodh evaluate --run runs/demo --checkpoint step_00000200 --split valid --weights raw
  deepspeed --num_gpus 8 launch/evaluate.py --run runs/h100-single --precision bf16    on all ranks
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--run", required=True, type=Path, help="run folder; the report is written to RUN/report")
    parser.add_argument("--checkpoint", metavar="TAG", help="a checkpoint by its tag, or best (default: the newest)")
    add_weights(parser)
    parser.add_argument("--split", choices=("valid", "test"), help="default: what the run's configuration says")
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="frames between two model steps (default: data.stride); another one's report is RUN/report-strideN",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the networks; measures are float32 (default: %(default)s)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    quiet_logs()
    device = start_distributed() if world_size() > 1 else torch.device(pick_device(args.device))
    shared = world_size() > 1
    evaluator = open_run(args.run, args.checkpoint, device, args.weights, args.precision, args.stride, shared)
    evaluation = evaluate(evaluator, args.split or evaluator.config.evaluation.split)
    with together():
        if rank() == 0:
            sys.stdout.write(write_report(evaluator.folder, evaluation))
            sys.stdout.write(_best_line(args.run))
            sys.stdout.write(f"\nreport: {evaluator.folder.report / 'index.html'}\n")
    return 0


def _best_line(run: Path) -> str:
    """Which checkpoint a run calls its best; nothing where it does not choose."""
    newest = latest_checkpoint(run)
    best = None if newest is None else read_manifest(newest)["state"].get("best")
    if best is None:
        return ""
    return f"\nbest checkpoint: {tag_of(best['step'])}, {best['measure']} {best['value']:.4g} (--checkpoint {BEST})\n"
