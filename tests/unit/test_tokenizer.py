"""The tokenizer: mass is conserved for any weights, in every domain of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shodh.config import TokenizerConfig
from shodh.models.init import initialise
from shodh.models.tokenizer import PATCH, Tokenizer, relative_spacing
from shodh.ops import divergence
from shodh.schema.domain import Domain, add_walls, num_static_features, static_features
from shodh.schema.fields import Field
from shodh.train import tokenizer_weights

GRID = (16, 8, 24)
FIELDS = (Field("velocity", "vector", placement="face", solenoidal=True), Field("tracer", masked_by="solid"))
STATIC = (Field("solid", static=True),)
CHANNEL = Domain(("periodic", "periodic", "wall"), (2.0, 3.0, 1.0))
POROUS = Domain(("periodic", "periodic", "periodic"), (1.0, 1.0, 1.0))
DUCT = Domain(("periodic", "wall", "wall"), (5.0, 0.5, 1.0))
CLOSED = Domain(("wall", "wall", "wall"), (1.0, 1.0, 1.0))


def make(seed: int = 0, **settings: Any) -> Tokenizer:
    config = TokenizerConfig(latent_channels=6, widths=(8, 12, 16), head_channels=8, **settings)
    model = Tokenizer(config, FIELDS, STATIC)
    initialise(model, seed)
    with torch.no_grad():  # A mean flow of the size of the rest.
        model.decoder.head.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def batch(domains: list[Domain], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random fields, and geometry with solids and the walls of each sample's domain."""
    draw = torch.Generator().manual_seed(seed)
    fields = torch.randn(len(domains), 4, *GRID, generator=draw)
    solid = (torch.rand(len(domains), 1, *GRID, generator=draw) < 0.3).float()
    return fields, torch.cat([add_walls(solid[b : b + 1], d) for b, d in enumerate(domains)])


@pytest.mark.parametrize("domain", [CHANNEL, POROUS, DUCT, CLOSED], ids=["channel", "porous", "duct", "closed"])
@pytest.mark.parametrize("seed", [0, 1])
def test_decoded_velocity_is_divergence_free_in_double_precision_for_any_weights(domain: Domain, seed: int) -> None:
    model = make(seed)
    fields, geometry = batch([domain, domain], seed)
    emitted = model.emit(5 * model.encode(fields, geometry), geometry)
    decoded = model.assemble(emitted.double(), domain)
    velocity, spacing = decoded[:, :3], relative_spacing(domain, GRID)
    gradient = max(velocity.diff(dim=d + 2).abs().max() / spacing[d] for d in range(3))
    assert gradient > 0.1
    # The cell sizes of the file: the same field is divergence-free for any common factor.
    found = divergence(velocity, spacing=domain.spacing(GRID), boundary=domain.boundary).abs().max()
    assert found <= 1e-12 * gradient * spacing[0] / domain.spacing(GRID)[0]


