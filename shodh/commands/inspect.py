"""Say what a data file or folder is: fields, shapes, ranges, time step, boundary, divergence, problems and their cure.

Knows The Well, PDEBench, DPOT / MoE-POT, FNO's MATLAB files, JHTDB cutouts, arrays of one's own and Digital Rocks
images. It reads all times, and values of up to 8 frames of up to 8 trajectories, of a folder's other files those of the
first and last frame of the first and last trajectory; `--all` reads everything. The exit code is 0 also when there are
problems.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shodh.commands._hints import add_hints, hints_of
from shodh.core.cli import command_parser
from shodh.core.strict_json import dumps

EPILOG = """examples:
  shodh inspect data/demo/open_channel
  shodh inspect 2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5 --json
  shodh inspect mine.hdf5 --axes ntxyz --boundary periodic periodic wall --lengths 1 1 2
  shodh inspect berea.raw --image-shape 200 200 200 --image-dtype uint8 --pore-value 0
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, EPILOG)
    parser.add_argument("path", type=Path, help="file or folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="read every frame of every file")
    add_hints(parser, image=True)
    return parser.parse_args(argv)


def numbers(values: Sequence[float]) -> str:
    return " ".join(f"{v:.4g}" for v in values)


def field_line(f: dict[str, Any]) -> str:
    kind = ("static " if f["static"] else "") + f["kind"] + (" on faces" if f["placement"] == "face" else "")
    stored = f["dtype"] + (f", chunks {tuple(f['chunks'])}" if f["chunks"] else "")
    stored += f", {f['compression']}" if f["compression"] else ""
    line = f"  {f['name']:<16} {kind:<16} {stored}\n"
    if f["minimum"]:
        line += f"  {'':<16} from {numbers(f['minimum'])} to {numbers(f['maximum'])}"
        line += f", mean {numbers(f['mean'])}, std {numbers(f['std'])}\n" if f["mean"] else "\n"
    if f["divergence"]:
        said = ", ".join(f"{v:.1e} ({n})" for n, v in f["divergence"].items())
        line += f"  {'':<16} divergence / gradient {said}; solenoidal: {f['solenoidal']}\n"
    return line


def solved_lines(solved: dict[str, Any]) -> list[str]:
    """What the generator measured over all frames and trajectories."""
    lines = ["as solved, every frame\n"]
    lines += [f"  {n:<16} from {numbers(low)} to {numbers(high)}\n" for n, (low, high) in solved["ranges"].items()]
    for name, e in solved["energy"].items():
        lines.append(f"  {name} energy: first {numbers(e['first'])}; last {numbers(e['last'])}\n")
    lines += [f"  {n:<16} divergence / gradient at most {v:.1e}\n" for n, v in solved["divergence"].items()]
    return [*lines, *(f"  {n:<16} {numbers(sorted(set(v)))}\n" for n, v in solved["solver"].items())]


def file_text(r: dict[str, Any]) -> str:
    step = f"step {r['time_step']:.4g}" if r["time_step"] else "no single step"
    lines = [
        f"{r['path']}: {r['format']}, {r['bytes'] / 2**20:.1f} MiB\n",
        f"  {r['trajectories']} trajectories of {r['frames']} frames, time {r['time_first']:.4g} .. "
        f"{r['time_last']:.4g}, {step}\n",
        f"  grid {' x '.join(map(str, r['grid']))}, lengths {numbers(r['lengths'])}, {' '.join(r['boundary'])}\n",
        f"fields (values of {r['frames_read']} of {r['trajectories'] * r['frames']} frames were read)\n",
        *map(field_line, r["fields"]),
    ]
    if r["solved"]:
        lines += solved_lines(r["solved"])
    if r["parameters"]:
        lines.append(f"parameters: {', '.join(r['parameters'])}\n")
    for title, entries in (("assumed", r["assumed"]), ("problems", r["problems"])):
        lines += [f"{title}\n", *(f"  - {entry}\n" for entry in entries)] if entries else []
    return "".join(lines)


def folder_text(r: dict[str, Any]) -> str:
    counts = ", ".join(f"{s}: {n} files, {r['trajectories'].get(s, 0)} trajectories" for s, n in r["files"].items())
    text = f"{r['path']}: {counts}\n  values of {r['frames_read']} of {r['frames']} frames were read\n"
    text += "".join(f"  - {problem}\n" for problem in r["problems"])
    return text + ("\n" + file_text(r["first"]) if r["first"] else "")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tqdm import tqdm

    from shodh.data.formats.inspection import inspect_file, inspect_folder

    examine, text = (inspect_folder, folder_text) if args.path.is_dir() else (inspect_file, file_text)
    with tqdm(
        total=1.0, desc="inspect", disable=None, leave=False, bar_format="{desc}: {percentage:3.0f}%|{bar}|"
    ) as bar:
        report = examine(
            args.path,
            args.format,
            hints_of(args),
            every_frame=args.all,
            progress=lambda f: bar.update(f - bar.n) and None,
        ).to_dict()
    sys.stdout.write(dumps(report, indent=2) + "\n" if args.json else text(report))
    return 0
