"""Pre-train the operator: on cached latents, or on fields."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shodh.config import load_config
from shodh.core.cli import add_weights, training_parser
from shodh.core.errors import ConfigError
from shodh.train.runtime import quiet_logs

EXAMPLES = """examples:
  shodh pretrain --config demo --set parallel.ep_size=1                          one rank
  deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/demo.yaml    two
  deepspeed --num_gpus 2 --module shodh pretrain --config demo                   two, outside the source tree
  deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/demo.yaml --resume auto
  deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/demo.yaml --init-from converted/demo
      --set name=next tokenizer.run=runs/demo-tokenizer             another name has another tokenizer, but for this
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
    add_weights(parser, "with --init-from: ")
    args = parser.parse_args(argv)
    if args.weights and args.init_from is None:
        raise ConfigError("--weights says which weights of --init-from are meant; give both, or neither")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    quiet_logs(args.verbose)
    config = load_config(args.config, args.set)
    if args.dry_run:
        from shodh.train.plan_text import dry_run

        sys.stdout.write(dry_run(config, args.nodes, args.gpus_per_node))
        return 0
    from shodh.train.jobs import pretrain

    return 0 if pretrain(config, args.resume, args.init_from, args.profile, args.weights) else 3
