"""Merge expert checkpoints of one family into one model, anywhere along the direction between them.

The experts were fine-tuned from ANCHOR at the low and the high value of a physical parameter. OUT is a converted folder
like any other: shodh.from_pretrained loads it, and its config.json says how it was made. The coordinate is -1 at the
low expert and +1 at the high one, where the merged weights are those of the expert bit by bit. Memory stays small
whatever the model's size.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shodh.core.cli import command_parser
from shodh.core.errors import ConfigError
from shodh.core.strict_json import write_json

EXAMPLES = """examples:
  shodh merge --anchor conv/anchor --low conv/low --high conv/high --alpha 0.3 --out conv/merged
  shodh merge --anchor A --low L --high H --value 3e-5 --map log --out OUT     from the parameter
  shodh merge --anchor A --low L --high H --value 3e-5 --range 1e-5 1e-3 --map log --out OUT
  shodh merge --anchor A --low L --between M=1e-4 --high H --value 3e-5 --curve polynomial --out OUT
  shodh merge --anchor A --low L --high H --coordinates by-layer.yaml --out OUT
  shodh merge --anchor A --corners LL LH HL HH --alpha 0.5 -0.2 --out OUT      two parameters
  shodh merge --anchor A --low L --high H --method ties --density 0.2 --out OUT
  shodh merge --anchor A --low L --high H --report report.json                 diagnostics alone

A file of coordinates; later rules go before earlier ones, and experts are routed experts by index:
  default: 0.3
  rules:
    - {match: operator.blocks.0.*, alpha: 0.0}
    - {match: "*.experts.*", experts: [1, 3], alpha: 0.8}
"""
METHODS = ("compose", "wrong_sign", "random_direction", "average", "task_arithmetic", "ties", "dare")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--anchor", required=True, type=Path, help="converted folder of the anchor")
    parser.add_argument("--low", type=Path, help="expert of the low parameter")
    parser.add_argument("--high", type=Path, help="expert of the high parameter")
    parser.add_argument("--between", nargs="+", default=[], metavar="DIR[=VALUE]", help="experts between, for a curve")
    parser.add_argument("--corners", nargs=4, type=Path, metavar=("LL", "LH", "HL", "HH"), help="instead: a plane")
    parser.add_argument("--out", type=Path, help="folder to write")
    where = parser.add_argument_group("where")
    where.add_argument("--alpha", nargs="+", type=float, help="the coordinate; two numbers on a plane")
    where.add_argument("--value", type=float, help="value of the physical parameter, instead of --alpha")
    where.add_argument("--parameter", help="its name, where the family has several")
    where.add_argument("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="default: of the configurations")
    where.add_argument("--map", choices=("linear", "log"), default="linear", help="scale of the parameter")
    where.add_argument("--gamma", type=float, default=1.0, help="calibrated factor of the coordinate of --value")
    where.add_argument("--limit", type=float, default=1.5, help="--value gives at most this (default: %(default)s)")
    where.add_argument("--coordinates", type=Path, metavar="YAML", help="coordinates by layer and expert")
    where.add_argument("--curve", choices=("piecewise", "polynomial"), default="piecewise", help="with --between")
    how = parser.add_argument_group("how")
    how.add_argument("--method", choices=METHODS, default="compose", help="default: %(default)s")
    how.add_argument("--density", type=float, help="share of an update that is kept (ties 0.2, dare 0.1)")
    how.add_argument("--scaling", type=float, help="factor of the update (ties 1, dare and task_arithmetic 0.4)")
    how.add_argument("--seed", type=int, default=0, help="of dare and random_direction")
    how.add_argument("--any-anchor", action="store_true", help="experts need not say that they started from ANCHOR")
    parser.add_argument("--report", type=Path, metavar="JSON", help="where the updates live: table, and this file")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a converted folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was done as JSON")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Options that contradict each other, before anything is read."""
    if args.out is None and args.report is None:
        raise ConfigError("nothing to do: give --out for a merged folder, --report for diagnostics, or both")
    if args.corners is None and (args.low is None or args.high is None):
        raise ConfigError("give --low and --high, or the four --corners of a family of two parameters")
    if args.corners is not None and (args.low or args.high or args.between or args.value is not None or args.report):
        raise ConfigError("--corners goes with --alpha A B, and not with --low, --high, --between, --value or --report")
    if args.alpha is not None and args.value is not None:
        raise ConfigError("--alpha and --value both say where; give one of them")
    if args.alpha is not None and len(args.alpha) != (1 if args.corners is None else 2):
        raise ConfigError(f"--alpha: {len(args.alpha)} numbers; expected one, or two with --corners")


def source_and_value(text: str) -> tuple[Path, float | None]:
    """``DIR`` or ``DIR=VALUE``; raises `ConfigError`."""
    name, equals, value = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), None
    try:
        return Path(name), float(value)
    except ValueError as error:
        raise ConfigError(f"--between {text}: expected DIR or DIR=VALUE") from error


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    from shodh.checkpoint.convert import parse_size
    from shodh.merge.folders import diagnose_experts, merge_experts, open_family
    from shodh.merge.recipe import make_recipe

    between = [source_and_value(text) for text in args.between]
    paths = args.corners or [args.low, *(path for path, _ in between), args.high]
    anchor, experts = open_family(args.anchor, paths, any_anchor=args.any_anchor)
    done: dict[str, Any] = {}
    if args.out is not None:
        recipe = make_recipe(
            experts,
            args.method,
            alpha=args.alpha,
            value=args.value,
            values=[value for _, value in between],
            parameter=args.parameter,
            given=args.range,
            scale=args.map,
            gamma=args.gamma,
            limit=args.limit,
            coordinates=args.coordinates,
            curve=args.curve,
            density=args.density,
            scaling=args.scaling,
            seed=args.seed,
        )
        size = parse_size(args.max_shard_size)
        merged = merge_experts(anchor, experts, recipe, args.out, max_shard_size=size, overwrite=args.overwrite)
        done = merged.to_dict()
        where = f" at {recipe.describe()}" if recipe.coordinates else ""
        sys.stdout.write(
            f"{merged.out}: {merged.tensors} tensors, {merged.bytes / 1e6:,.1f} MB, {args.method}{where}\n"
        )
        sys.stdout.write(f"load it: shodh.from_pretrained({merged.out!r})\n")
    if args.report is not None:
        report = diagnose_experts(anchor, experts[0], experts[-1])
        write_json(args.report, report)
        show(report)
    if args.json is not None:
        write_json(args.json, done)
    return 0


def show(report: dict[str, Any]) -> None:
    from shodh.merge.diagnostics import table
    from shodh.report.page import Table, text_table

    for kind in ("components", "layers", "experts"):
        header, rows = table(report, kind)
        if rows:
            sys.stdout.write(f"\n{text_table(Table(header, rows))}\n")
