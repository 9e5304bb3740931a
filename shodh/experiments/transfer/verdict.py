"""The two questions of a study, answered by rules from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from shodh.experiments.harness.report import WORDS, Answer, over_trajectories
from shodh.experiments.transfer.results import ROLLOUT, SPECIALIST, TEST, Claim, Results
from shodh.report.page import Tone
from shodh.report.statistics import MARGIN, Comparison, Verdict, brief, describe

Cause = Literal[
    "separation",
    "separation, not learned",
    "finer specialisation",
    "sharing between regimes",
    "capacity",
    "neither",
    "undecided",
    "not asked",
]
SAID: dict[Verdict, str] = {**WORDS, "equal": f"equal within {MARGIN:.0%}"}


def does_routing_help(results: Results, mix: str) -> Answer:
    """Sparse against dense of equal active size, and both against specialists."""
    sparse, dense = results.compared_sparse(mix), results.dense(mix)
    claim = Claim(mix, sparse or "", dense)
    against = results.claims.get(claim)
    if sparse is None or against is None:
        return Answer("Not asked", f"{mix}: no finished pair of sparse and {dense} with the same seed.", "neutral")
    text = [f"{describe(sparse, against, dense)}."]
    text += over_trajectories(results.bootstrap(claim))
    text += _other_readings(results, mix, sparse, dense)
    text += negative_transfer(results, mix, sparse, dense, against.verdict)
    total = results.claims.get(Claim(mix, sparse, "dense_total"))
    if total is not None:
        text.append(f"{describe(sparse, total, 'dense_total')}: {SAID[total.verdict]}.")
    verdicts: dict[Verdict, tuple[str, Tone]] = {
        "lower": ("Sparse routing lowers the error at equal active size", "good"),
        "higher": ("Dense wins at equal active size", "bad"),
        "equal": (f"No difference above {MARGIN:.0%} at equal active size", "fair"),
        "open": ("Undecided: no difference that these seeds can show", "fair"),
    }
    seeds = len(against.logs)
    return Answer(verdicts[against.verdict][0], "\n".join(text), verdicts[against.verdict][1], seeds)


def _other_readings(results: Results, mix: str, sparse: str, dense: str) -> list[str]:
    """One sentence on equal work, equal time and rollouts."""
    names = {"flops": "at equal work", "seconds": "at equal time", ROLLOUT: "on rollouts"}
    found = {name: results.claims.get(Claim(mix, sparse, dense, reading)) for reading, name in names.items()}
    parts = [f"{name} {brief(c)} ({SAID[c.verdict]})" for name, c in found.items() if c is not None]
    return [f"Other readings of the same runs: {', '.join(parts)}."] if parts else []


def transfer_by_regime(results: Results, mix: str, label: str) -> dict[str, Comparison]:
    """Transfer index of each regime: a mixed model against the specialist with as many steps, paired over seeds."""
    found = {r: results.claims.get(Claim(mix, label, SPECIALIST, TEST, r)) for r in results.regimes(mix)}
    return {regime: c for regime, c in found.items() if c is not None}


def transfer_in_mean(results: Results, mix: str, label: str) -> dict[str, Comparison]:
    """The geometric mean of the index over the regimes, against specialists with the same samples in as many steps."""
    found = results.claims.get(Claim(mix, label, results.equal_samples(mix)))
    return {} if found is None else {f"all {len(results.regimes(mix))} regimes in the mean": found}


def negative_transfer(results: Results, mix: str, sparse: str, dense: str, against: Verdict) -> list[str]:
    """Sentences: which regimes mixing harms without and with routing, and whether routing ends it.

    ``against`` is the verdict of sparse against dense.
    """
    without, routed = (transfer_by_regime(results, mix, label) for label in (dense, sparse))
    alone = "specialists with as many steps"
    if not without or not routed:
        without, routed = (transfer_in_mean(results, mix, label) for label in (dense, sparse))
        alone = "specialists with as many steps and the same samples"
    if not without or not routed:
        return []
    verdicts = [{regime: c.verdict for regime, c in by.items()} for by in (without, routed)]
    sentences = [_transfer_sentence(dense, without, alone), _transfer_sentence(sparse, routed, alone)]
    return [*sentences, conclude_transfer(verdicts[0], verdicts[1], against)]


def conclude_transfer(dense: dict[str, Verdict], sparse: dict[str, Verdict], against: Verdict) -> str:
    """Whether routing ends negative transfer, from the verdicts of each regime's index without and with routing."""
    harmed = [regime for regime, verdict in dense.items() if verdict == "higher"]
    still = [regime for regime, verdict in sparse.items() if verdict == "higher"]
    if not harmed and "open" in dense.values():
        return "Whether there is negative transfer without routing is undecided, and so is whether routing ends it."
    if not harmed:
        made = f", and with it there is, in {', '.join(still)}" if still else ""
        return f"Without routing there is no negative transfer to end{made}."
    if still:
        return f"Routing does not end negative transfer{', but lessens it' if against == 'lower' else ''}."
    if all(sparse.get(regime) in ("lower", "equal") for regime in harmed):
        return "Routing ends negative transfer."
    return "Whether routing ends negative transfer is undecided."


