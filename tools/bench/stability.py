"""Steps of every explicit regime at the spacing of fine grids: length, share of the limit of stability, ranges.

Each regime runs in a small box with the spacing of 128 cells an axis (fine_grids.py), and what it makes
is checked against its bounds as tools/generate_data.py checks it. "dt max" is the longest step, "dt/limit" the largest
share of its limit that a step took, "limit" their quotient.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from fine_grids import EXPLICIT, fine

from shodh.core.cli import command_parser, run_main
from shodh.generation.checking import check
from shodh.report.page import Table, text_table


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--regime", nargs="+", default=EXPLICIT, choices=EXPLICIT, metavar="NAME", help="default: all")
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for name in args.regime:
        regime, grid = fine(name)
        report = check(regime, regime.simulate([args.seed], grid, args.frames), [0])[0]
        solver = report["solver"]
        share, longest = solver["limit_share"], solver["step_max"]
        ranges = ", ".join(
            f"{field.name} {min(report['ranges'][field.name][0]):.3g} .. {max(report['ranges'][field.name][1]):.3g}"
            for field in regime.schema.dynamic
        )
        cells = "x".join(map(str, grid))
        rows.append([name, cells, int(solver["steps"]), longest, longest / share, share, ranges])
    header = ["regime", "cells", "steps", "dt max", "limit", "dt/limit", "ranges"]
    sys.stdout.write(text_table(Table(header, rows)) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
