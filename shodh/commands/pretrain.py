"""Pre-train the operator: on cached latents, or on fields."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shodh.config import dump_config, load_config
from shodh.core.cli import training_parser
from shodh.core.distributed import rank
from shodh.train.runtime import quiet_logs

EXAMPLES = """examples:
  shodh pretrain --config demo --set parallel.ep_size=1                          one rank
  deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/demo.yaml    two
  deepspeed --num_gpus 2 --module shodh pretrain --config demo                   two, outside the source tree
  deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/demo.yaml --resume auto
  deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/demo.yaml --set name=next --init-from converted/demo
  deepspeed launch/pretrain.py --config launch/configs/h100_multinode.yaml --dry-run --nodes 16
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="WEIGHTS",
        help="start a new run from a checkpoint folder, a folder of tools/convert_checkpoint.py or a safetensors file, "
        "at any ranks, EP degree and ZeRO stage; a checkpoint gives float32 weights, of a bf16 run too",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and every setting; touch no data")
    parser.add_argument("--nodes", type=int, help="dry run: nodes to plan for (default: what the configuration says)")
    parser.add_argument("--gpus-per-node", type=int, help="dry run: GPUs of a node")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    quiet_logs(args.verbose)
    config = load_config(args.config, args.set)
    if args.dry_run:
        from shodh.train.plan import describe_plan, make_plan

        plan = describe_plan(make_plan(config, args.nodes, args.gpus_per_node))
        settings = f"\nsettings, every default written out\n\n{dump_config(config)}"
        sys.stdout.write(plan + settings if rank() == 0 else "")
        return 0
    from shodh.train.jobs import pretrain

    return 0 if pretrain(config, args.resume, args.init_from, args.profile) else 3
