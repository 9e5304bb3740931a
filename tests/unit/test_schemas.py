"""Regimes with different fields in one model: what is absent is seen, and never counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shodh.config import TokenizerConfig, TokenizerLoss, config_from_dict
from shodh.core.errors import ConfigError, DataError
from shodh.models.basis import PATCH, PatchBasis, SchemaBasis
from shodh.models.factory import build_operator, build_tokenizer
from shodh.models.init import initialise
from shodh.models.tokenizer import Tokenizer, keep_above, relative_spacing
from shodh.ops import divergence
from shodh.schema.domain import Domain, add_walls, existing_channels, num_static_features, static_features
from shodh.schema.fields import Field, RegimeSchema
from shodh.train.losses import reconstruction_loss, reconstruction_terms, weigh_fields
from shodh.train.operator_task import mean_changes

GRID = (16, 8, 16)
DYNAMIC = (
    Field("velocity", "vector", placement="face", solenoidal=True, optional=True),
    Field("magnetic_field", "vector", placement="face", solenoidal=True, optional=True),
    Field("dye", positive=True, optional=True),
)
STATIC = (Field("solid", static=True, optional=True),)
SCHEMAS = (("velocity", "dye", "solid"), ("velocity", "magnetic_field"), ("dye",))


def domain(schema: tuple[str, ...], **settings: Any) -> Domain:
    presence = tuple((f.name, f.name in schema) for f in (*DYNAMIC, *STATIC))
    return Domain(("periodic", "periodic", "wall"), (2.0, 1.0, 1.0), presence, **settings)


DOMAINS = [domain(schema) for schema in SCHEMAS]


@pytest.fixture(scope="module")
def model() -> Tokenizer:
    config = TokenizerConfig(latent_channels=6, strides=(4, 2), widths=(8, 16), head_channels=8)
    tokenizer = Tokenizer(config, DYNAMIC, STATIC, SCHEMAS)
    initialise(tokenizer, 0)
    draw = torch.Generator().manual_seed(0)
    for basis in tokenizer.basis.heads.values():
        assert isinstance(basis, PatchBasis)
        basis.weight.normal_(std=(basis.channels * PATCH**3) ** -0.5, generator=draw)
    tokenizer.latent_std.uniform_(0.5, 2.0, generator=draw)
    tokenizer.latent_mean.normal_(generator=draw)
    return tokenizer


def batch(index: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised fields, zero where absent, and geometry."""
    draw = torch.Generator().manual_seed(seed)
    fields = torch.randn(len(index), 7, *GRID, generator=draw)
    for row, i in enumerate(index):
        keep = torch.zeros(7)
        for s in existing_channels(DYNAMIC, DOMAINS[i]).values():
            keep[s] = 1
        fields[row] *= keep.view(-1, 1, 1, 1)
    geometry = [add_walls(torch.zeros(1, 1, *GRID), DOMAINS[i]) for i in index]
    return fields, torch.cat(geometry)


def test_absent_is_not_zero(model: Tokenizer) -> None:
    """The same zeros give other latents when the field exists: its presence is seen."""
    _, geometry = batch([0, 1, 2])
    with torch.no_grad():
        latents = model.encode(torch.zeros(3, 7, *GRID), geometry)
    assert min(float((latents[a] - latents[b]).abs().max()) for a, b in ((0, 1), (1, 2), (0, 2))) > 0.1
    features = static_features(geometry)
    assert features.shape[1] == num_static_features(1, 4)
    assert not torch.equal(features[0], features[1])


