"""The whole analysis of a trace."""

from __future__ import annotations

from shodh.report.page import Headline, Section, Table
from shodh.routing.reading import Trace
from shodh.routing.sections import fingerprint_section, headline, load_section, specialisation_section
from shodh.routing.structure import stability_section, structure_section
from shodh.routing.view import View, make_view


def analyse(trace: Trace, split: str | None = None) -> tuple[Headline, list[Section]]:
    """Verdict and sections of a trace.

    Parameters
    ----------
    split : str, optional
        The split to analyse; by default held-out samples where they are traced, else training batches.

    Raises
    ------
    DataError
        The trace has no such split.
    """
    view = make_view(trace, split)
    parts = (specialisation_section, load_section, fingerprint_section, stability_section, structure_section)
    return headline(view), [*(part(view) for part in parts), trace_section(view)]


def trace_section(view: View) -> Section:
    """What was read."""
    tables = view.trace.tables
    facts = {
        "files": len(view.trace.files),
        "records": tables.records,
        "last step": tables.last_step,
        "splits": ", ".join(tables.splits),
        "regimes": ", ".join(tables.regimes) if view.trace.labelled else "not in the trace",
        "steps in one point of a curve": tables.width,
        "validations with sample records": len(view.trace.samples.steps(view.split)),
    }
    notes = " ".join(view.trace.notes) or "Nothing was missing or damaged."
    return Section(
        "trace", "The trace", notes, facts, {"trace": Table(["what", "value"], list(map(list, facts.items())))}
    )
