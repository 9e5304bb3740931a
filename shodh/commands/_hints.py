"""Options for what a data file does not say, the same of every command that reads foreign files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shodh.data.formats import FileHints


def add_hints(parser: argparse.ArgumentParser, image: bool = False) -> None:
    """Format, boundary, lengths, time step, channels and axes; with ``image`` also what a voxel image needs."""
    group = parser.add_argument_group("what a format does not say")
    add = group.add_argument
    add(
        "--format",
        default="auto",
        help=f"auto, well, pdebench, dpot, fno, jhtdb{', arrays or rock' if image else ' or arrays'} (default: auto)",
    )
    add("--boundary", nargs="+", choices=("periodic", "wall", "open"), help="by axis")
    add("--lengths", nargs="+", type=float, help="by axis")
    add("--time-step", type=float, help="from frame to frame")
    add("--channels", nargs="+", help="names of an array's channels; a repeated name is a vector")
    add("--axes", help="letters of the arrays' axes: n, t, x, y, z, c; for example nxytc")
    if image:
        add("--image-shape", type=int, nargs=3, metavar=("X", "Y", "Z"), help="of a .raw image")
        add("--image-dtype", help="of a .raw image, for example uint8 or >u2")
        add("--pore-value", type=float, help="value of the pores of an image")


def hints_of(args: argparse.Namespace) -> FileHints:
    """What was said with the options of `add_hints`; raises `ConfigError` as `FileHints` does."""
    from shodh.data.formats import FileHints

    said: dict[str, Any] = {}
    for name in FileHints.__dataclass_fields__:
        value = vars(args).get(name)
        said[name] = tuple(value) if isinstance(value, list) else value
    return FileHints(**said)
