"""Write PDEBench, DPOT, FNO, JHTDB or other The Well files as shards of The Well, uncompressed, a chunk a snapshot.

Reading becomes several times faster than from compressed or interleaved files, and every tool that knows The Well reads
the result. Values are copied bit by bit (float64 is rounded to float32). An interrupted conversion goes on where it
stopped when the same command is run again. `tools/inspect_data.py` tells beforehand what is in the files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shodh.commands._hints import add_hints, hints_of
from shodh.core.cli import command_parser

EPILOG = """examples:
  shodh convert-data 3D_CFD_Rand_M1.0_periodic_Train.hdf5 data/cfd
  shodh convert-data ns2d_fno_1e-5/ data/vorticity --boundary periodic periodic --time-step 1.0
  shodh convert-data mine.hdf5 data/mine --axes nxytc --channels velocity velocity height --split 0.9 0.1 0
  shodh convert-data fields.hdf5 data/mine --axes ntxyz --lengths 1 1 2 --boundary periodic periodic wall
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, EPILOG)
    parser.add_argument("source", nargs="+", type=Path, help="files or folders of one regime")
    parser.add_argument("out", type=Path, help="folder of the regime")
    parser.add_argument("--name", help="name of the data set (default: of the first source)")
    parser.add_argument("--fields", nargs="+", metavar="NAME", help="fields to keep (default: all)")
    parser.add_argument(
        "--split", type=float, nargs=3, default=(0.8, 0.1, 0.1), metavar=("TRAIN", "VALID", "TEST"),
        help="shares, for files that are not split (default: 0.8 0.1 0.1)",
    )  # fmt: skip
    parser.add_argument("--shard-mib", type=int, default=1024, metavar="N", help="largest shard (default: 1024)")
    add_hints(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tqdm import tqdm

    from shodh.core.errors import ConfigError
    from shodh.data.formats.convert import assumptions, convert, plan_conversion

    if args.shard_mib < 1 or min(args.split) < 0 or sum(args.split) <= 0:
        raise ConfigError("--shard-mib and --split must be positive; see --help")
    shards = plan_conversion(
        args.source, args.out, name=args.name, format=args.format, hints=hints_of(args), shares=args.split,
        fields=args.fields, shard_bytes=args.shard_mib << 20,
    )  # fmt: skip
    if assumed := assumptions(shards):
        sys.stdout.write("assumed, and stated as facts in what is written\n" + "".join(f"  - {a}\n" for a in assumed))
        sys.stdout.flush()
    total = sum(shard.num_bytes for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        written = convert(shards, args.out, lambda size: bar.update(size) and None)
    counts = {s: sum(len(p.trajectories) for p in shards if p.split == s) for s in ("train", "valid", "test")}
    said = ", ".join(f"{count} {split}" for split, count in counts.items())
    sys.stdout.write(
        f"{args.out}: {said} trajectories, {total / 2**20:.1f} MiB; {written} of {len(shards)} shards written now\n"
    )
    return 0
