"""What a tokenizer of each size keeps: VRMSE of each component on test frames, of the linear part alone and of a run.

The linear part is fitted as before a training, with each component in units of its standard deviation and with all in
the same unit. No network is trained: it is the least that a tokenizer of this size does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from processes import ROOT
from torch import Tensor

from shodh.checkpoint.run_files import open_tokenizer
from shodh.config import RunConfig, load_config
from shodh.core.cli import command_parser, positive, run_main
from shodh.core.environment import write_record
from shodh.core.weights import load_into
from shodh.models.factory import build_tokenizer
from shodh.models.tokenizer import Tokenizer
from shodh.report.page import Table, text_table
from shodh.schema.domain import add_walls
from shodh.schema.fields import AXES
from shodh.schema.measures import measure
from shodh.train.datasets import Regimes, open_regimes
from shodh.train.tokenizer_task import open_frames
from shodh.train.tokenizer_weights import fit_basis

DEMO = ROOT / "launch" / "configs" / "demo.yaml"
EXAMPLES = """examples:
  python tools/bench/reconstruction.py --latents 96 192 256 --out bench/reconstruction.json
  python tools/bench/reconstruction.py --run runs/demo-tokenizer
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--config", type=Path, default=DEMO, help="configuration of a run with a tokenizer and its data"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings")
    parser.add_argument("--latents", nargs="+", type=positive, default=[96, 192], help="latent channels to compare")
    parser.add_argument("--run", type=Path, help="run folder of a trained tokenizer, measured beside")
    parser.add_argument("--every", type=positive, default=4, help="of so many test frames, one is measured")
    parser.add_argument("--out", type=Path, help="write the numbers, machine, versions and command as JSON")
    return parser.parse_args(argv)


def without_units(regimes: Regimes) -> Regimes:
    """The same with all components in one unit."""
    same = (replace(r, domain=replace(r.domain, units=())) for r in regimes.space.regimes)
    return replace(regimes, space=replace(regimes.space, regimes=tuple(same)))


def linear(config: RunConfig, regimes: Regimes, latents: int) -> Tokenizer:
    """A tokenizer of a fitted basis whose networks say nothing."""
    tokenizer = config.tokenizer.model_copy(update={"latent_channels": latents})
    model = build_tokenizer(config.model_copy(update={"tokenizer": tokenizer}))
    for parameter in model.parameters():
        parameter.detach().zero_()
    fit_basis(model, regimes)
    return model.eval()


@torch.no_grad()
def errors(model: Tokenizer, regimes: Regimes, every: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each regime with the mean VRMSE of each component that exists, over test frames."""
    for number, frames in enumerate(open_frames(regimes, "test")):
        slices, rows = regimes.space.channels(number), []
        index = torch.tensor([number])
        for item in (frames[n] for n in range(0, len(frames), every)):
            fields, geometry = item["fields"], add_walls(item["static"][None], regimes.space.domains[number])
            found, _ = model(fields, geometry, regimes.space.domains, index)
            exists = model.exists(geometry).expand_as(fields) > 0
            rows.append(_by_component(found, fields, exists, slices))
        mean = torch.stack([torch.tensor(list(row.values())) for row in rows]).mean(0).tolist()
        yield regimes.names[number], dict(zip(rows[0], mean, strict=True))


def _by_component(found: Tensor, truth: Tensor, exists: Tensor, slices: dict[str, slice]) -> dict[str, float]:
    named = {}
    for name, where in slices.items():
        for axis, channel in enumerate(range(where.start, where.stop)):
            one = slice(channel, channel + 1)
            component = f"{name}_{AXES[axis]}" if where.stop - where.start > 1 else name
            named[component] = float(measure("vrmse", found[:, one], truth[:, one], exists=exists[:, one]))
    return named


def main() -> int:
    args = parse()
    config = load_config(args.config, args.set)
    regimes = open_regimes(config)
    models: list[tuple[str, Tokenizer, Regimes]] = []
    for latents in args.latents:
        for unit, given in (("same", without_units(regimes)), ("own", regimes)):
            models.append((f"linear, {latents} channels, {unit} units", linear(config, given, latents), given))
    if args.run is not None:
        models.append(trained(args.run, config, regimes))
    rows: list[dict[str, Any]] = []
    for name, model, given in models:
        for regime, components in errors(model, given, args.every):
            rows.append({"tokenizer": name, "regime": regime, **components})
    header: Sequence[str] = list(dict.fromkeys(key for row in rows for key in row))
    sys.stdout.write(text_table(Table(list(header), [[row.get(key) for key in header] for row in rows])) + "\n")
    write_record(args.out, {"vrmse": rows})
    return 0


def trained(run: Path, config: RunConfig, regimes: Regimes) -> tuple[str, Tokenizer, Regimes]:
    """The tokenizer of a run, on its own space."""
    stored = open_tokenizer(run)
    model = build_tokenizer(stored.config)
    load_into(model, {name: tensor.read() for name, tensor in stored.weights.items()}, stored.file)
    given = open_regimes(config, stored.space.only(regimes.names))
    return f"{run.name}, {stored.config.tokenizer.latent_channels} channels", model.eval(), given


if __name__ == "__main__":
    run_main(main)
