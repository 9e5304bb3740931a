"""Train the tokenizer: the autoencoder between fields and latents."""

from __future__ import annotations

import sys

from shodh.config import load_config
from shodh.core.cli import training_parser
from shodh.train.runtime import quiet_logs

EXAMPLES = """examples:
  deepspeed --num_gpus 2 launch/train_tokenizer.py --config launch/configs/demo.yaml
  deepspeed --num_gpus 2 launch/train_tokenizer.py --config launch/configs/demo.yaml --resume auto
  shodh tokenizer --config demo --set tokenizer.train.steps=50
  python launch/train_tokenizer.py --config launch/configs/h100_multinode.yaml --dry-run
"""


def main(argv: list[str] | None = None) -> int:
    args = training_parser(__doc__, EXAMPLES).parse_args(argv)
    quiet_logs(args.verbose)
    config = load_config(args.config, args.set)
    if args.dry_run:
        from shodh.train.plan_text import dry_run

        sys.stdout.write(dry_run(config, args.nodes, args.gpus_per_node, of_tokenizer=True))
        return 0
    from shodh.train.jobs import train_tokenizer

    return 0 if train_tokenizer(config, args.resume, args.profile) else 3
