"""What a run costs: presets of data, budgets and sizes of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .models import Size


@dataclass(frozen=True)
class Scale:
    """What a run costs: grid and trajectories of the data, budgets, sizes of the models."""

    grid: int
    frames: int
    counts: Mapping[str, int]
    batch: int
    steps: int
    seconds: float
    rollout: int
    starts: tuple[int, ...]
    size: Size
    history: int = 4
    rounds: int = 12
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    rate_sets: tuple[str, ...] = ("navier_stokes", "dam_break")


def _widths(fno: int, dpot: int, latent: int, unet: int, pde: int) -> dict[str, int]:
    same = {"fno": fno, "neuralop_fno": fno, "neuralop_tfno": fno}
    return {**same, "dpot": dpot, "latent": latent, "unet_classic": unet, "unet_convnext": unet, "pde_transformer": pde}


SCALES = {
    "tiny": Scale(
        grid=16,
        frames=8,
        counts={"train": 6, "valid": 2, "test": 2},
        batch=2,
        steps=3,
        seconds=0.05,
        rollout=3,
        starts=(0,),
        size=Size(4, 4, _widths(8, 16, 16, 4, 8)),
        rounds=1,
        rates=(1e-3, 1e-2),
    ),
    "small": Scale(
        grid=32,
        frames=24,
        counts={"train": 24, "valid": 4, "test": 8},
        batch=8,
        steps=120,
        seconds=15.0,
        rollout=12,
        starts=(0, 8),
        size=Size(8, 4, _widths(24, 64, 128, 8, 16)),
    ),
    "h100": Scale(
        grid=64,
        frames=24,
        counts={"train": 48, "valid": 8, "test": 16},
        batch=16,
        steps=150,
        seconds=3.0,
        rollout=12,
        starts=(0, 8),
        size=Size(16, 8, _widths(48, 256, 256, 24, 48)),
        rounds=20,
    ),
}
