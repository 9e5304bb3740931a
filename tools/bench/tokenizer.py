"""Samples a second of the tokenizer: a training step (forward, loss, backward, clipping, AdamW) and encoding alone.

The fields are noise in two domains, a periodic one and a channel with walls and solids, so that every part of the real
step is run: masks, walls, projection, decode, losses. Training is compiled where a run of the configuration would be
(``compile``), encoding is not, as in a run. Variants take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from processes import ROOT
from timing import in_turns, seconds
from torch import Tensor, nn

from shodh.config import RunConfig, load_config
from shodh.core.cli import command_parser, run_main
from shodh.core.environment import write_record
from shodh.models.factory import build_tokenizer
from shodh.models.init import initialise
from shodh.models.kernels import adamw
from shodh.models.tokenizer import Tokenizer
from shodh.moe.groups import decay_groups
from shodh.schema.domain import Domain
from shodh.train.compiling import compile_run, compiles
from shodh.train.losses import reconstruction_loss, reconstruction_terms, weighted_kinds
from shodh.train.runtime import start_distributed
from shodh.train.tokenizer_task import Geometry

DEMO = ROOT / "launch" / "configs" / "demo.yaml"
EXAMPLES = """examples:
  python tools/bench/tokenizer.py --out bench/tokenizer.json
  python tools/bench/tokenizer.py --config launch/configs/h100_single.yaml --batch 4 --rounds 20
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--config", type=Path, default=DEMO, help="configuration of a run with a tokenizer")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings")
    parser.add_argument("--batch", type=int, help="samples of a step (default: those of one of the planned ranks)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--out", type=Path, help="write the numbers, machine, versions and command as JSON")
    return parser.parse_args(argv)


class Bench:
    """A tokenizer, and one batch of noise."""

    def __init__(self, config: RunConfig, batch: int, device: torch.device) -> None:
        self.config, self.batch, self.device = config, batch, device
        self.dtype = torch.bfloat16 if config.tokenizer.train.precision == "bf16" else torch.float32
        draw = torch.Generator().manual_seed(config.seed)
        presence = tuple((name, True) for name in config.data.optional)
        self.domains = [
            Domain(("periodic",) * 3, (1.0, 1.0, 1.0), presence),
            Domain(("periodic", "periodic", "wall"), (2.0, 1.0, 1.0), presence),
        ]
        self.index = torch.arange(batch) % 2  # On the host.
        self.geometry = Geometry(self.domains)
        tokenizer = build_tokenizer(config)
        num_static = sum(f.build().num_components(3) for f in config.data.fields if f.static)
        self.fields = torch.randn(batch, tokenizer.num_channels, *config.data.grid, generator=draw).to(device)
        static = torch.rand(batch, num_static, *config.data.grid, generator=draw) < 0.2
        self.static = static.float().to(device)

    def model(self) -> Tokenizer:
        tokenizer = build_tokenizer(self.config)
        initialise(tokenizer, self.config.seed)
        tokenizer.to(self.device)
        tokenizer.encoder.to(self.dtype)
        tokenizer.decoder.to(self.dtype)
        return tokenizer

    def training(self, model: Tokenizer) -> Callable[[], None]:
        train = self.config.tokenizer.train
        optimizer = adamw(decay_groups(model, train.weight_decay), train.lr, train.betas, "torch")

        def step() -> None:
            geometry = self.geometry(self.static, self.index)
            prediction, _ = model(self.fields, geometry, self.domains, self.index)
            loss = self.config.tokenizer.loss
            terms = reconstruction_terms(prediction, self.fields, model.fields, weighted_kinds(loss))
            reconstruction_loss(terms, loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), train.clip)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def encoding(self, model: Tokenizer) -> Callable[[], Tensor]:
        @torch.no_grad()
        def encode() -> Tensor:
            return model.encode(self.fields, self.geometry(self.static, self.index))

        return encode


def main() -> int:
    args = parse()
    config = load_config(args.config, args.set)
    train, parallel = config.tokenizer.train, config.parallel
    ranks = parallel.nodes * parallel.gpus_per_node
    bench = Bench(config, args.batch or train.micro_batch or max(1, train.global_batch // ranks), start_distributed())
    model, trained = bench.model(), bench.model()
    parts = compile_run(trained, None) if compiles(config.compile, zero_stage=1) else 0
    calls = {"training": bench.training(trained), "encoding": bench.encoding(model)}
    times = in_turns({name: partial(seconds, call, bench.device) for name, call in calls.items()}, args.rounds)
    result = {name: {"samples_per_s": bench.batch / statistics.median(values)} for name, values in times.items()}
    settings = {
        "grid": list(config.data.grid),
        "batch": bench.batch,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "device": str(bench.device),
        "compiled_parts": parts,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    sys.stdout.write(", ".join(f"{k} {v}" for k, v in settings.items()) + "\n")
    sys.stdout.writelines(f"{name:10s} {row['samples_per_s']:10.3g} samples/s\n" for name, row in result.items())
    write_record(args.out, {"settings": settings, "result": result})
    return 0


if __name__ == "__main__":
    run_main(main)
