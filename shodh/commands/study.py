"""Run a study of negative transfer: a grid of runs over models, mixes of regimes, routers and seeds, and one report.

Every cell is an ordinary run folder. Finished cells are kept, and an interrupted one goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shodh.core.cli import choose_names
from shodh.core.errors import ConfigError
from shodh.experiments.transfer.cells import expand
from shodh.experiments.transfer.settings import load_study

EXAMPLES = """examples:
  shodh study --config launch/configs/study_tiny.yaml --jobs 2
  deepspeed --num_gpus 8 launch/study.py --config launch/configs/study_tiny.yaml --scale small
  shodh study --config launch/configs/study_regimes.yaml --dry-run
  shodh study --config launch/configs/study_tiny.yaml --only '*sparse-s0' --set operator.train.steps=50
  shodh study --config launch/configs/study_tiny.yaml --report-only
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, help="study file")
    parser.add_argument("--scale", choices=("tiny", "small", "paper"), default="tiny", help="preset of the study file")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cells whose names match, as in a shell")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side, each on one rank")
    parser.add_argument("--seeds", type=int, help="in place of the study's")
    parser.add_argument("--name", help="in place of the study's")
    parser.add_argument("--out", type=Path, help="folder of the study's folder")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the base run"
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished cells all, not the last alone")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and what they cost; touch no data")
    parser.add_argument("--report-only", action="store_true", help="report on the cells that are finished")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for name in ("jobs", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    study = load_study(args.config, args.scale, name=args.name, out=args.out, seeds=args.seeds, overrides=args.set)
    from shodh.train.ranks import Ranks
    from shodh.train.workers import Progress

    ranks = Ranks()
    every = expand(study, ranks.world)
    chosen = choose_names([cell.name for cell in every], args.only, "cell")
    cells = [cell for cell in every if cell.name in chosen]
    if args.dry_run:
        from shodh.experiments.transfer.costs import describe_costs

        sys.stdout.write(describe_costs(study, cells) if ranks.rank == 0 else "")
        return 0
    progress = Progress()
    if not args.report_only:
        from shodh.experiments.transfer.runner import run_cells

        progress = run_cells(study, cells, args.jobs, ranks, args.keep_checkpoints)
    if ranks.rank == 0:
        from shodh.experiments.transfer.report import write_study_report

        sys.stdout.write(write_study_report(study, every))
        sys.stdout.write(f"\nreport: {study.folder / 'report' / 'index.html'}\n")
        sys.stderr.write(progress.complaints())
    return progress.exit_code
