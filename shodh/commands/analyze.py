"""Analyse the routing of a run: load, specialisation, fingerprints, stability, structure, and a probe of its experts.

Writes ``summary.json``, CSV tables, PNG figures and one self-contained ``index.html``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from shodh.core.cli import add_weights, command_parser, field_maps, named_paths
from shodh.core.devices import pick_device
from shodh.core.errors import ConfigError
from shodh.evaluate.evaluation import open_run
from shodh.report.page import Section, text_table, write_page
from shodh.routing import analyse, find_traces, read_traces
from shodh.routing.probe.sections import SECTIONS, probe_model
from shodh.train.run_folder import RunFolder
from shodh.train.runtime import quiet_logs

EXAMPLES = """examples:
  shodh analyze runs/demo --out runs/demo/report/routing
  shodh analyze runs/demo --out out --checkpoint step_00000300 --other-run runs/demo-seed1
  shodh analyze runs/demo --out out --no-probe --split train
  shodh analyze runs/moe-pot-tiny --out out --sections fingerprint
      --probe-data vorticity_1e-4=data/pot/nu1e-4/vorticity_2d
  shodh analyze megatron_traces/ --out out

RUN is a run folder, a folder of .jsonl traces, or one trace; Megatron's router traces are recognised. The experts of a
run folder with a checkpoint are probed on held-out data too (about a minute for the demo); --no-probe leaves that out.
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, folder of traces, or trace")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--split", help="split to analyse (default: held-out samples where traced, else training)")
    parser.add_argument("--no-probe", action="store_true", help="read traces alone, no checkpoint")
    probe = parser.add_argument_group("probe of a checkpoint")
    probe.add_argument("--checkpoint", metavar="TAG", help="a checkpoint by its tag, or best (default: the newest)")
    add_weights(probe)
    probe.add_argument("--other-run", type=Path, metavar="RUN2", help="another run, whose experts are matched")
    probe.add_argument(
        "--probe-data", nargs="+", action="extend", default=[], metavar="NAME=PATH", help="regimes left out of training"
    )
    probe.add_argument(
        "--map", nargs="+", action="extend", default=[], metavar="NAME.OURS=THEIRS", help="fields of --probe-data"
    )
    probe.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to probe (default: everything)"
    )
    probe.add_argument("--windows", type=int, default=24, help="windows of a regime that are probed (default: 24)")
    probe.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.no_probe and (args.checkpoint or args.weights or args.other_run or args.probe_data):
        raise ConfigError(
            "--no-probe contradicts --checkpoint, --weights, --other-run and --probe-data; give one or the other"
        )
    if args.probe_data and "fingerprint" not in args.sections:
        raise ConfigError("--probe-data is read by the section fingerprint; add it to --sections")
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out}: is a file; name a folder")
    if args.windows < 1:
        raise ConfigError(f"--windows {args.windows}: must be at least 1")
    return args


def probe(args: argparse.Namespace) -> list[Section]:
    """Sections of the probe, if there is a checkpoint or one was asked for."""
    asked = args.checkpoint or args.weights or args.other_run or args.probe_data
    if args.no_probe or not (asked or RunFolder(args.run).latest()):
        return []
    device = torch.device(pick_device(args.device))
    unseen = named_paths("--probe-data", args.probe_data)
    return probe_model(
        open_run(args.run, args.checkpoint, device, args.weights),
        open_run(args.other_run, None, device, args.weights) if args.other_run else None,
        left_out=unseen,
        maps=field_maps(args.map, unseen),
        limit=args.windows,
        chosen=args.sections,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    quiet_logs()
    files = find_traces(args.run)
    size = sum(path.stat().st_size for path in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="traces", disable=not sys.stderr.isatty()) as bar:
        trace = read_traces(files, bar.update)
    headline, sections = analyse(trace, args.split)
    *sections, what_was_read = sections
    probed = probe(args)
    write_page(args.out, f"{args.run.resolve().name}: routing", headline, [*sections, *probed, what_was_read])
    sys.stdout.write(f"{headline.verdict}. {headline.text}\n")
    shown = [(section, {section.key}) for section in sections[:2]]
    shown += [(section, set(section.tables)) for section in probed if section.key == "probe_fingerprint"]
    for section, stems in shown:
        for stem, table in section.tables.items():
            if stem in stems:
                sys.stdout.write(f"\n{text_table(table)}\n")
    sys.stdout.write(f"\npage: {args.out / 'index.html'}\n")
    return 0
