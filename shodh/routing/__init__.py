"""Routing analysis: from the traces of a run to statistics, a verdict and the sections of a page."""

from shodh.routing.analysis import analyse
from shodh.routing.reading import Trace, find_traces, read_traces

__all__ = ["Trace", "analyse", "find_traces", "read_traces"]
