"""What models of a mix make of the regimes that it leaves out, and whether fingerprints know that these are strange."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import gmean, spearmanr

from shodh.experiments.harness.results import mean, spread
from shodh.experiments.transfer.map.results import MapResults, Point, root_mean
from shodh.experiments.transfer.map.settings import DENSE
from shodh.report.page import Section, Table, filled
from shodh.report.statistics import compare

AXES = ["fields", "regimes", "width"]


def home(places: Mapping[str, Any], cluster: int) -> str:
    """The regime with the largest share of its samples in a cluster."""
    return max(places, key=lambda name: np.mean(np.array(places[name]["cluster"]) == cluster))


def nearest(values: Mapping[str, Any], regime: str) -> tuple[str, float]:
    """The trained regime in whose cluster most samples of an unseen one are, and their share."""
    clusters = values["unseen"]["places"][regime]["cluster"]
    ((cluster, count),) = Counter(clusters).most_common(1)
    return home(values["places"], cluster), count / len(clusters)


def prediction(values: Mapping[str, Any], samples: bool) -> float:
    """Spearman's correlation of distance and error over unseen regimes, or over all their samples."""
    errors, places = values["unseen"]["errors"], values["unseen"]["places"]
    distances = {name: places[name]["distance"] for name in errors}
    if samples:
        pairs = [np.concatenate([np.array(side[name], float) for name in errors]) for side in (distances, errors)]
    else:
        pairs = [np.array([np.median(distances[n]) for n in errors]), np.array([root_mean(errors[n]) for n in errors])]
    return float(spearmanr(*pairs).statistic)


def unseen_section(results: MapResults) -> Section | None:
    """Errors on regimes that a mix leaves out; the nearest trained regime by the router of fingerprints."""
    errors, strange, predicted = [], [], []
    for point in results.points:
        for arm in results.arms(point):
            seeds = {s: v for s, v in results.of(point, arm).items() if "unseen" in v}
            for regime in sorted({name for v in seeds.values() for name in v["unseen"]["errors"]}):
                own = [root_mean(v["unseen"]["errors"][regime]) for v in seeds.values()]
                errors.append([*point, arm, regime, len(own), *spread(own), _over_dense(results, point, seeds, regime)])
                if not all(v["unseen"]["places"] for v in seeds.values()):
                    continue
                found = Counter(nearest(v, regime)[0] for v in seeds.values()).most_common(1)[0]
                shares = [nearest(v, regime)[1] for v in seeds.values()]
                away = [float(np.median(v["unseen"]["places"][regime]["distance"])) for v in seeds.values()]
                strange.append([*point, arm, regime, found[0], found[1] / len(seeds), np.mean(shares), *spread(away)])
            if placed := [v for v in seeds.values() if v["unseen"]["places"]]:
                known = [np.median(p["distance"]) for v in placed for p in v["places"].values()]
                sides = [spread(prediction(v, samples) for v in placed) for samples in (False, True)]
                predicted.append([*point, arm, len(placed), float(np.median(known)), *sides[0], *sides[1]])
    ends = ["lowest", "highest"]
    tables = {
        "unseen_errors": Table([*AXES, "model", "regime", "seeds", "error", *ends, "over dense"], errors),
        "unseen_places": Table(
            [*AXES, "model", "regime", "nearest", "seeds agree", "share", "distance", "nearest one", "farthest"],
            strange,
        ),
        "unseen_prediction": Table(
            [*AXES, "model", "seeds", "distance of trained", "by regime", *ends, "by sample", "low", "high"], predicted
        ),
    }
    text = (
        "Regimes that the mix leaves out, without any training on them: errors over persistence's, mean, lowest and "
        "highest of seeds, and over the dense model's of the same seed. Nearest: the trained regime in whose cluster "
        "most samples are. Distances are squared, over the mean squared distance in training, so 1 is usual. Last, "
        "Spearman's correlation of distance and error, of regimes and of samples: samples of one regime are alike, so "
        "that those of regimes, which are few, are what counts. Estimates: no claims."
    )
    return filled("unseen", "Regimes that were not trained", text, tables)


def plasticity_section(results: MapResults) -> Section | None:
    """Errors of trained models, and of new ones, after a few steps on a regime that the mix leaves out."""
    rows = []
    for point in results.points:
        for arm in results.arms(point):
            seeds = [v["plasticity"] for v in results.of(point, arm).values() if "plasticity" in v]
            regimes = sorted({name for v in seeds for name in v["new"]})
            for some in [[name] for name in regimes] + [regimes] * (len(regimes) > 1):
                trained, new = ([gmean([root_mean(v[s][n]) for n in some]) for v in seeds] for s in ("trained", "new"))
                c = compare(trained, new)
                name = some[0] if len(some) == 1 else "all"
                rows.append([*point, arm, name, c.seeds, mean(trained), mean(new), c.ratio, *c.ends])
    header = [*AXES, "model", "regime", "seeds", "from the mix", "from new weights", "ratio", "t low", "t high"]
    text = (
        f"Errors over persistence's after {results.study.plasticity} steps on one regime that the mix leaves out, from "
        "the weights of the mix and from new ones, with the same samples and a new optimiser; geometric means of all "
        "regimes last, t intervals over seeds. Below 1: what was learned helps. Estimates: no claims."
    )
    return filled("plasticity", "Plasticity", text, {"plasticity": Table(header, rows)})


def _over_dense(results: MapResults, point: Point, seeds: Mapping[int, Any], regime: str) -> float | None:
    """Geometric mean over seeds that the dense model has too."""
    dense = results.of(point, DENSE)
    pairs = [
        root_mean(values["unseen"]["errors"][regime]) / root_mean(dense[seed]["unseen"]["errors"][regime])
        for seed, values in seeds.items()
        if "unseen" in dense.get(seed, {})
    ]
    return float(gmean(pairs)) if pairs and all(map(math.isfinite, pairs)) else None
