"""Train the tokenizer: the autoencoder between fields and latents."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shodh.config import load_config
from shodh.train.runtime import quiet_logs, run_ranks

EXAMPLES = """examples:
  deepspeed --num_gpus 2 launch/train_tokenizer.py --config launch/configs/demo.yaml
  deepspeed --num_gpus 2 launch/train_tokenizer.py --config launch/configs/demo.yaml --resume auto
  python launch/train_tokenizer.py --config launch/configs/demo.yaml --set tokenizer.train.steps=50
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest checkpoint, or from this one")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's log too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    quiet_logs(args.verbose)
    config = load_config(args.config, args.set)
    from shodh.train.jobs import train_tokenizer

    return 0 if train_tokenizer(config, args.resume) else 3


if __name__ == "__main__":
    run_ranks(main)
