"""Write any checkpoint as a folder of safetensors that shodh.from_pretrained loads: tokenizer and operator together.

SRC is a run folder (its newest checkpoint, or --tag), a checkpoint folder, a folder that DeepSpeed itself wrote (ZeRO
1, 2 or 3 at any expert-parallel degree, or universal), a safetensors file, or a converted folder (to change its dtype
or its shards). OUT gets model.safetensors (or shards and their index), config.json and a model card. DeepSpeed is not
needed, and nothing in a .pt file is run. fp32 takes the float32 master weights where a run trained in lower precision;
bf16 and fp16 are rounded from the same, which gives the bits that the run computed with. Buffers (statistics, bases,
selection biases) stay float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shodh.core.cli import add_weights, command_parser
from shodh.core.strict_json import write_json

EXAMPLES = """examples:
  shodh convert runs/demo converted/demo --verify
  shodh convert runs/demo/checkpoints/step_00000400 converted/demo-bf16 --dtype bf16
  shodh convert runs/demo converted/best --tag best
  shodh convert converted/demo converted/shards --max-shard-size 500MB
  deepspeed launch/pretrain.py --config C --set name=next tokenizer.run=runs/demo-tokenizer --init-from converted/demo
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("source", metavar="SRC", type=Path, help="what to convert")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="read OUT and compare every tensor with SRC, bit by bit")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, metavar="RUN", help="the tokenizer's run (default: as configured)")
    parser.add_argument("--config", type=Path, help="the run's config.yaml, if it is not at or above SRC")
    parser.add_argument("--tag", help="checkpoint of a run folder, or best (default: the newest)")
    add_weights(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if this command wrote it")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUT to the hub as owner/name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was done as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from shodh.checkpoint.convert import convert, parse_size, push_to_hub

    done = convert(
        args.source,
        args.out,
        args.dtype,
        max_shard_size=parse_size(args.max_shard_size),
        tokenizer=args.tokenizer,
        tag=args.tag,
        config_path=args.config,
        weights=args.weights,
        verify=args.verify,
        overwrite=args.overwrite,
    )
    if args.json is not None:
        write_json(args.json, done.to_dict())
    masters = ", averaged over the training" if done.ema else ""
    masters += ", from the float32 master weights" if done.masters else ""
    checked = ", verified bit by bit" if done.verified else ""
    sys.stdout.write(
        f"{done.out}: {done.tensors} tensors, {done.bytes / 1e6:,.1f} MB in {done.dtype}{masters}{checked}\n"
    )
    sys.stdout.write(f"parameters: {done.parameters['total']:,} total, {done.parameters['active']:,} active a token\n")
    sys.stdout.write(f"load it: shodh.from_pretrained({done.out!r})\n")
    if args.push_to_hub:
        sys.stdout.write(f"pushed: {push_to_hub(args.out, args.push_to_hub)}\n")
    return 0
