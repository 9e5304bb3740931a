"""The page of a study: what all studies show alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shodh.experiments.harness.settings import StudySettings
from shodh.report.page import Headline, Section, Table, Tone, filled, records, text_table, write_page
from shodh.report.statistics import RULE, Comparison, Interval, Verdict
from shodh.train.run_folder import describe_environment

WORDS: dict[Verdict, str] = {"lower": "lower", "higher": "higher", "equal": "equal", "open": "undecided"}


@dataclass(frozen=True)
class Answer:
    """A verdict in a few words, the sentences that give its reasons, its tone, and the seeds it rests on."""

    verdict: str
    text: str
    tone: Tone
    seeds: int = 0


def over_trajectories(interval: Interval | None) -> list[str]:
    """The sentence on an interval over seeds and test trajectories; none without one."""
    if interval is None:
        return []
    return [f"Over seeds and test trajectories together the interval is {interval.low:.3f} to {interval.high:.3f}."]


def write_study(
    study: StudySettings,
    title: str,
    headline: Headline,
    sections: Sequence[Section | None],
    missing: Mapping[str, str],
    shown: Sequence[str],
    **data: Any,
) -> str:
    """Write ``<study>/report`` and return its top as text, with the tables whose stems are ``shown``.

    Parameters
    ----------
    missing : mapping
        Runs without a result, and why: named below, and in the JSON file.
    data
        What else the JSON file holds.
    """
    rows = [[name, reason] for name, reason in missing.items()]
    absent = filled("missing", "Runs without a result", GOES_ON, {"runs_missing": Table(["run", "why"], rows)})
    known = [section for section in (*sections, absent) if section is not None]
    content = {
        "study": study.name,
        "question": study.question,
        "settings": study.model_dump(mode="json"),
        **headline.record(),
        "missing": dict(missing),
        "env": describe_environment(),
        **data,
        **{section.key: {**records(section), **section.summary} for section in known if section is not absent},
    }
    write_page(study.folder / "report", title, headline, known, data=content)
    tables = {stem: (s.title, table) for s in known for stem, table in s.tables.items()}
    parts = [f"{tables[stem][0]}\n{text_table(tables[stem][1])}" for stem in shown if stem in tables]
    return "\n\n".join([f"{headline.verdict}.\n{headline.text}", *parts]) + "\n"


GOES_ON = "The same command goes on with them."


def claims_section(
    claims: Mapping[Any, Comparison],
    columns: Sequence[str],
    bootstrap: Callable[[Any], Interval | None] | None = None,
) -> Section | None:
    """Everything that a page claims, a row a claim; keys are rows of ``columns``.

    ``bootstrap`` is that of a claim over seeds and trajectories, where a study keeps the errors of each trajectory.
    """
    header = [*columns, "seeds", "ratio", "95 % low", "95 % high", "p", "p Holm", "p sign-flip", "lower in", "diverged"]
    rows = [
        [*key, c.seeds, c.ratio, c.low, c.high, c.p, c.p_holm, c.p_sign, c.wins, c.diverged, WORDS[c.verdict]]
        for key, c in claims.items()
    ]
    nested = "Nothing is said of other trajectories."
    if bootstrap is not None:
        rows = [[*row, *(bootstrap(key) or (None, None))] for row, key in zip(rows, claims, strict=True)]
        nested = "Nested: bootstrap over seeds and test trajectories, of errors on the test split."
    text = (
        "Errors of the first over those of the other, paired by seed. Intervals and p are over seeds; p is of what is "
        f"claimed. {nested} {RULE}"
    )
    shown = [*header, "verdict", *(["nested low", "nested high"] if bootstrap else [])]
    return filled("claims", "Claims", text, {"claims": Table(shown, rows)})
