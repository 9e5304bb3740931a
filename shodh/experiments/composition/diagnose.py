"""Why composition does what it does: where the updates live, and whether routing changes along the direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import scipy
import torch
from torch import Tensor

from shodh.experiments.composition.bench import Bench
from shodh.experiments.composition.members import Case
from shodh.merge import diagnose
from shodh.merge.readout import BANK


def diagnose_family(bench: Bench, cases: Sequence[Case]) -> dict[str, Any]:
    """JSON-able: ``updates`` as `shodh.merge.diagnose`, and ``routing`` as `routing_along`, None for dense models."""
    family = bench.family
    return {
        "updates": diagnose(family.anchor, family.low, family.high),
        "routing": routing_along(bench, cases) if family.sparse else None,
    }


def routing_along(bench: Bench, cases: Sequence[Case], bank: Sequence[float] = BANK) -> dict[str, Any]:
    """Change of expert usage along the direction, on the windows from which the counted rollouts start.

    Returns
    -------
    dict
        ``alphas``; ``divergence``, by layer: the Jensen-Shannon divergence, in bits (0: the same, 1: disjoint), of the
        shares of the experts at each coordinate against those at 0; ``moved``, by layer: the share of assignments of
        a token to an expert that are not among those at 0.
    """
    middle = _selections(bench, cases, 0.0)
    divergence: list[list[float]] = [[] for _ in middle]
    moved: list[list[float]] = [[] for _ in middle]
    for alpha in bank:
        for layer, (here, there) in enumerate(zip(_selections(bench, cases, alpha), middle, strict=True)):
            divergence[layer].append(usage_divergence(here, there))
            moved[layer].append(share_moved(here, there))
    return {"alphas": list(bank), "divergence": divergence, "moved": moved}


def usage_divergence(here: Tensor, there: Tensor) -> float:
    """Jensen-Shannon divergence in bits of how often each expert is chosen in two selections ``[T, K]``."""
    experts = int(max(here.max(), there.max())) + 1
    usage = [torch.bincount(s.reshape(-1), minlength=experts).double().numpy() for s in (here, there)]
    distance = float(scipy.spatial.distance.jensenshannon(*usage, base=2))
    # Rounding may leave a tiny negative square, and so no number, for equal shares.
    return 0.0 if distance != distance else distance**2


def share_moved(here: Tensor, there: Tensor) -> float:
    """Share of the assignments ``[T, K]`` to experts that the same token has not in the other selection."""
    kept = (here.unsqueeze(2) == there.unsqueeze(1)).any(2)
    return 1.0 - float(kept.double().mean())


@torch.no_grad()
def _selections(bench: Bench, cases: Sequence[Case], alpha: float) -> list[Tensor]:
    """Experts of every token, ``[T, K]`` a sparse layer, of one step at a coordinate."""
    family = bench.family
    family.slider().set(alpha)
    model = family.model.forecaster
    parts = []
    for part in (part for case in cases for part in case.chunks(bench.batch)):
        states, features = model.encode(bench.window(part), part.static, 0)
        routing = model.step(states, features, model.labels(0, states)).routing
        parts.append([r.selected.cpu() for r in routing])
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]
