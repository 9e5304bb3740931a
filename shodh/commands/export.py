"""Write fields of a data file, or predictions and truth of a run, for ParaView (VTK) or xarray (NetCDF).

A source that is a file of any known format gives its fields; a run folder gives one held-out window of each regime, in
physical units: the model's prediction <field>, <field>_truth and <field>_error. Values are cell data; components of a
vector on faces (The Well attribute placement=face) are written as they are stored, on the upper face of their cell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from shodh.core.cli import add_weights, command_parser

EPILOG = """examples:
  shodh export data/demo/open_channel/data/test/open_channel_00000.hdf5 --out vtk
  shodh export 3D_CFD_periodic_Train.hdf5 --trajectory 3 --fields velocity --format netcdf --out nc
  shodh export runs/demo --out vtk
"""
Part = tuple[str, dict[str, np.ndarray], np.ndarray, tuple[float, ...]]  # stem, fields [T, C, *grid], times, spacing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, EPILOG)
    parser.add_argument("source", type=Path, help="data file or run folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--format", choices=("vtk", "netcdf"), default="vtk")
    parser.add_argument("--fields", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument("--trajectory", type=int, default=0, help="of a data file (default: 0)")
    parser.add_argument("--checkpoint", metavar="TAG", help="of a run, or best (default: the newest)")
    add_weights(parser, "of a run: ")
    parser.add_argument("--frames", type=int, nargs=2, metavar=("FIRST", "STOP"), help="of a data file (default: all)")
    return parser.parse_args(argv)


def from_file(args: argparse.Namespace) -> Iterator[Part]:
    from shodh.core.errors import ConfigError
    from shodh.data.formats import open_file
    from shodh.data.formats.probe import probe

    probe(args.source)
    file = open_file(args.source)
    frames = range(*(args.frames or (0, file.num_frames)))
    inside = frames and 0 <= frames.start and frames.stop <= file.num_frames
    if not (inside and 0 <= args.trajectory < file.num_trajectories):
        raise ConfigError(f"{args.source} has {file.num_trajectories} trajectories of {file.num_frames} frames")
    time = file.time if file.time.ndim == 1 else file.time[args.trajectory]
    for frame in frames:
        fields = {}
        for name in args.fields or file.fields:
            field = file.field(name)
            values = np.empty((1, field.num_components(len(file.grid)), *file.grid), dtype=np.float32)
            one = range(frame, frame + 1)
            file.read(name, args.trajectory, one, values[0] if field.static else values, finite=False)
            fields[name] = values
        yield f"{args.source.stem}_{args.trajectory:04d}", fields, time[frame : frame + 1], file.spacing


def from_run(args: argparse.Namespace) -> Iterator[Part]:
    import torch

    from shodh.core.devices import pick_device
    from shodh.core.errors import ConfigError
    from shodh.evaluate.evaluation import evaluate, open_run

    evaluator = open_run(args.source, args.checkpoint, torch.device(pick_device("auto")), args.weights)
    regimes = evaluator.regimes
    unknown = set(args.fields or ()) - {f.name for f in regimes.space.dynamic}
    if unknown:
        raise ConfigError(f"{args.source}: there are no fields {sorted(unknown)}")
    for example in evaluate(evaluator, evaluator.config.evaluation.split).examples:
        number = regimes.names.index(example.regime)
        pair = torch.stack((example.truth, example.prediction))
        # An example has the channels that exist; the normalisation knows those of the whole vocabulary.
        whole = pair.new_zeros(2, regimes.space.num_channels, *pair.shape[2:])
        whole[:, regimes.space.channel_numbers(number)] = pair
        physical = regimes.space.to_physical(whole, example.regime, example.static.expand(2, *example.static.shape))
        truth, prediction = physical.numpy()[:, None]
        fields = {}
        for name, channels in regimes.space.channels(number).items():
            if args.fields is None or name in args.fields:
                fields[name] = prediction[:, channels]
                fields[f"{name}_truth"] = truth[:, channels]
                fields[f"{name}_error"] = prediction[:, channels] - truth[:, channels]
        if example.solid is not None:
            fields["solid"] = example.solid.numpy()[None, None]
        spacing = regimes.sources[number].spacing
        yield f"{args.source.name}_{example.regime}", fields, np.zeros(1), spacing


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from tqdm import tqdm

    from shodh.data.formats.export import write_netcdf, write_pvd, write_vti

    parts = from_run(args) if args.source.is_dir() else from_file(args)
    args.out.mkdir(parents=True, exist_ok=True)
    series: dict[str, list[tuple[float, str]]] = {}
    for stem, fields, time, spacing in tqdm(parts, desc="export", unit="frame", disable=None):
        snapshots = series.setdefault(stem, [])
        name = f"{stem}_{len(snapshots):05d}.{'vti' if args.format == 'vtk' else 'nc'}"
        if args.format == "vtk":
            write_vti(args.out / name, {n: v[0] for n, v in fields.items()}, spacing)
        else:
            write_netcdf(args.out / name, fields, time, spacing)
        snapshots.append((float(time[0]), name))
    if args.format == "vtk":
        for stem, snapshots in series.items():
            write_pvd(args.out / f"{stem}.pvd", snapshots)
    sys.stdout.write(f"{args.out}: {sum(map(len, series.values()))} {args.format} files\n")
    return 0