def test_linear_part_sees_patches_from_everywhere_where_not_all_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place has a pattern of its own, and a frame gives one patch in sixteen: all patterns must be found."""
    grid, places = (16, 8, 64), 16
    model = Tokenizer(TokenizerConfig(latent_channels=places, widths=(4, 4, 4)), [Field("heat")], [])
    patches = torch.zeros(2 * 8, PATCH**3)
    patches[range(places), range(places)] = 1.0
    field = patches.view(2, 1, 8, PATCH, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(1, 1, *grid)
    item = {"fields": field, "static": torch.zeros(0, *grid)}
    monkeypatch.setattr(tokenizer_weights, "training_frames", lambda regimes, count: ((0, item) for _ in range(count)))
    regimes: Any = SimpleNamespace(sources=[SimpleNamespace(grid=grid)], space=SimpleNamespace(domains=[POROUS]))
    tokenizer_weights.fit_basis(model, regimes, frames=32, patches=32)
    head = torch.zeros(1, dtype=torch.long)
    torch.testing.assert_close(model.basis.decode(model.basis.encode(field, head), head), field, rtol=0, atol=1e-4)


@pytest.mark.parametrize("domain", [CHANNEL, DUCT, CLOSED], ids=["channel", "duct", "closed"])
def test_no_flow_crosses_a_wall(domain: Domain) -> None:
    model = make()
    fields, geometry = batch([domain])
    decoded = model.decode(model.encode(fields, geometry), geometry, [domain], torch.tensor([0]))
    for axis, boundary in enumerate(domain.boundary):
        on_last_face = decoded[:, axis].select(axis + 1, -1)
        assert bool((on_last_face == 0).all()) == (boundary == "wall")
    # Flow through a closed cross-section between two walls must vanish on average; along a periodic axis it need not.
    for axis, boundary in enumerate(domain.boundary):
        others = [d + 1 for d in range(3) if d != axis]
        flux = decoded[:, axis].mean(others)
        torch.testing.assert_close(flux, flux[:, :1].expand_as(flux), rtol=0, atol=1e-5)
        assert bool(flux.abs().max() > 1e-3) == (boundary == "periodic")


def test_exact_mode_stores_a_velocity_whose_divergence_is_bitwise_zero() -> None:
    cubes = Domain(("periodic", "periodic", "wall"), tuple(n / 8 for n in GRID))
    model = make()
    fields, geometry = batch([cubes])
    latent = model.encode(fields, geometry)
    largest = {}
    for exact in (False, True):
        decoded = model.decode(latent, geometry, [cubes], torch.tensor([0]), exact=exact)
        largest[exact] = divergence(decoded[:, :3], boundary=cubes.boundary).abs().max().item()
    assert largest[True] == 0.0 < largest[False]


def test_batch_of_several_domains_is_decoded_as_each_sample_alone() -> None:
    domains = [CHANNEL, POROUS, DUCT]
    index = torch.tensor([1, 0, 2, 1, 0])
    model = make()
    fields, geometry = batch([domains[i] for i in index])
    latent = model.encode(fields, geometry)
    together = model.decode(latent, geometry, domains, index)
    for b in range(len(index)):
        one = slice(b, b + 1)
        alone = model.decode(latent[one], geometry[one], domains, index[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
        assert not torch.equal(alone, model.decode(latent[one], geometry[one], domains, (index[one] + 1) % 3))


def test_samples_do_not_see_each_other() -> None:
    model = make()
    fields, geometry = batch([CHANNEL] * 3)
    latent = model.encode(fields, geometry)
    torch.testing.assert_close(model.encode(fields[[2, 0, 1]], geometry[[2, 0, 1]]), latent[[2, 0, 1]])


@pytest.mark.parametrize("strides", [(2, 2, 2), (4, 2), (8,), (2, 4)])
def test_latents_are_eight_times_smaller_along_every_axis(strides: tuple[int, ...]) -> None:
    config = TokenizerConfig(latent_channels=5, strides=strides, widths=(8, 12, 16)[: len(strides)])
    model = Tokenizer(config, FIELDS, STATIC)
    initialise(model, 0)
    fields, geometry = batch([CHANNEL])
    reconstruction, latent = model(fields, geometry, [CHANNEL], torch.tensor([0]))
    assert latent.shape == (1, 5, 2, 1, 3) and reconstruction.shape == fields.shape
    reconstruction.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_latent_statistics_normalise_and_are_undone_by_the_decoder() -> None:
    model = make()
    fields, geometry = batch([CHANNEL, CHANNEL])
    raw = model.encode(fields, geometry)
    before = model.decode(raw, geometry, [CHANNEL], torch.tensor([0, 0]))
    model.latent_mean.copy_(raw.mean((0, 2, 3, 4)))
    model.latent_std.copy_(raw.std((0, 2, 3, 4)))
    latent = model.encode(fields, geometry)
    torch.testing.assert_close(latent.mean((0, 2, 3, 4)), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(latent.std((0, 2, 3, 4)), torch.ones(6))
    after = model.decode(latent, geometry, [CHANNEL], torch.tensor([0, 0]))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_half_precision_model_still_decodes_in_float32() -> None:
    model = make()
    fields, geometry = batch([CHANNEL])
    exact, _ = model(fields, geometry, [CHANNEL], torch.tensor([0]))
    decoded, latent = model.to(torch.bfloat16)(fields, geometry, [CHANNEL], torch.tensor([0]))
    assert decoded.dtype == latent.dtype == torch.float32
    spacing = relative_spacing(CHANNEL, GRID)
    found = divergence(decoded[:, :3], spacing=spacing, boundary=CHANNEL.boundary).abs().max()
    assert found < 1e-4 * exact[:, :3].abs().max()
    assert (decoded - exact).norm() < 0.1 * exact.norm()


def test_walls_are_marked_on_both_sides_of_walled_axes_alone() -> None:
    static = torch.rand(2, 1, 4, 5, 6)
    geometry = add_walls(static, CHANNEL)
    assert geometry.shape == (2, 4, 4, 5, 6) and torch.equal(geometry[:, :1], static)
    assert geometry[:, 1:3].abs().sum() == 0
    assert torch.equal(geometry[:, 3].mean((0, 1, 2)), torch.tensor([1.0, 0, 0, 0, 0, 1.0]))


def test_static_features_keep_every_quarter_cell_mean() -> None:
    geometry = torch.rand(2, 4, *GRID)
    features = static_features(geometry)
    assert features.shape == (2, num_static_features(1), 2, 1, 3)
    channel, cell, corner = 2, (1, 0, 2), (1, 0, 1)
    start = [8 * c + 4 * k for c, k in zip(cell, corner, strict=True)]
    block = geometry[1, channel, *(slice(s, s + 4) for s in start)]
    index = 8 * channel + 4 * corner[0] + 2 * corner[1] + corner[2]
    torch.testing.assert_close(features[1, index, *cell], block.mean())


def test_domain_survives_json() -> None:
    assert Domain.from_dict(CHANNEL.to_dict()) == CHANNEL
    x, y, z = relative_spacing(DUCT, GRID)
    assert x * y * z == pytest.approx(1.0) and x / y == pytest.approx((5.0 / 16) / (0.5 / 8))
