"""Fine-tune a trained run on a regime it has not seen, from a few trajectories: all weights, experts, or a new expert.

Beside these methods stand the run as it is (zero shot), the same model from scratch, and persistence. Every run has an
ordinary run folder. Finished runs are kept, and an interrupted one goes on with the same command.
"""

from __future__ import annotations

from typing import Any, get_args

from shodh.core.cli import add_weights
from shodh.core.errors import ConfigError
from shodh.experiments.finetuning.base import open_base
from shodh.experiments.finetuning.report import write_tuning_report
from shodh.experiments.finetuning.runs import describe_runs, expand_tuning
from shodh.experiments.finetuning.settings import Method, load_tuning
from shodh.experiments.harness.command import Study, conduct, one_by_one, parse_study, study_parser

EXAMPLES = """examples:
  shodh finetune --config launch/configs/finetune_tiny.yaml --jobs 2
  deepspeed --num_gpus 2 launch/finetune.py --run runs/moe-pot-tiny --regime vorticity_1e-4=data/pot/nu1e-4/vorticity_2d
      --trajectories 1 4 16 --train all experts new_expert --name finetune
  shodh finetune --config launch/configs/finetune_tiny.yaml --dry-run
  shodh finetune --config launch/configs/finetune_tiny.yaml --report-only
"""


def main(argv: list[str] | None = None) -> int:
    parser = study_parser(__doc__, EXAMPLES, config_required=False)
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    add("--run", help="trained run, or folder of tools/convert_checkpoint.py")
    add("--checkpoint", metavar="TAG", help="of the run, or best (default: the newest)")
    add_weights(parser, "of the run: ")
    add("--regime", metavar="NAME=PATH", help="unseen regimes, by our field names", **many)
    add("--map", metavar="NAME.OURS=THEIRS", help="other names in their files", **many)
    add("--trajectories", nargs="+", type=int, metavar="N", help="training trajectories (1 4 16)")
    add("--train", nargs="+", choices=get_args(Method), help="what learns (each of them)")
    add("--router", action="store_true", default=None, help="method experts: the router learns too")
    add("--new-experts", type=int, metavar="K", help="method new_expert: experts added to a layer (1)")
    add("--steps", type=int, help="optimiser steps of a run (200)")
    add("--lr", type=float, help="highest learning rate of every method of --train (see the settings)")
    args, settings = parse_study(parser, argv)
    if args.config is None and not (args.run and args.regime):
        raise ConfigError("give --run and --regime, or a file with --config")
    names = ("run", "checkpoint", "weights", "trajectories", "train", "router", "steps")
    given = {name: getattr(args, name) for name in names}
    rates = None if args.lr is None else dict.fromkeys(get_args(Method), args.lr)
    tuning = load_tuning(named=args.regime, maps=args.map, **settings, **given, num_added=args.new_experts, lr=rates)
    return conduct(
        Study(
            tuning,
            expand=lambda world: expand_tuning(tuning, open_base(tuning.run, tuning.checkpoint), world),
            describe=lambda runs: describe_runs(tuning, runs),
            make=one_by_one(tuning),
            report=lambda runs: write_tuning_report(tuning, runs),
        ),
        args,
    )
