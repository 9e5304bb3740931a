"""Data: The Well files, statistics and normalisation, windows, the mixture of regimes, the latent cache."""

from shodh.data.files import remove_partial_files
from shodh.data.stats import compute_statistics, read_stats, write_stats
from shodh.data.well import write_trajectories
from shodh.data.well_reader import WellFile

__all__ = ["WellFile", "compute_statistics", "read_stats", "remove_partial_files", "write_stats", "write_trajectories"]
