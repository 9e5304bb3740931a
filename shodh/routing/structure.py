"""The sections on stability over training, and on structure between layers, experts and neighbouring tokens."""

from __future__ import annotations

import numpy as np

from shodh.report.page import Section, Table
from shodh.routing import plots
from shodh.routing.samples import Look, Sample, layers_of
from shodh.routing.statistics import Coherence, changed, co_activation, joint_counts, shares, spatial_coherence
from shodh.routing.view import View


def stability_section(view: View) -> Section:
    """How soon the choices of the same samples are what they will be, and how many change between looks."""
    title = "Stability: the same samples over training"
    steps = view.trace.samples.steps(view.split)
    if not view.trace.comparable or len(steps) < 2:
        why = "the same samples at two steps at least" if view.trace.comparable else "records of the same samples"
        return Section("stability", title, f"Not available: this needs {why}.", {"available": False})
    last = view.trace.samples.look(view.split, steps[-1])
    rows = []
    for before, after in zip(steps, steps[1:], strict=False):
        first, second = (view.trace.samples.look(view.split, s) for s in (before, after))
        for layer in view.layers:
            switched, settled = _changed(first, second, layer), _changed(first, last, layer)
            rows.append([layer, before, after, switched, None if settled is None else 1 - settled])
    rows.sort(key=lambda row: row[:2])

    def curve(column: int, when: int) -> plots.Curves:
        chosen = {n: [r for r in rows if r[0] == n and r[column] is not None] for n in view.layers}
        return {n: (np.array([r[when] for r in rs]), np.array([r[column] for r in rs])) for n, rs in chosen.items()}

    final = {str(row[0]): {"from": row[1], "to": row[2], "switch_rate": row[3], "saturation": row[4]} for row in rows}
    return Section(
        "stability",
        title,
        "Saturation is the share of tokens that are already at the expert they have at the end; the switch rate is the "
        "share whose first choice changed between two validations. Both are of the same held-out samples.",
        {"last": final},
        {"stability": Table(["layer", "step", "next step", "switch rate", "saturation"], rows)},
        {"stability": plots.curve_grid({"router saturation": curve(4, 1), "switch rate": curve(3, 2)})},
        files_only=("stability",),
    )


def _changed(first: Look, second: Look, layer: int) -> float | None:
    """Share of tokens of the common samples whose first choice differs; None without common samples."""
    common = [n for n in first if n in second and _shape(first[n], layer) == _shape(second[n], layer) is not None]
    if not common:
        return None
    before, after = (np.concatenate([look[n].top1[layer].ravel() for n in common]) for look in (first, second))
    return changed(before, after)


def _shape(sample: Sample, layer: int) -> tuple[int, ...] | None:
    return sample.top1[layer].shape if layer in sample.top1 else None


def structure_section(view: View) -> Section:
    """Co-activation, transitions from layer to layer, and whether neighbours share an expert."""
    section = Section("structure", "Structure: experts, layers, neighbours", "")
    texts = [_co_activation(view, section), _transitions(view, section), _coherence(view, section)]
    section.text = " ".join(texts)
    return section


def _co_activation(view: View, section: Section) -> str:
    found = {layer: view.trace.pairs[split, layer] for split, layer in view.trace.pairs if split == view.split}
    if not found:
        return "Co-activation needs more than one expert a token."
    matrices = {layer: co_activation(pairs) for layer, (_, pairs) in sorted(found.items())}
    rows = [[n, i, j, m[i, j]] for n, m in matrices.items() for i, j in np.ndindex(*m.shape) if i != j]
    section.files_only += ("co_activation",)
    section.tables["co_activation"] = Table(["layer", "expert", "with", "N(i,j) / N(i)"], rows)
    shown = {f"layer {n}": matrices[n] * (1 - np.eye(len(matrices[n]))) for n in plots.chosen(list(matrices))}
    section.figures["co_activation"] = plots.matrices(shown, None, "also goes to", "expert")
    section.summary["co_activation"] = {str(n): m for n, m in matrices.items()}
    return "Co-activation N(i,j)/N(i) is the part of the tokens of expert i that go to expert j too."


def _transitions(view: View, section: Section) -> str:
    if not view.trace.ordered:
        return "Transitions between layers need the first choice of every token, which this trace does not say."
    look = view.look or view.trace.samples.newest(view.split)
    layers = layers_of(look)
    if len(layers) < 2:
        return "Transitions between layers need sample records of two layers."
    experts = {n: max(len(s.counts[n]) for s in look.values()) for n in layers}
    tables = {}
    for a, b in zip(layers, layers[1:], strict=False):
        first, second = (np.concatenate([s.top1[n].ravel() for s in look.values()]) for n in (a, b))
        tables[a, b] = shares(joint_counts(first, second, experts[a], experts[b]))
    rows = [[a, b, i, j, m[i, j]] for (a, b), m in tables.items() for i, j in np.ndindex(*m.shape)]
    section.files_only += ("transitions",)
    section.tables["transitions"] = Table(["layer", "next layer", "expert", "next expert", "share"], rows)
    pairs = {a: (a, b) for a, b in tables}
    shown = {f"layer {pairs[a][0]} to {pairs[a][1]}": tables[pairs[a]] for a in plots.chosen(list(pairs))}
    section.figures["transitions"] = plots.matrices(shown, None, "expert in the next layer", "expert")
    section.summary["transitions"] = {f"{a} to {b}": m for (a, b), m in tables.items()}
    return "A row of a transition matrix says where the tokens of an expert go in the next layer (first choices)."


def _coherence(view: View, section: Section) -> str:
    if not view.look:
        return "Spatial coherence needs sample records."
    rows = []
    for layer in view.layers:
        for regime in view.regimes:
            found = _coherence_of(view, layer, regime)
            if found is not None:
                rows.append([layer, regime, *found])
                section.summary.setdefault("coherence", {}).setdefault(str(layer), {})[regime] = found._asdict()
    section.tables["coherence"] = Table(["layer", "regime", "equal neighbours", "permuted", "z"], rows)
    return (
        "Spatial coherence is the share of neighbouring tokens with the same expert, against the same choices at "
        "permuted places of the same sample: z says by how many deviations of the null it is above it (0 where "
        "samples send all their tokens to one expert)."
    )


def _coherence_of(view: View, layer: int, regime: str) -> Coherence | None:
    grids = [s.top1[layer] for s in view.look.values() if s.regime == regime]
    if not grids or len({g.shape for g in grids}) > 1:
        return None
    return spatial_coherence(np.stack(grids), view.rng("coherence", layer, regime))
