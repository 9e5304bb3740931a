"""Where an update lives: its norm, and how far the experts agree, by layer, by component and by expert."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shodh.core.weights import LazyTensor, LazyWeights, Progress, ignore
from shodh.merge.components import COMPONENTS, ROUTED_EXPERTS, component, layer
from shodh.merge.lazy import blocks, check_alike


@dataclass
class _Sums:
    """Sums over a set of weights; everything reported follows from them."""

    count: int = 0
    values: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.float64))

    def add(self, other: _Sums) -> None:
        self.count += other.count
        self.values = self.values + other.values

    def report(self, whole: Tensor) -> dict[str, float | int | None]:
        """JSON-able figures; shares are of ``whole``, the squared norms of shared part and direction of the model."""
        anchor, low, high, cross, shared, direction = self.values.tolist()
        both = math.sqrt(low * high)
        return {
            "parameters": self.count,
            "anchor_norm": math.sqrt(anchor),
            "low_norm": math.sqrt(low),
            "high_norm": math.sqrt(high),
            "cosine": cross / both if both else None,
            "shared_norm": math.sqrt(shared),
            "direction_norm": math.sqrt(direction),
            "relative_direction": math.sqrt(direction / anchor) if anchor else None,
            "share_of_shared": shared / float(whole[0]) if whole[0] else None,
            "share_of_direction": direction / float(whole[1]) if whole[1] else None,
        }


def diagnose(anchor: LazyWeights, low: LazyWeights, high: LazyWeights, progress: Progress = ignore) -> dict[str, Any]:
    """Norms and cosines of the updates of two experts, read block by block and summed in float64.

    Returns
    -------
    dict
        ``total``, and ``layers``, ``components``, ``experts`` (by layer and index), each a mapping to
        ``parameters``, ``anchor_norm``, ``low_norm`` and ``high_norm`` (of ``expert - anchor``), ``cosine`` between
        the two (None without change), ``shared_norm``, ``direction_norm``, ``relative_direction`` (over the anchor's
        norm) and the shares of the model's *squared* shared and direction norms.

    Raises
    ------
    CheckpointError
        The architectures differ.
    """
    check_alike({"the anchor": anchor, "the low expert": low, "the high expert": high})
    total = _Sums()
    layers: dict[str, _Sums] = {}
    components: dict[str, _Sums] = {}
    experts: dict[tuple[str, int], _Sums] = {}
    for name in anchor:
        tensors = (anchor[name], low[name], high[name])
        routed = component(name) == ROUTED_EXPERTS
        rows = anchor[name].shape[0] if routed else 1
        size = anchor[name].numel // max(rows, 1)
        for row in range(rows):
            sums = _sum(tensors, row * size, size, progress)
            total.add(sums)
            layers.setdefault(layer(name), _Sums()).add(sums)
            components.setdefault(component(name), _Sums()).add(sums)
            if routed:
                experts.setdefault((layer(name), row), _Sums()).add(sums)
    whole = total.values[4:]
    return {
        "total": total.report(whole),
        "components": {c: components[c].report(whole) for c in COMPONENTS if c in components},
        "layers": {name: sums.report(whole) for name, sums in layers.items()},
        "experts": [{"layer": n, "expert": e, **sums.report(whole)} for (n, e), sums in experts.items()],
    }


def _sum(tensors: tuple[LazyTensor, ...], first: int, count: int, progress: Progress) -> _Sums:
    sums = _Sums(count)
    for start, stop in blocks(count):
        anchor, low, high = (t.part(first + start, first + stop).double() for t in tensors)
        progress(sum(t.dtype.itemsize for t in tensors) * (stop - start))
        d_low, d_high = low - anchor, high - anchor
        # The direction from the experts themselves: from squared norms and the cosine it would cancel.
        parts = [(anchor, anchor), (d_low, d_low), (d_high, d_high), (d_low, d_high)]
        parts += [(half, half) for half in ((d_low + d_high) / 2, (high - low) / 2)]
        sums.values = sums.values + torch.stack([torch.dot(a, b) for a, b in parts])
    return sums


HEADER = ["part", "parameters", "|low|", "|high|", "cosine", "|direction|", "/ |anchor|", "share of direction^2"]


def table(report: dict[str, Any], kind: str) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of one part of `diagnose`'s result: ``components``, ``layers`` or ``experts``."""
    if kind == "experts":
        entries = [(f"{e['layer']} expert {e['expert']}", e) for e in report["experts"]]
    else:
        entries = list(report[kind].items())
    keys = ["parameters", "low_norm", "high_norm", "cosine", "direction_norm", "relative_direction"]
    keys += ["share_of_direction"]
    return HEADER, [[name, *(entry[key] for key in keys)] for name, entry in entries]
