"""Run a study of negative transfer: a grid of runs over models, mixes of regimes, routers and seeds, and one report.

Every run has an ordinary run folder. Finished runs are kept, and an interrupted one goes on with the same command.
"""

from __future__ import annotations

from pathlib import Path

from shodh.core.errors import ConfigError
from shodh.core.reading import read_settings
from shodh.experiments.harness.command import Study, conduct, one_by_one, parse_study, study_parser
from shodh.experiments.harness.costs import describe_costs
from shodh.experiments.harness.settings import load_settings
from shodh.experiments.transfer.map.conduct import map_study
from shodh.experiments.transfer.map.settings import MapConfig
from shodh.experiments.transfer.report import write_study_report
from shodh.experiments.transfer.runs import expand, make_tokenizer
from shodh.experiments.transfer.settings import StudyConfig

EXAMPLES = """examples:
  shodh study --config launch/configs/study_tiny.yaml --jobs 2
  deepspeed --num_gpus 8 launch/study.py --config launch/configs/study_tiny.yaml --scale small
  shodh study --config launch/configs/study_regimes.yaml --dry-run
  shodh study --config launch/configs/study_tiny.yaml --only '*sparse-s0' --set operator.train.steps=50
  shodh study --config launch/configs/study_tiny.yaml --report-only
  shodh study --config launch/configs/study_map.yaml --scale small
"""


def main(argv: list[str] | None = None) -> int:
    parser = study_parser(__doc__, EXAMPLES)
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs all, not the last alone")
    args, settings = parse_study(parser, argv)
    if _is_map(args.config):
        if args.keep_checkpoints:
            raise ConfigError(
                "--keep-checkpoints is of studies whose runs have checkpoints; those of a map leave results alone"
            )
        return conduct(map_study(load_settings(MapConfig, **settings)), args)
    study = load_settings(StudyConfig, **settings)
    return conduct(
        Study(
            study,
            expand=lambda world: expand(study, world, args.keep_checkpoints),
            describe=lambda runs: describe_costs(
                study, study.base, runs, lambda run: {"regimes": "+".join(run.labels["regimes"])}
            ),
            make=one_by_one(study, prepare=lambda runs, workers: make_tokenizer(study, runs, workers)),
            report=lambda runs: write_study_report(study, runs),
        ),
        args,
    )


def _is_map(path: Path) -> bool:
    """Whether a study file is of kind map."""
    tree = read_settings(path)
    return isinstance(tree, dict) and tree.get("kind") == "map"
