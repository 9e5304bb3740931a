"""Solve trajectories of the built-in regimes and write them as The Well HDF5 files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from shodh.core.devices import pick_device
from shodh.core.errors import ConfigError
from shodh.generation import (
    Interval,
    Request,
    expand_regimes,
    generate,
)
from shodh.physics import REGIMES, parse_parameter

EPILOG = """\
examples:
  shodh generate --regime open_channel porous_media --grid 32 --trajectories 24 --frames 12 \\
      --out data/demo
  shodh generate --regime all3d --grid 32 --trajectories 8 --frames 12 --out data/many
  shodh generate --regime vorticity_2d --grid 64 64 --trajectories 100 --frames 20 --out data/fno \\
      --vary vorticity_2d.viscosity=1e-5:1e-3
  shodh generate --regime open_channel --grid 128 64 128 --trajectories 64 --frames 32 \\
      --out data/channel --device cuda --set open_channel.re_tau=360 open_channel.spin_up=5
  shodh generate --regime porous_media --grid 64 --trajectories 32 --frames 16 --out data/rock \\
      --image berea.raw --image-shape 400 400 400 --image-dtype uint8 --pore-value 0

Run the same command again to go on after an interruption: finished files are kept.
Files: OUT/REGIME/data/{train,valid,test}/REGIME_<first trajectory>.hdf5 and OUT/REGIME/stats.yaml.

parameters for --set and --vary, and their defaults:
"""


class OneLineParser(argparse.ArgumentParser):
    """Reports wrong usage like all other bad input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    lines = [f"  {name}.{key}={value}" for name, kind in REGIMES.items() for key, value in vars(kind()).items()]
    epilog, layout = EPILOG + "\n".join(lines), argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, epilog=epilog, formatter_class=layout)
    names = f"of {', '.join(REGIMES)}; all2d and all3d stand for all of a dimension"
    parser.add_argument("--regime", nargs="+", required=True, metavar="NAME", help=names)
    parser.add_argument(
        "--grid", type=int, nargs="+", required=True, metavar="N", help="cells: one number for all axes, or one an axis"
    )
    parser.add_argument("--trajectories", type=int, required=True, help="of each regime, all splits together")
    parser.add_argument("--frames", type=int, required=True, help="snapshots of a trajectory")
    parser.add_argument("--out", type=Path, required=True, help="folder for the regimes' folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--split", type=float, nargs=3, metavar=("TRAIN", "VALID", "TEST"),
        help="shares, or numbers of trajectories (default: an eighth for validation; for the test an eighth, at least "
        "8, but no more than a third of a small set)",
    )  # fmt: skip
    parser.add_argument(
        "--trajectories-per-file", type=int, default=4, metavar="N", help="solved together as one batch (default: 4)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="files solved side by side on a CPU (default: all cores)"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="REGIME.KEY=VALUE")
    parser.add_argument(
        "--vary", nargs="+", action="extend", default=[], metavar="REGIME.KEY=LOW:HIGH",
        help="draw a parameter for each trajectory, log-uniformly where the interval spans more than a decade; "
        "the values are stored with the trajectories",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace files that were made with other settings")
    image = parser.add_argument_group("a voxel image as the geometry of porous_media")
    image.add_argument("--image", help=".npy, .raw or .tif file")
    image.add_argument("--image-shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help="required for .raw")
    image.add_argument("--image-dtype", help="required for .raw, for example uint8, <u2 or >u2")
    image.add_argument("--pore-value", type=float, help="value of the pore voxels")
    return parser.parse_args(argv)


def split_setting(option: str, setting: str, regimes: Sequence[str]) -> tuple[str, str, str]:
    """``REGIME.KEY=TEXT`` as its three parts."""
    key, equals, text = setting.partition("=")
    name, dot, key = key.partition(".")
    if not (equals and dot):
        form = "VALUE" if option == "--set" else "LOW:HIGH"
        raise ConfigError(f"{option} {setting!r}: expected REGIME.KEY={form}")
    if name not in regimes:
        raise ConfigError(f"{option} {setting!r}: regime {name!r} is not among {', '.join(regimes)}")
    return name, key, text


def fixed_parameters(args: argparse.Namespace, regimes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parameters by regime from ``--set`` and the options for images."""
    parameters: dict[str, dict[str, Any]] = {name: {} for name in regimes}
    for setting in args.set:
        name, key, text = split_setting("--set", setting, regimes)
        parameters[name][key] = parse_parameter(name, key, text)
    options = {
        "image": args.image,
        "image_shape": tuple(args.image_shape) if args.image_shape else None,
        "image_dtype": args.image_dtype,
        "pore_value": args.pore_value,
    }
    given = {key: value for key, value in options.items() if value is not None}
    if given:
        if "porous_media" not in parameters:
            raise ConfigError("--image and its options need --regime porous_media")
        parameters["porous_media"] |= given
    return parameters


def varied_parameters(settings: Sequence[str], regimes: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Intervals by regime from ``--vary``."""
    varied: dict[str, dict[str, Interval]] = {name: {} for name in regimes}
    for setting in settings:
        name, key, text = split_setting("--vary", setting, regimes)
        low, colon, high = text.partition(":")
        if not colon:
            raise ConfigError(f"--vary {setting!r}: expected REGIME.KEY=LOW:HIGH")
        varied[name][key] = Interval(*(parse_parameter(name, key, end) for end in (low, high)))
    return varied


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = pick_device(args.device)
    regimes = expand_regimes(args.regime)
    request = Request(
        regimes=regimes,
        grid=args.grid,
        trajectories=args.trajectories,
        frames=args.frames,
        out=args.out,
        seed=args.seed,
        split=args.split,
        per_file=args.trajectories_per_file,
        parameters=fixed_parameters(args, regimes),
        vary=varied_parameters(args.vary, regimes),
    )
    made = generate(request, device, args.workers, overwrite=args.overwrite)
    for job, count in made:
        train, valid, test = job.settings["split"]
        sys.stdout.write(
            f"{job.folder}: {train} train, {valid} valid, {test} test trajectories of {args.frames} frames; "
            f"{count} of {len(job.parts)} files made now\n"
        )
    return 0
