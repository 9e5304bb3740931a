"""Results of runs made by hand, whose errors are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shodh.experiments.transfer.results import Result, Results

REGIMES = ("a", "b")


def point(step: int, errors: Mapping[str, float], measure: str = "field_l2re") -> dict[str, Any]:
    power = 2 if measure.endswith("mse") else 1
    return {"step": step, "errors": {r: {"model": 3 * e**power, "persistence": 3.0} for r, e in errors.items()}}


def result(
    model: str,
    seed: int,
    errors: Mapping[str, float],
    *,
    mix: str = "both",
    share: int = 1,
    flops: float = 1.0,
    steps: int = 4,
    curve: Sequence[Mapping[str, float]] | None = None,
    measure: str = "field_l2re",
    u: float | None = None,
) -> Result:
    """A finished run with these test errors (over persistence) and, at every step, these validation errors."""
    history = [point(i, e, measure) for i, e in enumerate(curve or [errors] * (steps + 1))]
    counts = {"a": [9, 1], "b": [1, 9]}
    layer = {"regime_information": u, "nmi": u, "counts": counts}
    values = {
        "run": {
            "name": f"{mix}-{model}-s{seed}",
            "model": model,
            "label": f"{model}{share if share > 1 else ''}",
            "mix": mix,
            "regimes": list(errors),
            "variant": {},
            "share": share,
            "seed": seed,
        },
        "steps": steps,
        "flops_per_step": flops,
        "seconds_per_step": 2.0 * flops,
        "top_k": 1,
        "total_parameters": 10,
        "active_parameters": 5,
        "measure": measure,
        "errors": point(0, errors, measure)["errors"],
        "history": [
            {**p, "cosines": {"rest": {"a ~ b": 0.5}}, "cosines_within": {"rest": {"a": 0.8}}} for p in history
        ],
        "plasticity": None,
        "evaluation": {
            "regimes": {
                r: {"rollout": {"u": {"model": [e, 2 * e], "persistence": [1.0, 2.0]}}} for r, e in errors.items()
            },
            "routing": None if u is None else {"num_experts": 2, "layers": [layer]},
        },
    }
    return Result(values)


def study_of(sparse: Sequence[float], dense: Sequence[float], **others: Sequence[float]) -> Results:
    """Errors by seed, the same in both regimes; specialists have an error of 1."""
    found = []
    for model, errors in {"sparse": sparse, "dense_active": dense, **others}.items():
        u = None if model.startswith("dense") else 0.5
        found += [result(model, s, dict.fromkeys(REGIMES, e), u=u) for s, e in enumerate(errors)]
    for regime in REGIMES:
        found += [result("specialist", s, {regime: 1.0}, mix=regime) for s in range(len(sparse))]
    return Results(found)
