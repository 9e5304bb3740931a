"""Reading the regime of a held-out sample off its routing alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Reading(NamedTuple):
    """How well the regime is read: ``confusion [true, read]`` counts; ``chance``, of the most frequent regime."""

    confusion: np.ndarray
    chance: float

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.confusion.sum())


def nearest_mean(fit: np.ndarray, labels: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Label whose mean routing distribution is nearest (Euclidean, as MoE-POT does), of ``[N, F]`` samples."""
    classes = np.unique(labels)
    means = np.stack([fit[labels == c].mean(0) for c in classes])
    return classes[np.square(samples[:, None] - means).sum(-1).argmin(1)]


def logistic(fit: np.ndarray, labels: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Label by multinomial logistic regression on standardised features; with one label in ``labels``, that one."""
    if len(np.unique(labels)) == 1:
        return np.full(len(samples), labels[0])
    # Imported here: they take seconds, and few who import this module classify.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(fit, labels).predict(samples)


CLASSIFIERS = {"nearest mean": nearest_mean, "logistic regression": logistic}


def read_regimes(
    fit: np.ndarray, fit_labels: np.ndarray, samples: np.ndarray, labels: np.ndarray, num_regimes: int
) -> dict[str, Reading]:
    """Every classifier fitted on some trajectories and tested on others; labels are ``0 .. num_regimes - 1``."""
    readings = {}
    counts = np.bincount(labels, minlength=num_regimes)
    for name, classify in CLASSIFIERS.items():
        read = classify(fit, fit_labels, samples)
        confusion = np.bincount(labels * num_regimes + read, minlength=num_regimes**2)
        readings[name] = Reading(confusion.reshape(num_regimes, num_regimes), float(counts.max() / counts.sum()))
    return readings
