"""The report of an evaluation: ``metrics.json``, the rows behind it, tables, figures, and one page that holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from shodh.evaluate import plots
from shodh.evaluate.evaluation import Evaluation
from shodh.evaluate.plots import interval_cell
from shodh.evaluate.rows import VALID
from shodh.evaluate.speed import NOTE as SPEED_NOTE
from shodh.evaluate.speed import speed_table
from shodh.report import figures
from shodh.report.page import Headline, Section, Table, filled, text_table, write_page
from shodh.report.published import SHODH_MOE
from shodh.schema.measures import MEASURES
from shodh.train.events import read_events
from shodh.train.metrics import read_metrics
from shodh.train.run_folder import RunFolder, describe_environment

ROUTING_NOTE = (
    "U = I(regime; expert) / H(regime): 1 when the expert names the regime, whatever the number of experts. "
    "NMI = I / sqrt(H(regime) H(expert)) stays below 1 when several experts share a regime. The router never sees a "
    "regime label."
)
ERROR_NOTE = (
    "VRMSE as The Well defines it: the error of a component over its standard deviation in space, the mean over the "
    "components of a vector; 1 is the error of the truth's own mean. A component that does not vary (the third of a "
    "flow in two dimensions) has none and does not count; 'components as one' sums error and variance over them all. "
    "L2RE: norm of the error over norm of the truth, of normalised fields. nRMSE: the same of the fields as they are "
    "stored, which flatters a field with an offset. Persistence: the last known frame. Tokenizer alone: what encoding "
    "and decoding the truth loses. Means are over trajectories, each the mean over its windows."
)
INTERVAL_NOTE = (
    "Intervals hold 95 % and are bootstraps over trajectories, as windows of one trajectory are not independent; they "
    "say nothing of other seeds of the training."
)
ROLLOUT_NOTE = (
    "From several starts of every trajectory, spread evenly; persistence is the last frame that was given. Valid time: "
    f"the first step with a VRMSE above {VALID}; a rollout that never has one is censored at the horizon H and counts "
    "as H + 1."
)
SPECTRA_NOTE = (
    "Energy by wave number, in isotropic shells of the fundamental of the longest axis; Fourier modes along periodic "
    "axes, cosine modes (even continuation) between walls and open ends; zero where a field does not exist. Bands sum "
    "to the mean square over all cells. Of normalised fields."
)
CONSERVED_NOTE = (
    "Change since the last given frame, relative to the root mean square (mean) and the mean square of the field "
    "before, in physical units: the mean is the mass of a scalar or the momentum of a velocity, the square its energy. "
    "What the truth keeps is conserved, and a model should drift as the truth does. Persistence has no drift."
)
EVENT_NOTE = (
    "Steps that the optimiser did not take, returns to a checkpoint, saves that failed, and ends of a job that stood "
    "still, in the order in which they came; a run that was killed may have met one twice."
)
ALL_ROWS = 10**6  # the tables of an evaluation are its result: shown whole
KINDS = ("model", "persistence", "tokenizer")


def has_published(metrics: dict[str, Any]) -> bool:
    """Whether others have published figures of one of the regimes."""
    return any(name in SHODH_MOE["decoded_mse"] for name in metrics["regimes"])


def error_table(metrics: dict[str, Any]) -> Table:
    """Held-out errors by regime: the model with its interval, persistence, their ratio, and the tokenizer alone.

    Published figures stand beside them where there is one of a regime.
    """
    header = ["regime", "error", "model", "95 % interval", "persistence", "model / persistence", "tokenizer alone"]
    shown = ["published"] if has_published(metrics) else []
    rows = []
    for name, regime in metrics["regimes"].items():
        ends = regime.get("intervals", {})
        measures: list[tuple[str, Any, Any, Any]] = []
        for key, measure in MEASURES.items():
            for field, kinds in regime.get(key, {}).items():
                measures.append((f"{measure.label} {field}", kinds, ends.get(key, {}).get(field, {}), {}))
            if key == "vrmse":
                for field, kinds in regime.get("vrmse_component", {}).items():
                    own = ends.get("vrmse_component", {}).get(field, {})
                    measures.append((f"{measure.label} {field}", kinds, own, {}))
        for key, label in (("latent_mse", "latent MSE"), ("decoded_mse", "decoded MSE (normalised)")):
            if key in regime:
                measures.append((label, regime[key], ends.get(key, {}), SHODH_MOE[key]))
        for label, kinds, own, published in measures:
            model, persistence = kinds["model"], kinds["persistence"]
            values = (persistence, model / persistence if persistence else None, kinds.get("tokenizer"))
            found = [published.get(name) for _ in shown]
            rows.append([name, label, model, interval_cell(own.get("model")), *values, *found])
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


def event_table(folder: RunFolder) -> Table:
    """What the training met."""
    rows = [[event["step"], event["kind"], event.get("why", "")] for event in read_events(folder.path)]
    return Table(["step", "event", "why"], rows)


def rollout_table(metrics: dict[str, Any]) -> Table:
    """Errors by autoregressive step."""
    rows: list[list[Any]] = []
    for name, regime in metrics["regimes"].items():
        for label, key in (("VRMSE", "rollout"), ("L2RE", "rollout_l2re")):
            for field, kinds in regime.get(key, {}).items():
                rows += [[name, f"{label} {field}", kind, *steps] for kind, steps in kinds.items()]
    return _by_step(["regime", "error", "of"], rows)


def _by_step(header: list[str], rows: list[list[Any]]) -> Table:
    longest, fixed = max(map(len, rows), default=0), len(header)
    steps = [f"step {i + 1}" for i in range(longest - fixed)]
    return Table([*header, *steps], [[*row, *[None] * (longest - len(row))] for row in rows])


def valid_time_table(metrics: dict[str, Any]) -> Table:
    """First step above the threshold of each field, with its interval and the share of rollouts that have none."""
    header = ["regime", "field", "of", "valid time (steps)", "95 % interval", "censored"]
    rows = [
        [name, field, of, value, interval_cell(r["intervals"]["valid_time"][field][of]), r["censored"][field][of]]
        for name, r in metrics["regimes"].items()
        for field, kinds in r.get("valid_time", {}).items()
        for of, value in kinds.items()
    ]
    return Table(header, rows)


def band_table(metrics: dict[str, Any]) -> Table:
    """Error by band over the truth's energy there, at the first and the last step."""
    rows = []
    for name, regime in metrics["regimes"].items():
        for step, by_measure in regime.get("bands", {}).items():
            for field, energies in by_measure["energy"].items():
                for band, energy in energies["truth"].items():
                    errors = [by_measure["error_energy"][field].get(of, {}).get(band) for of in KINDS]
                    shares = [e / energy if e is not None and energy else None for e in errors]
                    ratio = energies["model"][band] / energy if energy else None
                    rows.append([name, field, int(step), band, energy, ratio, *shares])
    header = ["regime", "field", "step", "band", "energy of truth", "energy of model / truth"]
    return Table([*header, *(f"error of {of} / truth" for of in KINDS)], rows)


