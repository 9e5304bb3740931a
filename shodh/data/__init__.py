"""Data: The Well files, statistics and normalisation, windows, the mixture of regimes, the latent cache."""

from shodh.data.well import write_trajectories

__all__ = ["write_trajectories"]
