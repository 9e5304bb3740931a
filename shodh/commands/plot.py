"""Draw a contact sheet of data: one slice of each regime."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shodh.core.cli import command_parser
from shodh.core.errors import ConfigError
from shodh.report.gallery import COLUMNS, draw_contact_sheet

EXAMPLES = """\
examples:
  shodh plot data/demo --out fields.png
  shodh plot data/many/burgers data/fno/vorticity_2d --frame 0 --out start.png
  shodh plot data/many --field tracer temperature --out scalars.png

DATA is a file of trajectories in any known format, a folder of one regime, or a folder of such folders (a slice each;
test files are preferred). Three-dimensional data are cut in the middle of the second axis; solids are grey.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--field", nargs="+", default=[], metavar="NAME", help="the first of these that a regime has")
    parser.add_argument("--trajectory", type=int, default=0, metavar="N")
    parser.add_argument("--frame", type=int, default=-1, metavar="N", help="negative: from the end (default: the last)")
    parser.add_argument("--columns", type=int, default=COLUMNS, metavar="N")
    args = parser.parse_args(argv)
    if args.columns < 1:
        raise ConfigError(f"--columns {args.columns}: must be at least 1")
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--out {args.out}: expected a name that ends in .png, .pdf or .svg")
    labels = draw_contact_sheet(
        args.data, args.out, fields=args.field, trajectory=args.trajectory, frame=args.frame, columns=args.columns
    )
    sys.stdout.write("\n".join([*labels, f"{args.out}: {len(labels)} slices"]) + "\n")
    return 0
