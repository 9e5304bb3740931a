"""Shodh: sparse multi-physics foundation models with exactly conserved mass."""

__version__ = "0.1.0"
