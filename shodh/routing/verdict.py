"""The verdict on a router, and the thresholds it comes from; they stand here and nowhere else."""

from __future__ import annotations

from typing import NamedTuple

from shodh.report.page import Headline, Tone

SPECIALISED_U = 0.9  # the expert names the regime nearly always
PARTLY_U = 0.3
COLLAPSED_ENTROPY = 0.5  # of log E: 16 experts used as if they were 4, or 2 of which one takes 89 %

THRESHOLDS = (
    f"Thresholds on the means over layers: U of at least {SPECIALISED_U} is specialised, of at least {PARTLY_U} partly "
    f"specialised, both on few experts if the load entropy is under {COLLAPSED_ENTROPY} of its maximum; with a lower U "
    "such a load is collapsed, else balanced but unspecialised."
)


class LayerFigures(NamedTuple):
    """What the verdict looks at in one layer; ``u`` is None where regimes are unknown."""

    u: float | None
    entropy: float
    effective: float
    experts: int
    dead: int
    max_share: float


TONES: dict[str, Tone] = {
    "specialised": "good",
    "specialised on few experts": "fair",
    "partly specialised": "fair",
    "partly specialised on few experts": "fair",
    "balanced but unspecialised": "fair",
    "balanced, regimes unknown": "neutral",
    "collapsed": "bad",
    "one expert": "neutral",
}


def classify(u: float | None, entropy: float, experts: int) -> str:
    """The verdict for one layer, or for means over layers."""
    if experts < 2:
        return "one expert"
    if u is not None and u >= PARTLY_U:
        verdict = "specialised" if u >= SPECIALISED_U else "partly specialised"
        return verdict if entropy >= COLLAPSED_ENTROPY else f"{verdict} on few experts"
    if entropy < COLLAPSED_ENTROPY:
        return "collapsed"
    return "balanced, regimes unknown" if u is None else "balanced but unspecialised"


def decide(layers: dict[int, LayerFigures], source: str, bifurcation: dict[int, int | None]) -> Headline:
    """The headline of the page: verdict, reason, and the numbers that decided it."""
    values = list(layers.values())
    known = [v.u for v in values if v.u is not None]
    u = sum(known) / len(known) if len(known) == len(values) else None
    entropy = sum(v.entropy for v in values) / len(values)
    experts = max(v.experts for v in values)
    verdict = classify(u, entropy, experts)
    alike = sum(classify(v.u, v.entropy, v.experts) == verdict for v in values)
    dead, total = sum(v.dead for v in values), sum(v.experts for v in values)
    text = f"{_reason(verdict, u, entropy)} {alike} of {len(values)} layers by themselves are {verdict}."
    if dead:
        text += f" {dead} of {total} experts are dead."
    numbers: dict[str, object] = {} if u is None else {"U, mean of layers": round(u, 3)}
    if u is not None and len(values) > 1:
        numbers["U, lowest and highest layer"] = f"{min(known):.2f} to {max(known):.2f}"
    numbers["load entropy / maximum"] = round(entropy, 3)
    numbers["effective experts"] = f"{sum(v.effective for v in values) / len(values):.3g} of {experts}"
    numbers["largest share of one expert"] = f"{100 * max(v.max_share for v in values):.0f} %"
    numbers["dead experts"] = f"{dead} of {total}"
    if u is not None:
        steps = list(bifurcation.values())
        late = None if any(s is None for s in steps) else max(s for s in steps if s is not None)
        numbers[f"all layers above U {SPECIALISED_U} from step"] = "never" if late is None else late
    return Headline(verdict.capitalize(), text, TONES[verdict], numbers, note=f"From {source}. {THRESHOLDS}")


def _reason(verdict: str, u: float | None, entropy: float) -> str:
    load = f"The load entropy is {100 * entropy:.0f} % of its maximum."
    if u is None:
        return load
    told = f"The expert of a token tells {100 * max(u, 0.0):.0f} % of what there is to know about its regime (U)."
    return told if verdict in ("specialised", "partly specialised") else f"{told} {load}"
