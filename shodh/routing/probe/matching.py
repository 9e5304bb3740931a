"""Which expert of one run plays the part of which expert of another."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy


class Match(NamedTuple):
    """A matching of ``min(E1, E2)`` pairs: ``first[i]`` with ``second[i]``, and how alike they are.

    ``chance`` is the mean over all pairs, which is what a random matching reaches on average.
    """

    first: np.ndarray
    second: np.ndarray
    values: np.ndarray
    chance: float

    @property
    def mean(self) -> float:
        return float(self.values.mean())


def match_experts(similarity: np.ndarray) -> Match:
    """The one-to-one matching with the largest total similarity ``[E1, E2]`` (Hungarian method); NaN counts as zero."""
    known = np.nan_to_num(similarity)
    first, second = scipy.optimize.linear_sum_assignment(known, maximize=True)
    return Match(first, second, known[first, second], float(known.mean()))


def assignment_overlap(joint: np.ndarray) -> np.ndarray:
    """Jaccard overlap of the sets of tokens that two runs' experts take, of `joint_counts`; 0 for two dead ones."""
    union = joint.sum(1, keepdims=True) + joint.sum(0, keepdims=True) - joint
    return joint / np.maximum(union, 1)


def agreement(joint: np.ndarray, match: Match) -> float:
    """Share of tokens that meet matched experts in both runs, of `joint_counts`."""
    return float(joint[match.first, match.second].sum() / max(joint.sum(), 1))
