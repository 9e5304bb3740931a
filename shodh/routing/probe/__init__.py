"""Probing a trained operator: what its experts do, where, and whether they matter."""

from shodh.routing.probe.sections import probe_model

__all__ = ["probe_model"]