def test_absent_channels_leave_as_zeros_and_the_rest_is_decoded_as_alone(model: Tokenizer) -> None:
    index = [1, 0, 2, 1]
    fields, geometry = batch(index)
    with torch.no_grad():
        together, latent = model(fields, geometry, DOMAINS, torch.tensor(index))
        for row, i in enumerate(index):
            one = slice(row, row + 1)
            alone, code = model(fields[one], geometry[one], DOMAINS, torch.tensor([i]))
            torch.testing.assert_close(latent[one], code, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
            there = {c for s in existing_channels(DYNAMIC, DOMAINS[i]).values() for c in range(s.start, s.stop)}
            for channel in range(7):
                assert bool(together[row, channel].any()) == (channel in there)


def test_two_solenoidal_fields_are_decoded_exactly(model: Tokenizer) -> None:
    fields, geometry = batch([1])
    with torch.no_grad():
        decoded = model.assemble(model.emit(model.encode(fields, geometry), geometry).double(), DOMAINS[1])
    spacing = relative_spacing(DOMAINS[1], GRID)
    for name, s in existing_channels(DYNAMIC, DOMAINS[1]).items():
        gradient = decoded[:, s].diff(dim=2).abs().max()
        found = divergence(decoded[:, s], spacing=spacing, boundary=DOMAINS[1].boundary).abs().max()
        assert gradient > 0.1 and found <= 1e-12 * gradient, name


def test_a_combination_of_fields_that_no_regime_has_is_refused(model: Tokenizer) -> None:
    other = domain(("velocity",))
    geometry = add_walls(torch.zeros(1, 1, *GRID), other)
    with pytest.raises(ConfigError, match=r"just \['velocity'\]"):
        model.encode(torch.zeros(1, 7, *GRID), geometry)


def test_each_set_of_fields_has_the_best_basis_of_its_own() -> None:
    basis = SchemaBasis({"a": [0], "b": [1, 2]}, 3, 4)
    draw = torch.Generator().manual_seed(1)
    fields = torch.zeros(6, 3, *GRID)
    head = torch.tensor([0, 1, 1, 0, 0, 1])
    for number, part in enumerate(basis.heads.values()):
        assert isinstance(part, PatchBasis)
        size = part.channels * PATCH**3
        low_rank = torch.randn(60, 4, generator=draw) @ torch.randn(4, size, generator=draw)
        part.fit(low_rank)
        cells = low_rank[: 3 * 4].view(3, 2, 1, 2, part.channels, PATCH, PATCH, PATCH).permute(0, 4, 1, 5, 2, 6, 3, 7)
        fields[(head == number).nonzero(), basis.channels[number]] = cells.reshape(3, part.channels, *GRID)
    heads = head.tolist()
    torch.testing.assert_close(basis.decode(basis.encode(fields, heads), heads), fields, rtol=0, atol=1e-3)


@pytest.mark.parametrize("floor", [0.0, -2.5])
def test_positive_map_is_smooth_increasing_unbiased_away_from_zero_and_invertible(floor: float) -> None:
    width = 0.01
    z = torch.linspace(-3, 3, 60001, dtype=torch.float64)[z_nonzero(floor)]
    values = (z + floor).requires_grad_()
    kept = keep_above(values, floor)
    assert bool((kept > floor).all()) and bool((kept.diff() > 0).all())
    far = z >= width
    assert torch.equal(kept[far], values[far]), "what is not near zero must pass unchanged, to the bit"
    near = (z >= 0) & ~far
    assert float((kept - values)[near].detach().abs().max()) <= width / 2 + 1e-12
    p = (kept - floor)[~far]
    torch.testing.assert_close(2 * width - width**2 / p, z[~far], rtol=1e-6, atol=1e-9)
    (slope,) = torch.autograd.grad(kept.sum(), values)
    assert float(slope.diff().abs().max()) < 0.05, "the slope has no jump"
    assert float(slope[0]) > 0, "however far below zero, the gradient leads back"


def z_nonzero(floor: float) -> Tensor:
    """Rows whose value is not exactly zero (such a value does not exist, see the next test)."""
    z = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    return (z + floor) != 0


@pytest.mark.parametrize("name", ["values", "type", "float"])
def test_field_may_have_a_name_that_modules_use_themselves(name: str) -> None:
    model = Tokenizer(TokenizerConfig(latent_channels=2, widths=(4, 4, 4)), [Field(name)], [])
    geometry = add_walls(torch.zeros(1, 0, *GRID), Domain(("wall", "wall", "wall"), (1.0, 1.0, 1.0)))
    assert model.encode(torch.zeros(1, 1, *GRID), geometry).shape == (1, 2, 2, 1, 2)


def test_positive_field_that_does_not_exist_in_solids_stays_zero_there() -> None:
    values = torch.tensor([0.0, -1.0, 0.5])
    kept = keep_above(values, 0.0)
    assert kept[0] == 0 and 0 < kept[1] < 0.005 and kept[2] == 0.5


def test_decoded_positive_field_is_positive_in_physical_units(model: Tokenizer) -> None:
    floor = -0.4
    lowered = domain(SCHEMAS[2], floors=(("dye", floor),))
    emitted = torch.randn(2, 7, *GRID, generator=torch.Generator().manual_seed(3))
    assert float(emitted[:, 6].min()) < floor < float(model.assemble(emitted, lowered)[:, 6].min())
    assert float(model.assemble(emitted, DOMAINS[2])[:, 6].min()) < floor


@pytest.mark.parametrize(("mean", "std"), [(1.0, 0.02), (5.0, 0.001), (0.3, 0.1), (0.0, 1.0)])
def test_positive_field_stays_so_in_float32_however_far_below_zero_it_was_decoded(mean: float, std: float) -> None:
    """Means many deviations from zero, as of density: the way back to physical units rounds."""
    z = torch.cat((-torch.logspace(-3, 6, 2000), torch.linspace(1e-6, 1, 2000)))
    physical = keep_above(-mean / std + z, -mean / std) * torch.tensor(std) + torch.tensor(mean)
    assert float(physical.min()) > 0


def test_flat_domain_is_decoded_to_equal_layers_without_a_component_across(model: Tokenizer) -> None:
    flat = Domain(("periodic", "wall", "periodic"), (2.0, 1.0, 1.0), DOMAINS[1].presence, flat=True)
    fields, geometry = batch([1])
    with torch.no_grad():
        emitted = model.emit(model.encode(fields, geometry), geometry).double()
        decoded = model.assemble(emitted, flat)
    assert float(emitted[..., 0].sub(emitted[..., 1]).abs().max()) > 1e-3
    torch.testing.assert_close(decoded, decoded[..., :1].expand_as(decoded), rtol=0, atol=1e-12)
    assert existing_channels(DYNAMIC, flat) == {"velocity": slice(0, 2), "magnetic_field": slice(3, 5)}
    assert float(decoded[:, 2].abs().max()) < 1e-12 < 0.01 < float(decoded[:, 0].abs().max())
    found = divergence(decoded[:, :3], spacing=relative_spacing(flat, GRID), boundary=flat.boundary)
    assert float(found.abs().max()) < 1e-12


def test_loss_weighs_samples_alike_and_ignores_absent_fields() -> None:
    draw = torch.Generator().manual_seed(0)
    target, error = (torch.randn(2, 7, *GRID, generator=draw) for _ in range(2))
    presence = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    weights = TokenizerLoss(spectral=0.1)

    def loss(prediction: Tensor) -> Tensor:
        terms = reconstruction_terms(prediction, target, DYNAMIC)
        return reconstruction_loss(weigh_fields(terms, presence, DYNAMIC), weights)

    prediction = (target + 0.3 * error).requires_grad_()
    value = loss(prediction)
    value.backward()
    assert prediction.grad is not None
    assert not prediction.grad[0, 3:6].any() and not prediction.grad[1, :6].any()
    assert prediction.grad[0, :3].any() and prediction.grad[1, 6].any()
    terms = reconstruction_terms(prediction, target, DYNAMIC)
    kinds = {"vrmse": weights.vrmse, "gradient": weights.gradient, "spectral": weights.spectral}
    expected = sum(
        w * 0.5 * (0.5 * (terms[f"{k}/velocity"][0] + terms[f"{k}/dye"][0]) + terms[f"{k}/dye"][1])
        for k, w in kinds.items()
    )
    torch.testing.assert_close(value, torch.as_tensor(expected))
    everywhere = weigh_fields(terms, torch.ones(2, 3), DYNAMIC)
    assert all(torch.equal(everywhere[name], terms[name]) for name in terms)


def test_open_ends_are_marked_with_the_other_sign() -> None:
    channel = Domain(("open", "wall", "periodic"), (1.0, 1.0, 1.0))
    geometry = add_walls(torch.zeros(1, 0, 4, 5, 6), channel)
    assert torch.equal(geometry[0, 0, :, 0, 0], torch.tensor([-1.0, 0, 0, -1.0]))
    assert torch.equal(geometry[0, 1, 0, :, 0], torch.tensor([1.0, 0, 0, 0, 1.0]))
    assert not geometry[0, 2].any()


def test_domain_with_all_it_says_survives_json() -> None:
    full = domain(SCHEMAS[0], floors=(("dye", -0.5),), flat=True, units=(("velocity", (0.5, 0.25, 0.1)),))
    assert Domain.from_dict(full.to_dict()) == full and full.absent == ("magnetic_field",)


def test_solenoidal_field_between_open_ends_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="velocity, magnetic_field"):
        RegimeSchema("duct", DYNAMIC, ("open", "wall", "wall"))
    RegimeSchema("duct", DYNAMIC[2:], ("open", "wall", "wall"))


