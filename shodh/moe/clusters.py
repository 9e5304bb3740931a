"""Clusters of fingerprints, found while a model trains: k-medians without a label and without a gradient."""

from __future__ import annotations

import scipy
import torch
from torch import Tensor, nn

from shodh.core.seeding import Key, generator

TRIES, ROUNDS, CANDIDATES = 20, 50, 4
NEAR = 1e-3  # of the spread of all samples
FIRST = 4  # samples a cluster, before clusters are found for the first time


class Clusters(nn.Module):
    """``forward(x [B, F]) -> [B, G]``: log-probability that a sample is of each cluster.

    All clusters are taken to be as wide as their mean, in all directions. They are found of the samples seen so far,
    again whenever there are twice as many, and last of ``memory`` samples; then they stay. A cluster that is found
    again keeps its number. All that is known is in buffers, so in checkpoints.
    """

    def __init__(self, features: int, clusters: int, memory: int) -> None:
        super().__init__()
        for name, shape in (
            ("centres", (clusters, features)),
            ("spread", (1,)),  # Mean squared distance to the nearest centre.
            ("samples", (memory, features)),
            ("seen", (1,)),  # How many rows of the samples are filled, and of how many clusters were found last.
            ("found", (1,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.centres: Tensor
        self.spread: Tensor
        self.samples: Tensor
        self.seen: Tensor
        self.found: Tensor
        self._full = False

    def seeded_reset(self, *key: Key) -> None:
        """Arbitrary centres, until samples have been seen."""
        self.centres.copy_(torch.empty(self.centres.shape).normal_(0.0, 0.3, generator=generator(*key, "centres")))
        self.spread.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return (self.distances(x) * (-0.5 * x.shape[1] / self.spread.float())).log_softmax(-1)

    def distances(self, x: Tensor) -> Tensor:
        """Squared distance of each sample to each centre, ``[B, G]``."""
        return (x.float().unsqueeze(1) - self.centres.float()).square().sum(-1)

    @property
    def learns(self) -> bool:
        """Whether it has room for samples; the same on all ranks. Reads from the device until there is none."""
        self._full = self._full or int(self.seen) >= len(self.samples)
        return not self._full

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the samples of a step, of all ranks, in any order that is the same on all of them."""
        first = int(self.seen)
        # By their values, because ranks and micro-batches order them otherwise.
        taken = x[x.double().sum(1).argsort()][: len(self.samples) - first].float()
        self.samples[first : first + len(taken)] = taken
        self.seen += len(taken)
        count, groups = first + len(taken), len(self.centres)
        if count < FIRST * groups or (count < 2 * int(self.found) and count < len(self.samples)):
            return
        centres, spread = k_medians(self.samples[:count].double().cpu(), groups)
        if self.found:
            old, new = scipy.optimize.linear_sum_assignment(torch.cdist(self.centres.double().cpu(), centres).numpy())
            centres = centres[torch.from_numpy(new)[torch.from_numpy(old).argsort()]]
        self.centres.copy_(centres)
        self.spread.fill_(max(spread, 1e-12))
        self.found.fill_(count)


def k_medians(samples: Tensor, clusters: int) -> tuple[Tensor, float]:
    """Centres ``[G, F]`` of samples ``[N, F]`` and the mean squared distance to the nearest; the best of 20 tries.

    What is least is the sum of distances, not of their squares, of which a few outliers make most: k-means gave the
    outliers of one equation the centre that another needed. A centre is the geometric median of its samples, by
    Weiszfeld's rounds. Each centre to start from is the best of four that are drawn by distance (greedy k-means++,
    Arthur and Vassilvitskii, SODA 2007); an empty cluster stays where it is.
    """
    best: tuple[float, Tensor] | None = None
    near = max(NEAR * float(samples.std(0, correction=0).norm()), 1e-12)  # Below it a distance counts as this one.
    for attempt in range(TRIES):
        draw = generator("clusters", attempt)
        centres = samples[torch.randint(len(samples), (1,), generator=draw)]
        while len(centres) < clusters:
            nearest = torch.cdist(samples, centres).amin(1) + 1e-12
            candidates = samples[torch.multinomial(nearest, CANDIDATES, replacement=True, generator=draw)]
            left = torch.minimum(torch.cdist(candidates, samples), nearest).sum(1)
            centres = torch.cat((centres, candidates[left.argmin()].unsqueeze(0)))
        for _ in range(ROUNDS):
            distance, of = torch.cdist(samples, centres).min(1)
            weights = torch.nn.functional.one_hot(of, clusters) / distance.clamp(min=near).unsqueeze(1)
            total = weights.sum(0).unsqueeze(1)
            moved = torch.where(total > 0, weights.T @ samples / total.clamp(min=1e-300), centres)
            still = float((moved - centres).abs().max()) < NEAR * near
            centres = moved
            if still:
                break
        error = float(torch.cdist(samples, centres).amin(1).mean())
        if best is None or error < best[0]:
            best = (error, centres)
    assert best is not None
    return best[1], float(torch.cdist(samples, best[1]).amin(1).square().mean())
