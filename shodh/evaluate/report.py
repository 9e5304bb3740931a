"""The report of an evaluation: ``metrics.json``, a table, figures, and one page that holds them all."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from shodh.evaluate.evaluation import Evaluation
from shodh.report import figures
from shodh.report.page import Section, Table, text_table, write_page
from shodh.report.published import SHODH_MOE
from shodh.train.metrics import read_metrics
from shodh.train.run_folder import RunFolder, describe_environment

ROUTING_NOTE = (
    "U = I(regime; expert) / H(regime): 1 when the expert names the regime, whatever the number of experts. "
    "NMI = I / sqrt(H(regime) H(expert)) stays below 1 when several experts share a regime. The router never sees a "
    "regime label."
)
FIELD_NOTE = (
    "L2RE in units is of the fields as they are stored, as DPOT and MoE-POT report it; all other errors are of "
    "normalised fields, which have no mean to divide by."
)
ROLLOUT_NOTE = "From the first frames of every trajectory; persistence is the last frame that was given."
ALL_ROWS = 10**6  # the tables of an evaluation are its result: shown whole


def has_published(metrics: dict[str, Any]) -> bool:
    """Whether others have published figures of one of the regimes."""
    return any(name in SHODH_MOE["decoded_mse"] for name in metrics["regimes"])


def error_table(metrics: dict[str, Any]) -> Table:
    """Held-out errors by regime: the model, persistence, their ratio, and what the tokenizer alone loses.

    Published figures stand beside them where there is one of a regime.
    """
    header = ["regime", "error", "model", "persistence", "model / persistence", "tokenizer alone"]
    shown = ["published"] if has_published(metrics) else []
    rows = []
    for name, regime in metrics["regimes"].items():
        measures = []
        if "latent_mse" in regime:
            measures.append(("latent MSE", regime["latent_mse"], SHODH_MOE["latent_mse"]))
        measures.append(("decoded MSE (normalised)", regime["decoded_mse"], SHODH_MOE["decoded_mse"]))
        for label, key in (("L2RE", "l2re"), ("L2RE, in units,", "l2re_physical"), ("VRMSE", "vrmse")):
            measures += [(f"{label} {field}", kinds, {}) for field, kinds in regime.get(key, {}).items()]
        for label, kinds, published in measures:
            model, persistence = kinds["model"], kinds["persistence"]
            ratio = model / persistence if persistence else None
            values = (model, persistence, ratio, kinds.get("tokenizer"))
            rows.append([name, label, *values, *(published.get(name) for _ in shown)])
    return Table([*header, *shown], rows)


def divergence_table(metrics: dict[str, Any]) -> Table:
    """Divergence of decoded velocity by regime and mode."""
    header = ["regime", "field and mode", "max", "rms", "max / gradient"]
    rows = []
    for name, regime in metrics["regimes"].items():
        for mode, values in regime.get("divergence", {}).items():
            if isinstance(values, dict):
                numbers = (values["max"], values["rms"], values["max_over_gradient"])
                rows.append([name, mode, *numbers])
    return Table(header, rows)


def rollout_table(metrics: dict[str, Any]) -> Table | None:
    """Errors by autoregressive step, the model's and persistence's; None without rollouts."""
    rows: list[list[Any]] = []
    for name, regime in metrics["regimes"].items():
        for label, key in (("L2RE", "rollout_l2re"), ("VRMSE", "rollout")):
            for field, kinds in regime.get(key, {}).items():
                rows += [[name, f"{label} {field}", kind, *steps] for kind, steps in kinds.items()]
    if not rows:
        return None
    longest = max(map(len, rows))
    header = ["regime", "error", "of", *(f"step {i + 1}" for i in range(longest - 3))]
    return Table(header, [[*row, *[None] * (longest - len(row))] for row in rows])


def routing_table(metrics: dict[str, Any]) -> Table | None:
    """Shares of each regime's tokens by expert, with U and NMI, layer by layer."""
    routing = metrics["routing"]
    if routing is None:
        return None
    header = ["layer", "U", "NMI", *(f"{regime}: share of each expert" for regime in routing["layers"][0]["shares"])]
    rows = []
    for number, layer in enumerate(routing["layers"]):
        shares = [" ".join(f"{s:.2f}" for s in row) for row in layer["shares"].values()]
        rows.append([number, layer["regime_information"], layer["nmi"], *shares])
    return Table(header, rows)


def _slice_rows(example: Any) -> list[tuple[str, Any, Any]]:
    return [(label, example.truth[i].numpy(), example.prediction[i].numpy()) for i, label in enumerate(example.labels)]


def draw(folder: RunFolder, evaluation: Evaluation) -> dict[str, Figure]:
    """All figures of the report by file stem, in the order of the page."""
    metrics = evaluation.metrics
    drawn: dict[str, Figure] = {}
    if metrics["routing"] is not None:
        drawn["expert_shares"] = figures.expert_shares(metrics["routing"])
    rollouts = {name: r["rollout"] for name, r in metrics["regimes"].items() if "rollout" in r}
    if rollouts:
        drawn["rollout"] = figures.rollout(rollouts)
    for example in evaluation.examples:
        solid = None if example.solid is None else example.solid.numpy()
        drawn[f"slices_{example.regime}"] = figures.slices(example.regime, _slice_rows(example), solid)
    curve = figures.training_curve(read_metrics(folder.path / "metrics.jsonl"))
    return drawn if curve is None else {**drawn, "training": curve}


def write_report(folder: RunFolder, evaluation: Evaluation) -> str:
    """Write ``RUN/report/`` (``metrics.json``, CSV and PNG files, ``index.html``); returns it as text."""
    metrics = {**evaluation.metrics, "published": SHODH_MOE, "env": describe_environment()}
    first = next(iter(metrics["regimes"].values()))
    on_latents = "latent_mse" in first
    published = has_published(metrics)
    notes = [] if on_latents else [FIELD_NOTE]
    if published:
        notes.append(f"Published: {SHODH_MOE['source']}. {SHODH_MOE['caveat']}")
    sections = [_section("errors", "Held-out errors", error_table(metrics), " ".join(notes))]
    rollouts = rollout_table(metrics)
    if rollouts is not None:
        sections.append(_section("rollouts", "Rollouts", rollouts, ROLLOUT_NOTE))
    if on_latents:
        note = f"Operator: {first['divergence']['operator']}."
        note += f" Published: {SHODH_MOE['divergence_fp64']:.1e} (FP64)." if published else ""
        sections.append(_section("divergence", "Divergence of the decoded velocity", divergence_table(metrics), note))
    routing = routing_table(metrics)
    if routing is not None:
        sections.append(_section("routing", "Routing", routing, ROUTING_NOTE))
    averaged = ", average of the weights" if metrics.get("weights") == "ema" else ""
    title = f"{folder.path.name}: checkpoint {metrics['checkpoint']}{averaged}, {metrics['split']} split"
    pictures = Section(
        "figures", "Figures", "Held-out samples, in normalised fields.", figures=draw(folder, evaluation)
    )
    write_page(folder.report, title, None, [*sections, pictures], data=metrics, data_name="metrics.json")
    text = "\n\n".join(f"{s.title}\n{text_table(s.tables[s.key])}\n{s.text}" for s in sections)
    return f"{title}\n\n{text}\n"


def _section(key: str, title: str, table: Table, text: str) -> Section:
    return Section(key, title, text, tables={key: table}, rows_shown=ALL_ROWS)
