"""Errors, divergence and spectra of a run on held-out trajectories."""
