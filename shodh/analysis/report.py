"""The report of an evaluation: ``metrics.json``, a table, figures, and one page that holds them all."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shodh.analysis import figures
from shodh.analysis.published import SHODH_MOE
from shodh.files import write_atomically
from shodh.train.evaluation import Evaluation
from shodh.train.metrics import read_metrics
from shodh.train.run_folder import RunFolder, describe_environment

Row = list[str]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b2a41; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .25rem .7rem; text-align: right }
th { border-bottom: 2px solid #1b2a41 } td { border-bottom: 1px solid #dde }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% } .note { color: #556; font-size: 13px }
"""


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.3g}"


def error_table(metrics: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Held-out errors by regime: the model, persistence, their ratio, and what the tokenizer alone loses."""
    header = ["regime", "error", "model", "persistence", "model / persistence", "tokenizer alone", "published"]
    rows = []
    for name, regime in metrics["regimes"].items():
        measures = [("latent MSE", regime["latent_mse"], SHODH_MOE["latent_mse"])]
        measures.append(("decoded MSE (normalised)", regime["decoded_mse"], SHODH_MOE["decoded_mse"]))
        for label, key in (("L2RE", "l2re"), ("VRMSE", "vrmse")):
            measures += [(f"{label} {field}", kinds, {}) for field, kinds in regime[key].items()]
        for label, kinds, published in measures:
            assert isinstance(published, dict)
            model, persistence = kinds["model"], kinds["persistence"]
            ratio = model / persistence if persistence else None
            values = (model, persistence, ratio, kinds.get("tokenizer"), published.get(name))
            rows.append([name, label, *(_number(v) for v in values)])
    return header, rows


def divergence_table(metrics: dict[str, Any]) -> tuple[Row, list[Row]]:
    """Divergence of decoded velocity by regime and mode."""
    header = ["regime", "field and mode", "max", "rms", "max / gradient"]
    rows = []
    for name, regime in metrics["regimes"].items():
        for mode, values in regime["divergence"].items():
            if isinstance(values, dict):
                numbers = (values["max"], values["rms"], values["max_over_gradient"])
                rows.append([name, mode, *(_number(v) for v in numbers)])
    return header, rows


def routing_table(metrics: dict[str, Any]) -> tuple[Row, list[Row]] | None:
    """Shares of each regime's tokens by expert, with U and NMI, layer by layer."""
    routing = metrics["routing"]
    if routing is None:
        return None
    header = ["layer", "U", "NMI", *(f"{regime}: share of each expert" for regime in routing["layers"][0]["shares"])]
    rows = []
    for number, layer in enumerate(routing["layers"]):
        shares = [" ".join(f"{s:.2f}" for s in row) for row in layer["shares"].values()]
        rows.append([str(number), f"{layer['regime_information']:.3f}", f"{layer['nmi']:.3f}", *shares])
    return header, rows


def text_table(header: Row, rows: Sequence[Row]) -> str:
    """Columns aligned for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _html_table(header: Row, rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _slice_rows(example: Any) -> list[tuple[str, Any, Any]]:
    return [(label, example.truth[i].numpy(), example.prediction[i].numpy()) for i, label in enumerate(example.labels)]


def write_figures(folder: RunFolder, evaluation: Evaluation) -> list[Path]:
    """All PNG files of the report, in the order of the page."""
    out = folder.report
    metrics = evaluation.metrics
    paths: list[Path] = []
    if metrics["routing"] is not None:
        paths.append(figures.expert_shares(out / "expert_shares.png", metrics["routing"]))
    rollouts = {name: r["rollout"] for name, r in metrics["regimes"].items() if "rollout" in r}
    if rollouts:
        paths.append(figures.rollout(out / "rollout.png", rollouts))
    for example in evaluation.examples:
        solid = None if example.solid is None else example.solid.numpy()
        rows = _slice_rows(example)
        paths.append(figures.slices(out / f"slices_{example.regime}.png", example.regime, rows, solid))
    curve = figures.training_curve(out / "training.png", read_metrics(folder.path / "metrics.jsonl"))
    return paths if curve is None else [*paths, curve]


def write_report(folder: RunFolder, evaluation: Evaluation) -> str:
    """Write ``RUN/report/`` (``metrics.json``, PNG files, ``index.html``); returns the table for the terminal."""
    folder.report.mkdir(parents=True, exist_ok=True)
    metrics = {**evaluation.metrics, "published": SHODH_MOE, "env": describe_environment()}
    write_atomically(folder.report / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    pictures = write_figures(folder, evaluation)
    errors, divergences, routing = error_table(metrics), divergence_table(metrics), routing_table(metrics)
    operator = next(iter(metrics["regimes"].values()))["divergence"]["operator"]
    routed_note = (
        "U = I(regime; expert) / H(regime): 1 when the expert names the regime, whatever the number of experts. "
        "NMI = I / sqrt(H(regime) H(expert)) stays below 1 when several experts share a regime. The router never sees "
        "a regime label."
    )
    sections = [
        ("Held-out errors", errors, f"Published: {SHODH_MOE['source']}. {SHODH_MOE['caveat']}"),
        ("Divergence of the decoded velocity", divergences, f"Operator: {operator}. Published: 2.8e-10 (FP64)."),
    ]
    if routing is not None:
        sections.append(("Routing", routing, routed_note))
    title = f"{folder.path.name}: checkpoint {metrics['checkpoint']}, {metrics['split']} split"
    body = "".join(
        f"<h2>{html.escape(name)}</h2>{_html_table(*table)}<p class=note>{html.escape(note)}</p>"
        for name, table, note in sections
    )
    body += "<h2>Figures</h2>" + "".join(_image(p) for p in pictures)
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    page = f"<!doctype html><html lang=en><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    write_atomically(folder.report / "index.html", page)
    text = "\n\n".join(f"{name}\n{text_table(*table)}\n{note}" for name, table, note in sections)
    return f"{title}\n\n{text}\n"
