"""Clusters of fingerprints that are found while a model trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import scipy
import torch
from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.clusters import Clusters, k_medians
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.fingerprint import fingerprint_size
from shodh.moe.routers.operator import make_operator_gate
from shodh.moe.step import finish_step

FEATURES, KINDS, MEMORY = 7, 5, 160


def clouds(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples of five clouds in turn, and the cloud of each."""
    draw = torch.Generator().manual_seed(9)
    centres = torch.randn(KINDS, FEATURES, generator=draw)
    of = torch.arange(count) % KINDS
    noise = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    return centres[of] + 0.1 * noise, of


def make(memory: int = MEMORY) -> Clusters:
    clusters = Clusters(FEATURES, KINDS, memory)
    initialise(torch.nn.ModuleDict({"router": clusters}), 0)
    return clusters


def feed(clusters: Clusters, samples: Tensor, step: int = 8) -> Clusters:
    for rows in samples.split(step):
        if clusters.learns:
            clusters.observe(rows)
    return clusters


def test_every_cloud_gets_a_cluster_of_its_own_that_keeps_its_number() -> None:
    samples, of = clouds(400)
    clusters, seen = make(), []
    for start in range(0, 400, 8):
        if clusters.learns:
            clusters.observe(samples[start : start + 8])
        if clusters.found:
            seen.append(tuple(clusters(samples).argmax(1)[:KINDS].tolist()))
    assert not clusters.learns and clusters.seen == clusters.found == MEMORY
    assert sorted(seen[-1]) == list(range(KINDS)) and len(set(seen)) == 1
    new, of_new = clouds(50, seed=1)
    probabilities = clusters(new).softmax(-1)
    assert torch.equal(probabilities.argmax(1), torch.tensor(seen[-1])[of_new]) and probabilities.amax(1).min() > 0.99


def test_order_and_number_of_samples_a_step_do_not_matter_once_all_are_seen() -> None:
    samples, _ = clouds(MEMORY)
    shuffled = samples.view(-1, 8, FEATURES).flip(1).reshape(-1, FEATURES)  # As other ranks would have them.
    one, other = feed(make(), samples), feed(make(), shuffled)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


def test_a_copy_from_the_state_goes_on_bitwise() -> None:
    samples, _ = clouds(MEMORY)
    half = feed(make(), samples[:72])
    again = make()
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    for clusters in (half, again):
        feed(clusters, samples[72:])
    assert all(torch.equal(a, b) for a, b in zip(half.buffers(), again.buffers(), strict=True))


def test_choices_survive_a_cast_to_bf16() -> None:
    samples, _ = clouds(MEMORY)
    clusters = feed(make(), samples)
    before = clusters(samples).argmax(1)
    cast = copy.deepcopy(clusters).to(torch.bfloat16)
    assert torch.equal(cast(samples).argmax(1), before) and cast(samples).dtype == torch.float32


def test_fewer_different_samples_than_clusters_are_no_obstacle() -> None:
    centres, error = k_medians(torch.zeros(20, 3, dtype=torch.float64), 4)
    assert centres.shape == (4, 3) and error < 1e-9
    clusters = feed(make(KINDS * 4), torch.zeros(KINDS * 4, FEATURES))
    assert clusters(torch.zeros(2, FEATURES)).softmax(-1).isfinite().all()


def test_one_cluster_is_around_the_geometric_median() -> None:
    samples = torch.randn(41, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    (centre,), spread = k_medians(samples, 1)
    found = scipy.optimize.minimize(lambda c: (samples - torch.from_numpy(c)).norm(dim=1).sum().item(), samples.mean(0))
    assert torch.allclose(centre, torch.from_numpy(found.x), atol=1e-3)
    assert spread == pytest.approx(float((samples - centre).square().sum(1).mean()))


def test_outliers_of_one_cloud_do_not_take_the_cluster_of_another() -> None:
    """By squares it pays to give 5 outliers at 3 a centre, and to leave two clouds at .5 from each other together."""
    draw = torch.Generator().manual_seed(3)
    clouds = 0.02 * torch.randn(3, 60, 2, generator=draw, dtype=torch.float64)
    clouds += torch.tensor([[0.0, 0.0], [0.5, 0.0], [10.0, 0.0]], dtype=torch.float64).unsqueeze(1)
    clouds[2, :5, 1] += 3.0
    samples, outliers = clouds.flatten(0, 1), clouds[2, :5]

    def squares(centres: Tensor) -> float:
        return float(torch.cdist(samples, centres).amin(1).square().sum())

    together = torch.stack((clouds[:2].mean((0, 1)), clouds[2, 5:].mean(0), outliers.mean(0)))
    assert squares(together) < squares(clouds.mean(1)), "k-means would"
    centres, _ = k_medians(samples, 3)
    assert torch.allclose(centres[centres[:, 0].argsort()], clouds.median(1).values, atol=0.02)


@pytest.mark.parametrize("by", ["mlp", "clusters"])
def test_a_finished_step_feeds_the_clusters_until_they_are_full(by: str) -> None:
    router: dict[str, Any] = {"kind": "operator", "groups_by": by}
    config = ExpertsConfig(hidden=16, router={**router, **({"cluster_samples": 16} if by == "clusters" else {})})
    model = torch.nn.ModuleDict({"router": make_operator_gate(config, 2, 2), "layer": ExpertLayerReference(config, 16)})
    initialise(model, 0)
    draw, calls = torch.Generator().manual_seed(0), 0

    def fingerprints() -> Tensor:
        nonlocal calls
        calls += 1
        return torch.rand(8, fingerprint_size(2, 2), generator=draw)

    for _ in range(4):
        finish_step(model, config, lambda: pytest.fail("no counts are needed"), fingerprints)
    assert calls == (2 if by == "clusters" else 0)
    assert model["router"](fingerprints()).shape == (8, config.groups)
