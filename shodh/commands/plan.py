"""Plan a run on 1 to 1,024 cards: memory and traffic of a rank, step time, and what limits it. Touches no data.

A step is rehearsed on tensors without values; rates of an H100 and its networks are stated below the table. The plan of
one number of nodes, with groups and settings, is that of shodh pretrain --dry-run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shodh.config import load_config
from shodh.core.cli import command_parser, positive

EXAMPLES = """examples:
  shodh plan --config launch/configs/h100_multinode.yaml
  shodh plan --config launch/configs/h100_multinode.yaml --set deepspeed=ds_configs/zero1.json --cards 256
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--cards", type=positive, default=1024, help="largest number to plan for (default: 1024)")
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="cards that NVLink joins (default: 8)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    config = load_config(args.config, args.set)
    from shodh.train.plan_text import describe_scaling

    sys.stdout.write(describe_scaling(config, args.gpus_per_node, args.cards))
    return 0
