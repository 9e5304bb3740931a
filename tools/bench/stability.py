"""Steps of every explicit regime at the spacing of fine grids: length, share of the limit of stability, ranges.

Each regime runs in a small box with the spacing of 128 cells an axis (fine_grids.py), and what it makes
is checked against its bounds as tools/generate_data.py checks it. "dt max" is the longest step, "dt/limit" the largest
share of its limit that a step took, "limit" their quotient.
"""

from __future__ import annotations

import sys

import torch
from fine_grids import EXPLICIT, fine

from shodh.core.cli import command_parser, run_main
from shodh.generation.checking import check


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--regime", nargs="+", default=EXPLICIT, choices=EXPLICIT, metavar="NAME", help="default: all")
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(f"{'regime':<23}{'cells':<13}{'steps':>6}{'dt max':>10}{'limit':>10}{'dt/limit':>9}  ranges\n")
    for name in args.regime:
        regime, grid = fine(name)
        report = check(regime, regime.simulate([args.seed], grid, args.frames), [0])[0]
        solver = report["solver"]
        share, longest = solver["limit_share"], solver["step_max"]
        ranges = ", ".join(
            f"{field.name} {min(report['ranges'][field.name][0]):.3g} .. {max(report['ranges'][field.name][1]):.3g}"
            for field in regime.schema.dynamic
        )
        sys.stdout.write(
            f"{name:<23}{'x'.join(map(str, grid)):<13}{solver['steps']:>6.0f}{longest:>10.2e}{longest / share:>10.2e}"
            f"{share:>9.2f}  {ranges}\n"
        )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    run_main(main)
