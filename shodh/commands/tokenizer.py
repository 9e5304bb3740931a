"""Train the tokenizer: the autoencoder between fields and latents."""

from __future__ import annotations

from shodh.config import load_config
from shodh.core.cli import training_parser
from shodh.train.runtime import quiet_logs

EXAMPLES = """examples:
  deepspeed --num_gpus 2 launch/train_tokenizer.py --config launch/configs/demo.yaml
  deepspeed --num_gpus 2 launch/train_tokenizer.py --config launch/configs/demo.yaml --resume auto
  shodh tokenizer --config demo --set tokenizer.train.steps=50
"""


def main(argv: list[str] | None = None) -> int:
    args = training_parser(__doc__, EXAMPLES).parse_args(argv)
    quiet_logs(args.verbose)
    config = load_config(args.config, args.set)
    from shodh.train.jobs import train_tokenizer

    return 0 if train_tokenizer(config, args.resume, args.profile) else 3
