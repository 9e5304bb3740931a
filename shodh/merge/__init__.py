"""Experts of one family composed in weight space, along the direction between them (CCM, arXiv 2605.14546)."""

from shodh.merge.baselines import average, dare, random_direction, task_arithmetic, ties
from shodh.merge.coordinates import Coordinates, coordinate, extrapolation, read_coordinates
from shodh.merge.diagnostics import diagnose
from shodh.merge.lazy import from_files, from_memory, to_memory
from shodh.merge.readout import (
    Range,
    Readout,
    calibrate,
    check_prefix,
    fit_scale,
    read_coord,
    read_gradient,
    read_line_search,
    read_prefix,
)
from shodh.merge.slider import Slider
from shodh.merge.span import Span, Update, combine, compose, curve, decompose, difference, plane

__all__ = [
    "Coordinates",
    "Range",
    "Readout",
    "Slider",
    "Span",
    "Update",
    "average",
    "calibrate",
    "check_prefix",
    "combine",
    "compose",
    "coordinate",
    "curve",
    "dare",
    "decompose",
    "diagnose",
    "difference",
    "extrapolation",
    "fit_scale",
    "from_files",
    "from_memory",
    "plane",
    "random_direction",
    "read_coord",
    "read_coordinates",
    "read_gradient",
    "read_line_search",
    "read_prefix",
    "task_arithmetic",
    "ties",
    "to_memory",
]
