"""Section: specialisation over local physics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from shodh.report.figures import INK, bare
from shodh.report.page import Section, Table
from shodh.routing.plots import chosen
from shodh.routing.probe.drawing import expert_colours, heat, panels
from shodh.routing.probe.local_physics import QUANTITIES
from shodh.routing.probe.record import Recording
from shodh.routing.probe.specialisation import (
    ConditionalInformation,
    conditional_information,
    count_bins,
    quantile_bins,
)

TEXT = (
    "Do experts divide the work within a regime by what happens locally? Tokens are binned by quartiles of each "
    "quantity within their regime (means over the token's cells, physical units); the map shows the share of the "
    "routing within regimes that the bins explain, I(expert; bin | regime) / H(expert | regime), less what the same "
    "bins give when each sample's are rolled elsewhere (p: how often the rolled ones give as much). Blank: the regime "
    "alone settles the expert, or the quantity does not exist."
)

Found = dict[tuple[int, str], ConditionalInformation]
Bins = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]  # (regime, quantity) -> bins, edges


def local_section(recordings: Sequence[Recording], token_grid: Sequence[int]) -> Section:
    """Bins of local physics against experts, by layer."""
    bins = _bin_all(recordings)
    found = _information(recordings, bins, token_grid)
    section = Section("local_physics", "Specialisation over local physics", TEXT)
    if not found:
        section.text = "No regime has a field from which vorticity, strain, wall distance or porosity follow: left out."
        return section
    rows = [
        [layer, QUANTITIES[name], c.information, float(c.null.mean()), c.p_value, c.corrected, c.explained]
        for (layer, name), c in found.items()
    ]
    header = ["layer", "quantity", "nats", "nats by chance", "p", "nats beyond chance", "explained share"]
    section.tables["local_information"] = Table(header, rows)
    section.tables["local_shares"] = _share_table(recordings, bins)
    section.summary = {
        "explained": {f"layer {layer}": _by_name(found, layer) for layer in sorted({k[0] for k in found})},
        "bins": "quartiles within the regime",
    }
    section.figures["local_information_map"] = _information_figure(found)
    layer = max(found, key=lambda key: found[key].corrected)[0]
    section.figures["local_shares_by_bin"] = _share_figure(recordings, bins, layer)
    return section


def _by_name(found: Found, layer: int) -> dict[str, dict[str, float | None]]:
    return {
        name: {"nats": c.corrected, "p": c.p_value, "explained": c.explained}
        for (at, name), c in found.items()
        if at == layer
    }


def _bin_all(recordings: Sequence[Recording]) -> Bins:
    bins = {}
    for recording in recordings:
        for name in QUANTITIES:
            binned = quantile_bins(recording.local[name]) if name in recording.local else None
            if binned is not None:
                bins[recording.name, name] = binned
    return bins


def _information(recordings: Sequence[Recording], bins: Bins, token_grid: Sequence[int]) -> Found:
    found = {}
    for layer in range(len(recordings[0].selected)):
        for name in QUANTITIES:
            having = [r for r in recordings if (r.name, name) in bins]
            if having:
                found[layer, name] = conditional_information(
                    [bins[r.name, name][0] for r in having],
                    [r.selected[layer] for r in having],
                    having[0].num_experts,
                    [token_grid] * len(having),
                )
    return found


def _share_table(recordings: Sequence[Recording], bins: Bins) -> Table:
    rows = []
    for recording in recordings:
        for name in QUANTITIES:
            if (recording.name, name) not in bins:
                continue
            numbers, edges = bins[recording.name, name]
            for layer, selected in enumerate(recording.selected):
                counts = count_bins(numbers, selected, int(numbers.max()) + 1, recording.num_experts)
                for b, row in enumerate(counts):
                    low, high = (edges[b], edges[b + 1]) if len(counts) < len(edges) else (edges[0], edges[-1])
                    head = [recording.name, layer, QUANTITIES[name], float(low), float(high), int(row.sum())]
                    rows.append([*head, *(float(v) for v in row / max(row.sum(), 1))])
    experts = [f"expert {e}" for e in range(recordings[0].num_experts)]
    return Table(["regime", "layer", "quantity", "from", "to", "assignments", *experts], rows)


def _information_figure(found: Found) -> Figure:
    layers = sorted({layer for layer, _ in found})
    names = [n for n in QUANTITIES if any(name == n for _, name in found)]
    values = np.full((len(names), len(layers)), np.nan)
    for (layer, name), c in found.items():
        if c.explained is not None:
            values[names.index(name), layers.index(layer)] = c.explained
    figure, axes = panels(1, 1, max(3.6, 1.3 + 0.7 * len(layers)), 0.4 * len(names) + 0.2)
    panel = axes[0, 0]
    image = heat(panel, values, low=0, high=max(0.2, float(np.nan_to_num(values).max())), cmap="Greens")
    panel.set_yticks(range(len(names)), [QUANTITIES[n] for n in names])
    panel.set_xticks(range(len(layers)), [str(i) for i in layers])
    panel.set_xlabel("layer")
    panel.set_title("routing within regimes explained", fontsize=9, color=INK)
    figure.colorbar(image, ax=panel)
    return figure


def _share_figure(recordings: Sequence[Recording], bins: Bins, layer: int) -> Figure:
    """Shares by bin at one layer, regimes x quantities."""
    shown = chosen(recordings)
    names = [n for n in QUANTITIES if any((r.name, n) in bins for r in shown)]
    figure, axes = panels(len(shown), len(names), 2.0, 1.5)
    colours = expert_colours(shown[0].num_experts)
    for number, (row, recording) in enumerate(zip(axes, shown, strict=True)):
        row[0].set_ylabel(recording.name, fontsize=8)
        for panel, name in zip(row, names, strict=True):
            if number == 0:
                panel.set_title(QUANTITIES[name], fontsize=9, color=INK)
            if (recording.name, name) not in bins:
                panel.set_xticks([])
                panel.set_yticks([])
                panel.spines[:].set_visible(False)
                panel.text(0.5, 0.5, "none", ha="center", va="center", color="#8a93a0", fontsize=8)
                continue
            numbers, _ = bins[recording.name, name]
            counts = count_bins(numbers, recording.selected[layer], int(numbers.max()) + 1, recording.num_experts)
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            foot = np.zeros(len(shares))
            for expert, colour in enumerate(colours):
                panel.bar(range(len(shares)), shares[:, expert], 0.9, foot, color=colour)
                foot += shares[:, expert]
            panel.set_ylim(0, 1)
            panel.set_xticks([0, len(shares) - 1], ["low", "high"] if len(shares) > 1 else ["", ""], fontsize=8)
            panel.set_yticks([0, 1])
            bare(panel)
    figure.suptitle(
        f"layer {layer}: share of each expert (colours) by quartile of the quantity", fontsize=10, color=INK
    )
    return figure