def tree(**data: Any) -> dict[str, Any]:
    fields = [
        {"name": "velocity", "kind": "vector", "solenoidal": True, "optional": True},
        {"name": "heat", "optional": True},
        {"name": "solid", "static": True},
    ]
    regimes = [{"name": "a", "path": "a"}, {"name": "b", "path": "b", "only": ["heat", "solid"]}]
    return {"name": "x", "data": {"grid": [16, 16, 16], "fields": fields, "regimes": regimes, **data}}


def test_models_of_a_configuration_know_its_schemas() -> None:
    config = config_from_dict(tree())
    assert [config.data.present(r) for r in config.data.regimes] == [("velocity", "heat", "solid"), ("heat", "solid")]
    tokenizer = build_tokenizer(config)
    assert list(tokenizer.basis.heads) == ["velocity+heat", "heat"] and tokenizer.latent_mean.shape[0] == 2
    cells = config.operator.patch**3
    inputs = config.data.history * config.tokenizer.latent_channels + num_static_features(1, 2)
    assert build_operator(config).embed.in_features == inputs * cells


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ["hat"]}, "has only 'hat', which is not in data.fields"),
        ({"only": ["heat"]}, r"lacks \['solid'\]; mark them 'optional: true'"),
        ({"only": ["solid"]}, "at least one field that changes in time"),
        ({"only": ["heat", "solid"], "fields": {"velocity": "u"}}, r"maps \['velocity'\], and has only"),
    ],
)
def test_senseless_schemas_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tree(regimes=[{"name": "a", "path": "a", **changes}]))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"kind": "vector", "positive": True}, "can be positive"),
        ({"static": True, "positive": True}, "can be positive"),
        ({"static_scale": "log"}, "static scalars alone"),
    ],
)
def test_senseless_fields_are_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(
            tree(
                fields=[{"name": "heat"}, {"name": "solid", "static": True}, {"name": "odd", "optional": True, **field}]
            )
        )


