"""Time one frame of each regime at several grids, and tell how much of a field it changes right after the start.

One trajectory on one thread, as tools/generate_data.py runs a file: t(n + 1 frames) - t(1 frame), over n. On a CPU the
time is that of the process (all its threads), which other work on the machine disturbs little; wall-clock times stand
beside it in the JSON. The start of a trajectory is timed without its spin-up, which costs as many frames as the table
says. A grid at which a frame would take longer than --limit is extrapolated from the growth between the two grids
before it, and marked so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from shodh.core.cli import command_parser, run_main
from shodh.core.errors import ConfigError
from shodh.core.strict_json import write_json
from shodh.physics import REGIMES, Regime, get_regime
from shodh.schema.fields import Trajectories
from shodh.train.run_folder import describe_environment

EXAMPLES = """examples:
  python tools/bench/regimes.py                                        every regime at 32, 64 and 128
  python tools/bench/regimes.py --regime burgers heat --grid 32 64 --out regimes.json
  python tools/bench/regimes.py --device cuda --grid 64 128 256
"""


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--regime", nargs="+", default=sorted(REGIMES), metavar="NAME", help="default: all")
    parser.add_argument(
        "--grid", type=int, nargs="+", default=[32, 64, 128], metavar="N", help="cells along every axis"
    )
    parser.add_argument("--frames", type=int, default=3, metavar="N", help="timed after the first (default: 3)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a frame may take (default: 120)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result as JSON; regimes already in the file are kept")
    args = parser.parse_args()
    if min(args.frames, args.threads, *args.grid) < 1:
        raise ConfigError("--frames, --threads and --grid must be positive")
    for name in args.regime:
        get_regime(name)
    return args


def without_spin_up(name: str) -> tuple[Regime, float]:
    """The regime with no spin-up, and the frames that the spin-up takes by default."""
    regime: Any = get_regime(name)
    if "spin_up" not in {field.name for field in dataclasses.fields(regime)}:
        return regime, 0.0
    return get_regime(name, spin_up=0.0), regime.spin_up / regime.frame_interval


def run(regime: Regime, cells: int, frames: int, device: str) -> tuple[float, float, Trajectories]:
    """Seconds of one trajectory (of the process on a CPU, else of the clock), seconds of the clock, the trajectory."""
    clock, process = time.perf_counter(), time.process_time()
    result = regime.simulate([0], (cells,) * regime.schema.ndim, frames, device=device)
    clock, process = time.perf_counter() - clock, time.process_time() - process
    return process if device == "cpu" else clock, clock, result


def relative_changes(result: Trajectories) -> dict[str, float]:
    """``||u(t + dt) - u(t)|| / ||u(t + dt)||`` of each changing field, over all frames."""
    changes = {}
    for field in result.schema.dynamic:
        values = result.values[field.name].astype(np.float64)
        norm = np.linalg.norm(values[:, 1:])
        changes[field.name] = round(float(np.linalg.norm(np.diff(values, axis=1)) / max(norm, 1e-300)), 3)
    return changes


def time_regime(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one regime; the grids from small to large."""
    regime, spin_up_frames = without_spin_up(name)
    grids: dict[str, dict[str, Any]] = {}
    times: list[float] = []
    for cells in sorted(args.grid):
        expected = times[-1] * times[-1] / times[-2] if len(times) > 1 else 0.0
        if expected > args.limit:
            times.append(expected)
            grids[str(cells)] = {"frame_s": expected, "extrapolated": True}
            continue
        frames = args.frames if expected < 5.0 else 1
        start, start_clock, _ = run(regime, cells, 1, args.device)
        total, total_clock, result = run(regime, cells, 1 + frames, args.device)
        times.append(max(total - start, 1e-9) / frames)
        grids[str(cells)] = {
            "frame_s": times[-1],
            "frame_clock_s": (total_clock - start_clock) / frames,
            "start_s": start,
            "extrapolated": False,
            "change": relative_changes(result),
            "diagnostics": {key: float(value[0]) for key, value in result.diagnostics.items()},
        }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "env": describe_environment(),
        "settings": {"threads": args.threads, "device": args.device, "limit_s": args.limit},
        "ndim": regime.schema.ndim,
        "spin_up_frames": spin_up_frames,
        "grids": grids,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The numbers for people; ``~`` marks what was extrapolated."""
    grids = sorted({int(g) for entry in results.values() for g in entry["grids"]})
    head = ["regime".ljust(24), *(f"{g}: s/frame".rjust(16) for g in grids), "spin-up frames".rjust(16), "  change"]
    lines = ["".join(head)]
    for name, entry in sorted(results.items()):
        cells, change = [], {}
        for grid in grids:
            found = entry["grids"].get(str(grid), {})
            mark = "~" if found.get("extrapolated") else ""
            cells.append((f"{mark}{found['frame_s']:.3g}" if found else "-").rjust(16))
            change = found.get("change", change)
        cells.append(f"{entry['spin_up_frames']:.0f}".rjust(16))
        lines.append("".join([name.ljust(24), *cells, "  ", ", ".join(f"{k} {v:.2f}" for k, v in change.items())]))
    return "\n".join(lines) + "\n"


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out is not None and args.out.exists() else {}
    # The first solution on a device pays for what is loaded and planned once.
    run(get_regime("burgers"), 16, 2, args.device)
    for name in tqdm(args.regime, desc="regimes", disable=None):
        results[name] = time_regime(name, args)
        if args.out is not None:
            write_json(args.out, results)
    sys.stdout.write(table({name: results[name] for name in args.regime}))
    return 0


if __name__ == "__main__":
    run_main(main)
