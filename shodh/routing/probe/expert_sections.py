"""Sections: similarity of the experts of one run, and their match with those of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from shodh.report.figures import INK
from shodh.report.page import Section, Table
from shodh.routing.plots import chosen
from shodh.routing.probe.drawing import heat, panels
from shodh.routing.probe.interventions import sparse_layers
from shodh.routing.probe.matching import Match, agreement, assignment_overlap, match_experts
from shodh.routing.probe.record import Recording
from shodh.routing.probe.similarity import cka_matrix, expert_outputs, is_bilinear, tensor_similarity
from shodh.routing.statistics import joint_counts

SIMILARITY_TEXT = (
    "How alike the experts of a layer are: debiased linear CKA of their outputs when every expert is given the same "
    "inputs, drawn from held-out tokens of all regimes. 1: the same function up to rotation and scale; 0: unrelated."
)
BILINEAR_TEXT = (
    " These experts are bilinear, so the second row is exact: the cosine of their symmetric tensors without the "
    "self-contraction term, that is, the correlation of their outputs for Gaussian inputs. Those fill all directions "
    "and held-out tokens only some, so that experts may be unrelated as functions and yet alike on data."
)
MATCH_TEXT = (
    "Which expert of this run plays the part of which expert of the other (Hungarian matching, one to one), first by "
    "debiased linear CKA of their outputs on the same held-out tokens, then by the overlap (Jaccard) of the tokens "
    "they take. Chance is the mean over all pairs; runs that learned the same division lie far above it."
)


def probe_outputs(model: nn.Module, recordings: Sequence[Recording]) -> list[Tensor]:
    """Outputs of every expert on the recorded inputs of its layer, of all regimes: ``[E, rows, D]`` a layer."""
    inputs = torch.cat([r.inputs for r in recordings if r.inputs is not None], 1)
    return [expert_outputs(layer.experts, rows) for layer, rows in zip(sparse_layers(model), inputs, strict=True)]


def similarity_section(model: nn.Module, recordings: Sequence[Recording]) -> Section:
    """CKA between the experts of each layer, and exact tensor similarity where they are bilinear."""
    stacks = [layer.experts for layer in sparse_layers(model)]
    outputs = probe_outputs(model, recordings)
    matrices = {"CKA": [cka_matrix(o, o) for o in outputs]}
    section = Section("expert_similarity", "Similarity of experts", SIMILARITY_TEXT)
    if is_bilinear(stacks[0]):
        section.text += BILINEAR_TEXT
        matrices["tensor similarity"] = [tensor_similarity(s, s) for s in stacks]
        matrices["with self-contraction"] = [tensor_similarity(s, s, self_contraction=True) for s in stacks]
    rows = [
        [layer, i, j, *(float(m[layer][i, j]) for m in matrices.values())]
        for layer in range(len(stacks))
        for i, j in zip(*np.triu_indices(len(outputs[0]), 1), strict=True)
    ]
    section.tables["expert_pairs"] = Table(["layer", "expert", "and expert", *matrices], rows)
    section.summary = {
        "cka": "linear, debiased",
        "probe_rows": int(outputs[0].shape[1]),
        "mean_between_experts": {name: [_off_diagonal(m) for m in layers] for name, layers in matrices.items()},
    }
    shown = {name: layers for name, layers in matrices.items() if name != "with self-contraction"}
    section.figures["expert_similarity"] = _matrices_figure(shown)
    return section


def _off_diagonal(matrix: np.ndarray) -> float | None:
    values = matrix[~np.eye(len(matrix), dtype=bool)]
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _matrices_figure(matrices: dict[str, list[np.ndarray]]) -> Figure:
    layers = chosen(range(len(next(iter(matrices.values())))))
    figure, axes = panels(len(matrices), len(layers), 2.2, 2.0)
    for row, (name, values) in zip(axes, matrices.items(), strict=True):
        for panel, layer in zip(row, layers, strict=True):
            signed = name != "CKA"
            image = heat(panel, values[layer], low=-float(signed), high=1, cmap="RdBu_r" if signed else "Greens")
            panel.set_title(f"layer {layer}", fontsize=9, color=INK)
            _number_experts(panel, values[layer].shape)
        row[0].set_ylabel(f"{name}\nexpert", fontsize=8)
        figure.colorbar(image, ax=row[-1])
    return figure


def _number_experts(panel: Any, shape: Sequence[int]) -> None:
    rows, columns = (range(0, n, max(1, n // 8)) for n in shape)
    panel.set_yticks(list(rows), [str(i) for i in rows], fontsize=8)
    panel.set_xticks(list(columns), [str(i) for i in columns], fontsize=8)


def match_section(
    model: nn.Module,
    recordings: Sequence[Recording],
    other: nn.Module,
    other_recordings: Sequence[Recording],
    other_name: str,
) -> Section:
    """Experts of two runs matched layer by layer; both runs were given the same windows."""
    outputs, others = probe_outputs(model, recordings), probe_outputs(other, other_recordings)
    layers = range(min(len(outputs), len(others)))
    section = Section("run_match", f"Match of experts with {other_name}", MATCH_TEXT)
    if len(outputs) != len(others):
        section.text += (
            f" The runs have {len(outputs)} and {len(others)} sparse layers; the first {len(layers)} are matched."
        )
    matrices, rows, summary = [], [], []
    for layer in layers:
        mine, theirs = (
            np.concatenate([r.selected[layer][..., 0] for r in part]) for part in (recordings, other_recordings)
        )
        joint = joint_counts(mine, theirs, len(outputs[layer]), len(others[layer]))
        cka, overlap = cka_matrix(outputs[layer], others[layer]), assignment_overlap(joint)
        by_output, by_tokens = match_experts(cka), match_experts(overlap)
        matrices.append(cka)
        for kind, match in (("outputs, CKA", by_output), ("tokens, overlap", by_tokens)):
            rows += [
                [layer, kind, int(a), int(b), float(v), match.chance]
                for a, b, v in zip(match.first, match.second, match.values, strict=True)
            ]
        summary.append(
            {
                "layer": layer,
                "cka": _summary(by_output),
                "overlap": _summary(by_tokens),
                "same_matching": _pairs(by_output) == _pairs(by_tokens),
                "tokens_at_matched_experts": agreement(joint, by_tokens),
            }
        )
    header = ["layer", "matched by", "expert here", f"expert of {other_name}", "similarity", "chance"]
    section.tables["matched_experts"] = Table(header, rows)
    section.summary = {"other_run": other_name, "layers": summary}
    section.figures["run_match"] = _match_figure(matrices, other_name)
    return section


def _pairs(match: Match) -> dict[int, int]:
    return dict(zip(match.first.tolist(), match.second.tolist(), strict=True))


def _summary(match: Match) -> dict[str, Any]:
    return {"pairs": _pairs(match), "mean": match.mean, "chance": match.chance}


def _match_figure(matrices: Sequence[np.ndarray], other_name: str) -> Figure:
    """CKA between the runs, the matched pairs framed."""
    layers = chosen(range(len(matrices)))
    figure, axes = panels(1, len(layers), 2.2, 2.1)
    for panel, layer in zip(axes[0], layers, strict=True):
        image = heat(panel, matrices[layer], low=0, high=1, cmap="Greens")
        match = match_experts(matrices[layer])
        panel.scatter(match.second, match.first, s=420, marker="s", facecolors="none", edgecolors=INK, linewidths=1.4)
        panel.set_title(f"layer {layer}", fontsize=9, color=INK)
        panel.set_xlabel(f"expert of {other_name}", fontsize=8)
        _number_experts(panel, matrices[layer].shape)
    axes[0, 0].set_ylabel("expert here", fontsize=8)
    figure.colorbar(image, ax=axes[0, -1])
    return figure
