"""Section: which experts matter, measured by taking them away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from matplotlib.figure import Figure

from shodh.report.figures import INK, bare
from shodh.report.page import Section, Table
from shodh.routing.probe.causality import KINDS, Effect, Effects
from shodh.routing.probe.drawing import heat, panels
from shodh.routing.probe.record import Recording

MATTERS = 1.05  # an expert matters where removing it raises a regime's latent error by more than 5 %
TITLES = {"remove": "expert removed", "reroute": "its tokens to the next best", "force": "all tokens to it"}
WHOLE = ("remove all", "shuffle tokens", "shuffle samples")
TEXT = (
    "Usage is not importance: an expert that takes many tokens may be spared, and one that takes few may not. Here "
    "routing is changed while the model runs, and every number is the held-out one-step error over the intact one (1: "
    "nothing lost), of latents, or of normalised fields where the operator works on these. An expert counts as one "
    "that matters where its removal raises the latent error of a regime by more than 5 %. Substitutes keep the weight "
    "of the expert they stand in for."
)


def causality_section(effects: Effects, recordings: Sequence[Recording]) -> Section:
    """Error under every intervention, by regime; and the experts that matter."""
    regimes = [r.name for r in recordings]
    layers, experts = len(recordings[0].selected), recordings[0].num_experts
    section = Section("causality", "Which experts matter", TEXT)
    table, matter = _experts_table(effects, recordings)
    correlation = _usage_against_importance(effects, recordings)
    section.tables["experts_that_matter"] = table
    section.tables["interventions"] = _interventions_table(effects)
    section.text += f" {len(matter)} of {layers * experts} experts matter by this measure. {_verdict(correlation)}"
    section.text += _whole_sentence(effects, regimes)
    section.summary = {
        "matters_above": MATTERS,
        "experts_that_matter": matter,
        "usage_importance_rank_correlation": correlation,
        "kinds": KINDS,
        "whole_layers": {
            kind: {
                regime: {_layer_name(at): _numbers(effects[kind, at, None, regime]) for at in (*range(layers), None)}
                for regime in regimes
            }
            for kind in WHOLE
        },
        "force_all_layers": {
            regime: [_numbers(effects["force", None, e, regime]) for e in range(experts)] for regime in regimes
        },
    }
    section.figures["knock_out"] = _knock_out_figure(effects, regimes, layers, experts)
    section.figures["shuffled_routing"] = _whole_figure(effects, regimes, layers)
    return section


def _verdict(correlation: float | None) -> str:
    if correlation is None:
        return "Usage or the harm of removal does not vary, so that they have no correlation."
    return f"Rank correlation between an expert's share of a regime and the harm of its removal: {correlation:.2f}."


def _whole_sentence(effects: Effects, regimes: Sequence[str]) -> str:
    parts = []
    for regime in regimes:
        gone, strange = (float(np.mean(effects[k, None, None, regime].latent)) for k in (WHOLE[0], WHOLE[2]))
        parts.append(f"{regime} {gone:.2f} and {strange:.2f}")
    return f" Without any routed expert, and with the choices of other samples, the error is: {'; '.join(parts)}."


def _layer_name(layer: int | None) -> str:
    return "all" if layer is None else str(layer)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _numbers(effect: Effect) -> dict[str, Any]:
    return {
        "latent": _mean(effect.latent),
        "latent_range": [min(effect.latent), max(effect.latent)],
        "decoded": _mean(effect.decoded),
    }


def _usage(recording: Recording, layer: int, expert: int) -> float:
    return float((recording.selected[layer] == expert).mean())


def _experts_table(effects: Effects, recordings: Sequence[Recording]) -> tuple[Table, list[dict[str, Any]]]:
    """Experts by the worst harm of their removal, the worst first."""
    rows: list[tuple[float, list[Any]]] = []
    matter: list[dict[str, Any]] = []
    for layer in range(len(recordings[0].selected)):
        for expert in range(recordings[0].num_experts):
            usage = [_usage(r, layer, expert) for r in recordings]
            gone = [effects["remove", layer, expert, r.name] for r in recordings]
            rerouted = [effects["reroute", layer, expert, r.name] for r in recordings]
            harm = [float(np.mean(e.latent)) for e in gone]
            row: list[Any] = [layer, expert, max(harm) > MATTERS, *usage, *harm]
            row += [_mean(e.decoded) for e in gone] + [float(np.mean(e.latent)) for e in rerouted]
            rows.append((max(harm), row))
            if max(harm) > MATTERS:
                worst = recordings[int(np.argmax(harm))].name
                matter.append({"layer": layer, "expert": expert, "regime": worst, "error_ratio": max(harm)})
    rows.sort(key=lambda r: -r[0])
    matter.sort(key=lambda m: -m["error_ratio"])
    names = [r.name for r in recordings]
    groups = ("share of {}", "removed: {}", "removed, decoded: {}", "rerouted: {}")
    header = ["layer", "expert", "matters", *(g.format(n) for g in groups for n in names)]
    return Table(header, [row for _, row in rows]), matter


def _usage_against_importance(effects: Effects, recordings: Sequence[Recording]) -> float | None:
    """Spearman's rank correlation over (layer, expert, regime); None where either does not vary."""
    pairs = [
        (_usage(r, layer, e), float(np.mean(effects["remove", layer, e, r.name].latent)))
        for r in recordings
        for layer in range(len(r.selected))
        for e in range(r.num_experts)
    ]
    usage, harm = np.array(pairs).T
    if np.ptp(usage) == 0 or np.ptp(harm) == 0:
        return None
    return float(scipy.stats.spearmanr(usage, harm).statistic)


