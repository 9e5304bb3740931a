"""Figures that others have published, to stand beside ours. Their data are not ours: read them as orders of size."""

from __future__ import annotations

from typing import Any

SHODH_MOE: dict[str, Any] = {
    "source": "Shodh-MoE, arXiv 2605.15179",
    "latent_mse": {"open_channel": 2.46e-5, "porous_media": 9.76e-6},
    "decoded_mse": {"open_channel": 2.48e-6, "porous_media": 1.76e-6},
    "divergence_fp64": 2.8e-10,
    "caveat": (
        "Published on 128^3 fields, after 20,000 steps on an H100 cluster, on data and in normalisations that were not "
        "published; no baseline was given. The figures are not comparable in value, only in kind."
    ),
}