def _transfer_sentence(label: str, by_regime: Mapping[str, Comparison], alone: str) -> str:
    words: dict[Verdict, str] = {"higher": "harm", "lower": "gain", "equal": "neither", "open": "undecided"}
    parts = [f"{regime} {c.ratio:.3f} ({words[c.verdict]})" for regime, c in by_regime.items()]
    return f"Transfer index of {label} against {alone}: {', '.join(parts)}."


def what_lowers_the_error(results: Results, mix: str) -> tuple[Cause, str]:
    """Is separation of regimes what lowers the error, or finer specialisation, or neither?

    In this order: without a sparse model, a dense one, an oracle (which separates perfectly) and hash routing (which
    has the weights and separates nothing), it is not asked. If the learned router is not better than dense, then
    separation lowers the error and is not learned where the oracle is better than dense, and neither does where it is
    not. If the learned router is not better than hash: capacity, weights without meaning. If it is better than the
    oracle: finer specialisation; or sharing of experts between regimes, where the oracle has several for each and
    chooses among them. If it is equal to, or worse than the oracle: separation. Otherwise undecided.
    """
    sparse, dense = results.compared_sparse(mix), results.dense(mix)
    if sparse is None:
        return "not asked", "no learned router in this mix"
    found = {other: results.claims.get(Claim(mix, sparse, other)) for other in (dense, "sparse_hash", "sparse_oracle")}
    against, hashed, oracle = found.values()
    bound = results.claims.get(Claim(mix, "sparse_oracle", dense))
    if against is None or hashed is None or oracle is None or bound is None:
        missing = [other for other, c in found.items() if c is None] or [f"sparse_oracle and {dense} with one seed"]
        return "not asked", f"{mix}: needs finished runs of {', '.join(missing)}"
    reasons = [f"{brief(c)} that of {other} ({SAID[c.verdict]})" for other, c in found.items() if c is not None]
    reasons.append(f"and that of sparse_oracle {brief(bound)} that of {dense} ({SAID[bound.verdict]})")
    chooses = oracle_chooses(results, mix)
    if chooses:
        reasons.append("sparse_oracle has several experts for each regime and learns to choose among them")
    cause = decide_cause(against.verdict, hashed.verdict, oracle.verdict, bound.verdict, chooses)
    return cause, f"{mix}: the error of {sparse} is {', '.join(reasons)}"


def oracle_chooses(results: Results, mix: str) -> bool:
    """Whether a regime's group of the oracle has more experts than a token meets."""
    return any(
        int(r.values["evaluation"]["routing"]["num_experts"]) > len(r.regimes) * int(r.values["top_k"])
        for r in results.of(mix, "sparse_oracle")
    )


def decide_cause(dense: Verdict, hashed: Verdict, oracle: Verdict, bound: Verdict, chooses: bool = False) -> Cause:
    """The rule of `what_lowers_the_error`.

    The first three are verdicts of the learned router against each, ``bound`` is that of the oracle against dense.
    """
    if dense in ("higher", "equal"):
        of_bound: dict[Verdict, Cause] = {"lower": "separation, not learned", "open": "undecided"}
        return of_bound.get(bound, "neither")
    if dense == "open" or hashed == "open":
        return "undecided"
    if hashed in ("higher", "equal"):
        return "capacity"
    if oracle == "lower":
        return "sharing between regimes" if chooses else "finer specialisation"
    return "separation" if oracle in ("higher", "equal") else "undecided"
