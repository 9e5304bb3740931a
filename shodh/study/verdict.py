"""The two questions of a study, answered by rules from its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shodh.analysis.comparison import LEVEL, MARGIN, MIN_SEEDS, Comparison, brief, compare, describe
from shodh.analysis.page import Tone
from shodh.study.results import TEST, Result, Results, geometric_mean

RULE = (
    f"A model has a lower error if the paired t test over seeds gives p < {LEVEL} and the geometric mean of the "
    f"regimes' errors differs by more than {MARGIN:.0%}; the errors are equal if the 95 % interval of their ratio lies "
    f"within {MARGIN:.0%} of 1; all else, and all with fewer than {MIN_SEEDS} seeds, is undecided."
)

Cause = Literal["separation", "finer specialisation", "capacity", "neither", "undecided", "not asked"]


@dataclass(frozen=True)
class Answer:
    """A verdict in a few words, and the sentences that give its reasons."""

    verdict: str
    text: str
    tone: Tone


def paired(results: Results, mix: str, label: str, other: str, reading: str = TEST) -> Comparison | None:
    """One model against another on a mix, over the seeds that both have finished."""
    first, second = results.of(mix, label), results.of(mix, other)
    pairs = [
        (results.mean_error(first[s], reading), results.mean_error(second[s], reading)) for s in first if s in second
    ]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return compare([a for a, _ in known], [b for _, b in known]) if known else None


def best_sparse(results: Results, mix: str) -> str | None:
    """The learned router that is compared: ``sparse``, or the first of its variants in the order of the study."""
    return next((label for label in results.labels(mix) if label.split("-")[0] == "sparse"), None)


def index_comparison(results: Results, mix: str, label: str) -> Comparison | None:
    """A mixed model against the specialists with as many steps, geometric mean over the regimes, paired over seeds."""
    mixed, alone = [], []
    for result in results.of(mix, label).values():
        others = [results.specialist(regime, result.seed) for regime in result.regimes]
        ours = [result.test_error(regime) for regime in result.regimes]
        theirs = [None if s is None else s.test_error(r) for s, r in zip(others, result.regimes, strict=True)]
        known = [[e for e in errors if e is not None] for errors in (ours, theirs)]
        if all(len(errors) == len(result.regimes) for errors in known):
            mixed.append(geometric_mean(known[0]))
            alone.append(geometric_mean(known[1]))
    return compare(mixed, alone) if mixed else None


def does_routing_help(results: Results, mix: str) -> Answer:
    """Sparse against dense of equal active size, and both against specialists."""
    sparse = best_sparse(results, mix)
    against = None if sparse is None else paired(results, mix, sparse, "dense_active")
    if sparse is None or against is None:
        return Answer("Not asked", f"{mix}: no finished pair of sparse and dense_active with the same seed.", "neutral")
    text = [f"{describe(sparse, against, 'dense_active')}."]
    for label in ("dense_active", sparse):
        index = index_comparison(results, mix, label)
        if index is not None:
            text.append(f"{describe(label, index, 'its specialists')}: {_transfer_word(index)}.")
    verdicts: dict[str, tuple[str, Tone]] = {
        "lower": ("Sparse routing lowers the error", "good"),
        "higher": ("Dense wins at equal active size", "bad"),
        "equal": ("No difference at equal active size", "fair"),
        "open": ("Undecided: no difference that these seeds can show", "fair"),
    }
    total = paired(results, mix, sparse, "dense_total")
    if total is not None:
        text.append(f"{describe(sparse, total, 'dense_total')}.")
    return Answer(verdicts[against.verdict][0], " ".join(text), verdicts[against.verdict][1])


def _transfer_word(index: Comparison) -> str:
    words = {
        "higher": "negative transfer",
        "lower": "positive transfer",
        "equal": "no transfer",
        "open": "whether mixing harms or helps it is undecided",
    }
    return words[index.verdict]


def what_lowers_the_error(results: Results, mix: str) -> tuple[Cause, str]:
    """Is separation of regimes what lowers the error, or finer specialisation, or neither?

    In this order: without a sparse model, a dense one, an oracle (which separates perfectly and does nothing else) and
    hash routing (which has the weights and separates nothing), it is not asked. If the learned router is not better
    than dense: neither. If it is not better than hash: capacity, weights without meaning. If it is better than the
    oracle: finer specialisation. If it is equal to, or worse than the oracle: separation. Otherwise undecided.
    """
    sparse = best_sparse(results, mix)
    if sparse is None:
        return "not asked", "no learned router in this mix"
    others = ("dense_active", "sparse_hash", "sparse_oracle")
    found = {other: paired(results, mix, sparse, other) for other in others}
    missing = [other for other, c in found.items() if c is None]
    if missing:
        return "not asked", f"{mix}: needs finished cells of {', '.join(missing)}"
    dense, hashed, oracle = (c for c in found.values() if c is not None)
    reasons = ", ".join(brief(c, other) for other, c in found.items() if c is not None)
    return decide_cause(dense.verdict, hashed.verdict, oracle.verdict), f"{mix}: the error of {sparse} is {reasons}"


def decide_cause(dense: str, hashed: str, oracle: str) -> Cause:
    """The rule of `what_lowers_the_error`, from the verdicts of the learned router against each."""
    if dense in ("higher", "equal"):
        return "neither"
    if dense == "open":
        return "undecided"
    if hashed in ("higher", "equal"):
        return "capacity"
    if hashed == "open":
        return "undecided"
    if oracle == "lower":
        return "finer specialisation"
    return "separation" if oracle in ("higher", "equal") else "undecided"


def separation_and_error(results: Results) -> list[tuple[Result, float, float]]:
    """(result, U, mean error) of every sparse cell."""
    found = []
    for result in results.mixed:
        u, error = result.routing("regime_information"), results.mean_error(result)
        if u is not None and error is not None:
            found.append((result, u, error))
    return found