def conserved_table(metrics: dict[str, Any]) -> Table:
    """Drift of the mean and the mean square of each field, the truth's own beside the model's."""
    rows = []
    for name, regime in metrics["regimes"].items():
        for label, key in (("mean", "drift_mean"), ("mean square", "drift_square")):
            for field, kinds in regime.get(key, {}).items():
                rows += [[name, f"{label} of {field}", of, *kinds[of]] for of in ("truth", "model") if of in kinds]
    return _by_step(["regime", "quantity", "of"], rows)


def routing_table(metrics: dict[str, Any]) -> Table:
    """Shares of each regime's tokens by expert, with U and NMI, layer by layer."""
    routing = metrics["routing"]
    header = ["layer", "U", "NMI", *(f"{regime}: share of each expert" for regime in routing["layers"][0]["shares"])]
    rows = []
    for number, layer in enumerate(routing["layers"]):
        shares = [" ".join(f"{s:.2f}" for s in row) for row in layer["shares"].values()]
        rows.append([number, layer["regime_information"], layer["nmi"], *shares])
    return Table(header, rows)


def _slice_rows(example: Any) -> list[tuple[str, Any, Any]]:
    return [(label, example.truth[i].numpy(), example.prediction[i].numpy()) for i, label in enumerate(example.labels)]


def draw(folder: RunFolder, evaluation: Evaluation) -> dict[str, Figure]:
    """Samples, and the training curve, by file stem."""
    drawn: dict[str, Figure] = {}
    for example in evaluation.examples:
        solid = None if example.solid is None else example.solid.numpy()
        drawn[f"slices_{example.regime}"] = figures.slices(example.regime, _slice_rows(example), solid)
    curve = figures.training_curve(read_metrics(folder.path / "metrics.jsonl"))
    return drawn if curve is None else {**drawn, "training": curve}


