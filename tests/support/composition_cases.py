"""Results of a composition study as an evaluation would leave them, with errors that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from known_family import known_study

from shodh.experiments.composition.results import Results, SeedResult
from shodh.experiments.composition.runs import make
from shodh.experiments.composition.settings import CCMConfig
from shodh.merge import coordinate
from shodh.merge.readout import BANK

#: (method, value, role, seed) -> error
Errors = Callable[[str, float, str, int], float | None]
#: (method, value) -> coordinate
Alphas = Callable[[str, float], float]

LOW, HIGH = 1e-3, 4e-3
FAMILY = {
    "low": LOW,
    "high": HIGH,
    "support": (LOW, HIGH),
    "interpolation": (2e-3,),
    "extrapolation": (5e-4, 8e-3),
    "validation": (LOW,),
}
ALONG = (
    "coord",
    "coord_log",
    "scale",
    "scale_wide",
    "prefix",
    "prefix_wide",
    "line_search",
    "gradient",
    "oracle",
    "wrong_sign",
)
COMPOSED = {*ALONG, "prefix_each", "gradient_by_layer"} - {"wrong_sign"}


def case_study(root: Path, **changes: Any) -> CCMConfig:
    """A study of three seeds whose values are those of the cases."""
    return known_study(root, **{"family": FAMILY, "seeds": 3, **changes})


def plain_errors(method: str, value: float, role: str, seed: int) -> float:
    """Composition halves the anchor's error outside the support; experts are better than the anchor at their ends."""
    jitter = 1 + 0.01 * seed
    if method == "low":
        return jitter * (0.5 if value <= LOW else 2.0)
    if method == "high":
        return jitter * (0.5 if value >= HIGH else 2.0)
    if method in COMPOSED:
        return jitter * (0.4 if role == "extrapolation" else 0.2)
    return (
        jitter
        * {"anchor": 1.0, "average": 0.9, "persistence": 3.0}.get(method, 1.5)
        * (0.8 if role == "extrapolation" else 0.4)
    )


def plain_alpha(method: str, value: float) -> float:
    """The logarithmic coordinate, rounded to the bank by those that try it."""
    alpha = coordinate(value, LOW, HIGH, "log")
    return max(-1.5, min(1.5, round(4 * alpha) / 4 if method in ("oracle", "prefix") else alpha))


def seed_result(
    study: CCMConfig,
    seed: int,
    errors: Errors = plain_errors,
    alphas: Alphas = plain_alpha,
    *,
    cosine: float = 0.1,
    sparse: bool = False,
    scale: str = "log",
) -> dict[str, Any]:
    """What ``seedN.json`` holds."""

    def method(name: str, value: float, role: str) -> dict[str, Any]:
        error = errors(name, value, role, seed)
        alpha: float | list[float] | None = alphas(name, value) if name in ALONG else None
        if name == "prefix_each":
            alpha = [alphas(name, value)] * 3
        steps = [error if error is None else error * (0.5 + 0.25 * n) for n in range(3)]
        return {
            "error": error,
            "by_step": steps,
            "by_trajectory": [error] * 3,
            "alpha": alpha,
            "forward": 13 if name == "prefix" else 0,
            "backward": 0,
            "networks": 2 if name == "ensemble" else 1,
        }

    values = []
    for value in study.family.values:
        role = study.family.role_of(value)
        bank = {"alphas": list(BANK), "observed": [1 + a * a for a in BANK], "later": [2 + a * a for a in BANK]}
        methods = {m: method(m, value, role) for m in study.methods if m != "gradient_by_expert" or sparse}
        values.append({"value": value, "role": role, "trajectories": 3, "methods": methods, "bank": bank})
    return {
        "run": {"name": f"seed{seed}-evaluate", "seed": seed},
        "identity": make(study, seed, None).identity(),
        "parameter": {"name": "viscosity", "low": study.family.low, "high": study.family.high},
        "history": 2,
        "chosen": {
            "line": {"scale": scale, "gamma": 0.9, "loss": 0.3, "losses": {"log": 0.3}},
            "scalings": {"ties": 0.5},
            "rate": 1e-3,
            "losses": {},
        },
        "values": values,
        "diagnostics": {"updates": _updates(cosine), "routing": _routing() if sparse else None},
    }


def _updates(cosine: float) -> dict[str, Any]:
    def part(share: float) -> dict[str, Any]:
        return {
            "parameters": 10,
            "cosine": cosine,
            "relative_direction": 0.05,
            "direction_norm": 2.0,
            "shared_norm": 1.0,
            "share_of_direction": share,
            "share_of_shared": share,
        }

    return {
        "total": part(1.0),
        "components": {"attention or mixing": part(0.75), "output": part(0.25)},
        "layers": {"operator.blocks.0": part(0.75), "operator.head": part(0.25)},
        "experts": [],
    }


def _routing() -> dict[str, Any]:
    changes = [[abs(a) / 10 for a in BANK], [abs(a) / 5 for a in BANK]]
    return {"alphas": list(BANK), "divergence": changes, "moved": changes}


def results_of(study: CCMConfig, **changes: Any) -> Results:
    """Of every seed of a study."""
    return Results([SeedResult(seed_result(study, seed, **changes)) for seed in range(study.seeds)])


def write_results(study: CCMConfig, **changes: Any) -> None:
    """The files that an evaluation leaves."""
    for seed in range(study.seeds):
        path = study.results_file(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(seed_result(study, seed, **changes)))