def test_two_dimensions_are_eight_layers() -> None:
    config = config_from_dict(tree(grid=[32, 16]))
    assert config.data.cells == (32, 16, 8) and config.latent_grid == (4, 2, 1)
    with pytest.raises(ConfigError, match="patch 1"):
        config_from_dict({**tree(grid=[32, 32]), "operator": {"patch": 2}})
    with pytest.raises(ConfigError, match="data.grid"):
        config_from_dict(tree(grid=[32]))


def test_components_of_few_patches_are_those_of_the_covariance() -> None:
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(30, PATCH**3, generator=draw) * torch.linspace(3, 0.1, PATCH**3)
    few, many = PatchBasis(1, 5), PatchBasis(1, 5)
    few.fit(patches)
    many.fit(patches.repeat(20, 1))  # More rows than columns: the other product, of the same covariance.
    torch.testing.assert_close(few.weight, many.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(few.scale, many.scale)
    rank_two = PatchBasis(1, 5)
    rank_two.fit(patches[:2])
    torch.testing.assert_close(rank_two.weight @ rank_two.weight.T, torch.diag(torch.tensor([1.0, 1, 0, 0, 0])))


def test_mean_changes_are_what_persistence_loses_and_have_a_floor() -> None:
    draw = torch.Generator().manual_seed(0)

    def windows(step: float) -> Any:
        first, change = (torch.randn(20, 1, 3, 2, 2, 2, generator=draw) for _ in range(2))
        return [{"latents": torch.cat((a, a, a + step * b))} for a, b in zip(first, change, strict=True)]

    fast, slow, still = (windows(step) for step in (2.0, 0.5, 1e-6))
    expected = [
        torch.stack([(w["latents"][2] - w["latents"][1]).square().mean() for w in d]).mean() for d in (fast, slow)
    ]
    found = mean_changes([fast, slow, still], ["fast", "slow", "still"])
    torch.testing.assert_close(found[:2], torch.stack(expected))
    assert float(found[2]) == pytest.approx(0.01 * float(found[0]))
    with pytest.raises(DataError, match="frozen: nothing changes"):
        mean_changes([fast, windows(0.0)], ["fast", "frozen"])


def test_tokenizer_sees_components_in_their_units(model: Tokenizer) -> None:
    """Fields of another size with the units of that size have the same latents, and come back in their own size."""
    units = (("velocity", (0.5, 0.25, 4.0)), ("dye", (2.0,)))
    plain, sized = domain(SCHEMAS[0]), domain(SCHEMAS[0], units=units)
    fields, geometry = batch([0])
    unit = model.units([plain, sized], [1], fields.device)
    assert unit.flatten().tolist() == [0.5, 0.25, 4.0, 1.0, 1.0, 1.0, 2.0]
    latent = model.encode(fields, geometry)
    torch.testing.assert_close(model.encode(fields * unit, geometry, unit), latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.emit(latent, geometry, unit), model.emit(latent, geometry) * unit)
    both = torch.cat((fields, fields * unit)), torch.cat((geometry, geometry))
    decoded, latents = model(*both, [plain, sized], torch.tensor([0, 1]))
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded[1, 6], 2.0 * decoded[0, 6], rtol=1e-3, atol=1e-4)
    found = divergence(decoded[:, :3], spacing=relative_spacing(plain, GRID), boundary=plain.boundary)
    assert float(found.detach().abs().max()) < 1e-4 * float(decoded.detach().abs().max())
