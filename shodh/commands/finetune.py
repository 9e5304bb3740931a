"""Fine-tune a trained run on a regime it has not seen, from a few trajectories: all weights, experts, or a new expert.

Beside the ways stand the run as it is (zero shot), the same model from scratch, and persistence. Every cell is an
ordinary run folder. Finished cells are kept, and an interrupted one goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from shodh.core.errors import ConfigError

EXAMPLES = """examples:
  shodh finetune --config launch/configs/finetune_tiny.yaml --jobs 2
  deepspeed --num_gpus 2 launch/finetune.py --run runs/moe-pot-tiny --regime vorticity_1e-4=data/pot/nu1e-4/vorticity_2d
      --trajectories 1 4 16 --train all experts new_expert --out runs/finetune
  shodh finetune --config launch/configs/finetune_tiny.yaml --dry-run
  shodh finetune --config launch/configs/finetune_tiny.yaml --report-only
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="fine-tuning file; the settings below stand in place of its own")
    parser.add_argument("--run", help="trained run, or folder of tools/convert_checkpoint.py")
    parser.add_argument("--checkpoint", metavar="TAG", help="of the run (default: the newest)")
    parser.add_argument(
        "--regime",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="unseen regimes, by our field names",
    )
    parser.add_argument(
        "--map", nargs="+", action="extend", default=[], metavar="NAME.OURS=THEIRS", help="other names in their files"
    )
    parser.add_argument("--trajectories", nargs="+", type=int, metavar="N", help="training trajectories (1 4 16)")
    parser.add_argument(
        "--train", nargs="+", choices=("all", "experts", "new_expert"), help="what learns (each of them)"
    )
    parser.add_argument("--router", action="store_true", default=None, help="way experts: the router learns too")
    parser.add_argument("--new-experts", type=int, metavar="K", help="way new_expert: experts added to a layer (1)")
    parser.add_argument("--steps", type=int, help="optimiser steps of a cell (200)")
    parser.add_argument("--lr", type=float, help="highest learning rate of every way of --train (see the settings)")
    parser.add_argument("--seeds", type=int, help="draws of the trajectories, and of what is fresh (3)")
    parser.add_argument("--out", help="folder of the cells and the report")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the run of every cell"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side, each on one rank")
    parser.add_argument("--dry-run", action="store_true", help="list the cells; train nothing")
    parser.add_argument("--report-only", action="store_true", help="report on the cells that are finished")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: must be at least 1")
    if args.config is None and not (args.run and args.regime and args.out):
        raise ConfigError("give --run, --regime and --out, or a file with --config")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from shodh.experiments.finetuning.base import open_base
    from shodh.experiments.finetuning.cells import describe_cells, expand_tuning
    from shodh.experiments.finetuning.settings import Way, load_tuning
    from shodh.train.ranks import Ranks
    from shodh.train.workers import Progress

    given = {name: getattr(args, name) for name in ("run", "checkpoint", "out", "trajectories", "train", "router")}
    given |= {"steps": args.steps, "seeds": args.seeds, "num_added": args.new_experts}
    rates = None if args.lr is None else dict.fromkeys(get_args(Way), args.lr)
    tuning = load_tuning(args.config, args.regime, args.map, **given, lr=rates, set=args.set or None)
    ranks = Ranks()
    cells = expand_tuning(tuning, open_base(tuning.run, tuning.checkpoint), ranks.world)
    if args.dry_run:
        sys.stdout.write(describe_cells(tuning, cells) if ranks.rank == 0 else "")
        return 0
    progress = Progress()
    if not args.report_only:
        from shodh.experiments.transfer.runner import run_jobs

        progress = run_jobs(tuning.out, cells, lambda cell: cell.job(), args.jobs, ranks, tuning.name)
    if ranks.rank == 0:
        from shodh.experiments.finetuning.report import write_tuning_report

        sys.stdout.write(write_tuning_report(tuning, cells))
        sys.stdout.write(f"\nreport: {tuning.out / 'report' / 'index.html'}\n")
        sys.stderr.write(progress.complaints())
    return progress.exit_code