def _interventions_table(effects: Effects) -> Table:
    rows = []
    for (kind, layer, expert, regime), effect in effects.items():
        spread = [min(effect.latent), max(effect.latent)]
        rows.append([kind, _layer_name(layer), expert, regime, _mean(effect.latent), *spread, _mean(effect.decoded)])
    header = ["intervention", "layer", "expert", "regime", "latent error", "lowest", "highest", "decoded error"]
    return Table(header, rows)


def _knock_out_figure(effects: Effects, regimes: Sequence[str], layers: int, experts: int) -> Figure:
    """Latent error by layer and expert: removed, rerouted and forced, a row a regime."""
    figure, axes = panels(len(regimes), len(TITLES), max(2.2, 0.5 * experts), max(1.2, 0.35 * (layers + 1)))
    for number, (row, regime) in enumerate(zip(axes, regimes, strict=True)):
        for panel, kind in zip(row, TITLES, strict=True):
            at = [*range(layers), None]
            values = np.array([[np.mean(effects[kind, a, e, regime].latent) for e in range(experts)] for a in at])
            image = heat(panel, values, low=0.5, high=1.5, cmap="RdBu_r")
            panel.set_yticks(range(layers + 1), [_layer_name(a) for a in at], fontsize=8)
            panel.set_xticks(range(0, experts, max(1, experts // 8)))
            if number == 0:
                panel.set_title(TITLES[kind], fontsize=9, color=INK)
            if number == len(regimes) - 1:
                panel.set_xlabel("expert", fontsize=8)
        row[0].set_ylabel(f"{regime}\nlayer", fontsize=8)
        figure.colorbar(image, ax=row[-1])
    figure.suptitle("latent error over the intact one", fontsize=10, color=INK)
    return figure


def _whole_figure(effects: Effects, regimes: Sequence[str], layers: int) -> Figure:
    """Latent error when whole layers are changed; bars are means over seeds, lines their range."""
    figure, axes = panels(1, len(regimes), max(2.8, 0.6 * (layers + 1)), 2.4)
    at = [*range(layers), None]
    for panel, regime in zip(axes[0], regimes, strict=True):
        for number, (kind, colour) in enumerate(zip(WHOLE, ("#44536a", "#0b6e4f", "#b23a48"), strict=True)):
            found = [effects[kind, a, None, regime].latent for a in at]
            means = np.array([np.mean(v) for v in found])
            span = [means - [min(v) for v in found], [max(v) for v in found] - means]
            place = np.arange(len(at)) + 0.27 * (number - 1)
            panel.bar(place, means - 1, 0.25, bottom=1, color=colour, yerr=span, label=KINDS[kind])
        panel.axhline(1, color=INK, linewidth=0.8)
        panel.set_xticks(range(len(at)), [_layer_name(a) for a in at])
        panel.set_xlabel("layer")
        panel.set_title(regime, fontsize=9, color=INK)
        bare(panel)
    axes[0, 0].set_ylabel("latent error / intact")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, frameon=False)
    return figure
