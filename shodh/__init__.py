"""Shodh: sparse multi-physics foundation models with exactly conserved mass."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.3.0"


def from_pretrained(path_or_hub_id: Any, *, device: Any = "cpu", **download: Any) -> Any:
    """Load a run (its newest checkpoint), a checkpoint, a converted folder or a model of the hub (``owner/name``).

    Returns a `shodh.checkpoint.pretrained.ShodhModel`. torch is imported by the call, not by ``import shodh``.
    """
    return import_module("shodh.checkpoint.pretrained").from_pretrained(path_or_hub_id, device=device, **download)
