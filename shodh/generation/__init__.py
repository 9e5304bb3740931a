"""Data sets of the built-in regimes: what files to make, and making them, several at once and resumable.

Joins the solvers (`shodh.physics`) and the files (`shodh.data`), which do not know each other.
"""

from shodh.generation.generate import generate
from shodh.generation.plan import Job, Part, Request, check_space, expand_regimes, pending_parts, plan
from shodh.generation.solve import pick_workers, solve_all, write_missing_statistics
from shodh.generation.variation import Interval

__all__ = [
    "Interval",
    "Job",
    "Part",
    "Request",
    "check_space",
    "expand_regimes",
    "generate",
    "pending_parts",
    "pick_workers",
    "plan",
    "solve_all",
    "write_missing_statistics",
]
