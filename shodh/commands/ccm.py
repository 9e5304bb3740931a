"""Run a study of composition (CCM): an anchor and two experts of a family for each seed, every method, one report.

Data are solved, models trained and results measured in this order; finished pieces are kept, and an interrupted one
goes on with the same command.
"""

from __future__ import annotations

from shodh.experiments.composition.report import write_ccm_report
from shodh.experiments.composition.runs import describe_study, expand, prepare
from shodh.experiments.composition.settings import load_ccm
from shodh.experiments.harness.command import Study, conduct, one_by_one, parse_study, study_parser
from shodh.train.runtime import quiet_logs

EXAMPLES = """examples:
  shodh ccm --config launch/configs/ccm_vorticity.yaml --jobs 2
  deepspeed --num_gpus 8 launch/ccm.py --config launch/configs/ccm_vorticity.yaml --scale paper --backbone fno_large
  shodh ccm --config launch/configs/ccm_dam_break.yaml --scale small --dry-run
  shodh ccm --config launch/configs/ccm_vorticity.yaml --only 'seed0-*' --set study.anchor_steps=100
  shodh ccm --config launch/configs/ccm_vorticity.yaml --report-only
"""


def main(argv: list[str] | None = None) -> int:
    parser = study_parser(__doc__, EXAMPLES)
    parser.add_argument("--backbone", metavar="NAME", help="one of the study's backbones, in place of its own")
    args, settings = parse_study(parser, argv)
    quiet_logs()
    study = load_ccm(**settings, backbone=args.backbone)
    return conduct(
        Study(
            study,
            expand=lambda world: expand(study, world),
            describe=lambda runs: describe_study(study, runs),
            make=one_by_one(study, prepare=lambda runs, workers: prepare(study, runs, workers)),
            report=lambda runs: write_ccm_report(study),
        ),
        args,
    )
