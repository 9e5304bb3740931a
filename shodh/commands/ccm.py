"""Run a study of composition (CCM): an anchor and two experts of a family for each seed, every method, one report.

Data are solved, models trained and results measured in this order; finished pieces are kept, and an interrupted one
goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shodh.core.cli import choose_names
from shodh.core.errors import ConfigError
from shodh.experiments.composition.settings import SCALES, load_ccm
from shodh.train.runtime import quiet_logs

EXAMPLES = """examples:
  shodh ccm --config launch/configs/ccm_vorticity.yaml --jobs 2
  deepspeed --num_gpus 8 launch/ccm.py --config launch/configs/ccm_vorticity.yaml --scale paper --backbone fno_large
  shodh ccm --config launch/configs/ccm_dam_break.yaml --scale small --dry-run
  shodh ccm --config launch/configs/ccm_vorticity.yaml --only 'seed0-*' --set study.anchor_steps=100
  shodh ccm --config launch/configs/ccm_vorticity.yaml --report-only
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, help="study file")
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="preset of the study file")
    parser.add_argument("--backbone", metavar="NAME", help="one of the study's backbones, in place of its own")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="stages whose names match, as in a shell")
    parser.add_argument("--jobs", type=int, default=1, help="stages side by side, each on one rank")
    parser.add_argument("--seeds", type=int, help="in place of the study's")
    parser.add_argument("--name", help="in place of the study's")
    parser.add_argument("--out", type=Path, help="folder of the study's folder")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the base run; study.KEY=VALUE: the study itself",
    )
    parser.add_argument("--dry-run", action="store_true", help="list data and stages and what they cost; make nothing")
    parser.add_argument("--report-only", action="store_true", help="report on the seeds that are evaluated")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    quiet_logs()
    for name in ("jobs", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    study = load_ccm(
        args.config,
        args.scale,
        backbone=args.backbone,
        name=args.name,
        out=args.out,
        seeds=args.seeds,
        overrides=args.set,
    )
    from shodh.experiments.composition import pipeline
    from shodh.train.ranks import Ranks
    from shodh.train.workers import Progress

    ranks = Ranks()
    every = pipeline.stages(study)
    names = choose_names([stage.name for stage in every], args.only, "stage")
    chosen = [stage for stage in every if stage.name in names]
    if args.dry_run:
        sys.stdout.write(pipeline.describe_study(study, chosen) if ranks.rank == 0 else "")
        return 0
    progress = Progress()
    if not args.report_only:
        progress = pipeline.run_stages(study, chosen, args.jobs, ranks)
    if ranks.rank == 0:
        from shodh.experiments.composition.report import write_ccm_report

        sys.stdout.write(write_ccm_report(study))
        sys.stdout.write(f"\nreport: {study.folder / 'report' / 'index.html'}\n")
        sys.stderr.write(progress.complaints())
    return progress.exit_code