def headline(metrics: dict[str, Any]) -> Headline:
    """How many fields are forecast better than by persistence, and what the test set is too small for."""
    pairs = {
        f"{name}, {field}": (kinds["model"], kinds["persistence"])
        for name, regime in metrics["regimes"].items()
        for field, kinds in regime.get("vrmse", {}).items()
    }
    better = sum(model < persistence for model, persistence in pairs.values())
    counts = ", ".join(f"{n} of {name}" for name, n in metrics["trajectories"].items())
    text = [f"One step, {metrics['split']} split; trajectories: {counts}. {INTERVAL_NOTE}"]
    text += metrics["cannot_be_concluded"]
    shown = {f"VRMSE {label}": model for label, (model, _) in list(pairs.items())[:8]}
    verdict = f"Below persistence in {better} of {len(pairs)} fields"
    return Headline(verdict, "\n".join(text), "fair" if metrics["cannot_be_concluded"] else "neutral", shown)


def trajectory_table(evaluation: Evaluation) -> Table:
    """What every mean is made of: a row a trajectory, step and measure, and a column for what it is of."""
    keys = ["regime", "trajectory", "horizon", "step", "measure", "field", "shell", "windows"]
    frame = evaluation.trajectories
    wide = frame.pivot_table(index=keys, columns="of", values="value", dropna=False, observed=True, sort=False)
    wide = wide.dropna(how="all").reset_index()
    rows = wide.astype(object).where(wide.notna(), None).to_numpy().tolist()
    return Table([str(name) for name in wide.columns], rows)


def write_report(folder: RunFolder, evaluation: Evaluation) -> str:
    """Write ``RUN/report/`` (``metrics.json``, CSV and PNG files, ``index.html``); returns it as text."""
    metrics = {**evaluation.metrics, "published": SHODH_MOE, "env": describe_environment()}
    regimes = metrics["regimes"]
    first = next(iter(regimes.values()))
    published = has_published(metrics)
    notes = [ERROR_NOTE, f"Published: {SHODH_MOE['source']}. {SHODH_MOE['caveat']}" if published else ""]
    last = max(int(step) for r in regimes.values() for step in r.get("spectra", {"1": 0}))
    sections = [
        _section("errors", "Held-out errors", error_table(metrics), " ".join(notes).strip(),
                 trajectories_one_step=plots.strip(evaluation.trajectories, regimes)),
        _section("rollouts", "Rollouts", rollout_table(metrics), ROLLOUT_NOTE, rollout=plots.rollouts(regimes)),
        _section("valid_time", "Valid time", valid_time_table(metrics), ""),
        _section("spectra", "Spectra", band_table(metrics), SPECTRA_NOTE, spectra=plots.spectra(regimes, last)),
        _section("conserved", "Conserved quantities", conserved_table(metrics), CONSERVED_NOTE),
    ]  # fmt: skip
    if "divergence" in first:
        note = f"Operator: {first['divergence']['operator']}."
        note += f" Published: {SHODH_MOE['divergence_fp64']:.1e} (FP64)." if published else ""
        sections.append(_section("divergence", "Divergence of the decoded velocity", divergence_table(metrics), note))
    if metrics["routing"] is not None:
        shares = figures.expert_shares(metrics["routing"])
        sections.append(_section("routing", "Routing", routing_table(metrics), ROUTING_NOTE, expert_shares=shares))
    sections.append(_section("speed", "Speed of the training", speed_table(_stages(folder)), SPEED_NOTE))
    sections.append(_section("events", "Faults of the training", event_table(folder), EVENT_NOTE))
    known = [section for section in sections if section is not None]
    averaged = ", average of the weights" if metrics.get("weights") == "ema" else ""
    title = f"{folder.path.name}: checkpoint {metrics['checkpoint']}{averaged}, {metrics['split']} split"
    top = headline(metrics)
    rows = Section(
        "trajectories", "Rows", "Every number above can be computed again from these.",
        tables={"trajectories": trajectory_table(evaluation)}, files_only=("trajectories",),
    )  # fmt: skip
    pictures = Section(
        "figures", "Figures", "Held-out samples, in normalised fields.", figures=draw(folder, evaluation)
    )
    write_page(folder.report, title, top, [*known, pictures, rows], data=metrics, data_name="metrics.json")
    text = "\n\n".join(f"{s.title}\n{text_table(s.tables[s.key])}\n{s.text}" for s in known)
    return f"{title}\n{top.text}\n\n{text}\n"


def _stages(folder: RunFolder) -> dict[str, Path]:
    """Folders of the trainings that a model comes from."""
    config = folder.config()
    first = {"tokenizer": config.tokenizer_dir} if config.has_tokenizer else {}
    return {**first, "operator": folder.path}


def _section(key: str, title: str, table: Table, text: str, **drawn: Figure | None) -> Section | None:
    """None of a table without rows; its rows are shown whole."""
    section = filled(key, title, text, {key: table}, (), **drawn)
    return section and replace(section, rows_shown=ALL_ROWS)
