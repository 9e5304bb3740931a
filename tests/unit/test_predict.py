"""`predict` takes NumPy or torch, any floating type and strides, under autocast too, and gives the same kind back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from published import published

from shodh.checkpoint.description import ModelDescription, Source
from shodh.checkpoint.pretrained import ShodhModel
from shodh.config import to_dict
from shodh.config.reading import config_from_dict
from shodh.core.errors import DataError
from shodh.models.init import initialise
from shodh.schema.domain import Domain
from shodh.schema.fields import OUTSIDE, Boundary
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space

FIELDS = [
    {"name": "velocity", "kind": "vector", "solenoidal": True},
    {"name": "temperature", "masked_by": "solid"},
    {"name": "ambient"},
    {"name": "dye", "optional": True},
    {"name": "solid", "static": True},
]
OPERATORS: dict[str, dict[str, Any]] = {
    "latents": {"dim": 32, "depth": 1, "heads": 2, "experts": {"hidden": 32}},
    "fields": published({"kind": "fno", "dim": 8, "depth": 1, "modes": 2}),
}
CONSTANTS = {"velocity": (0.0, 2.0), "temperature": (300.0, 5.0), "ambient": (101325.0, 0.0)}


def build(
    kind: str,
    boundary: tuple[Boundary, Boundary, Boundary] = ("periodic",) * 3,
    fields: list[dict[str, Any]] = FIELDS,
    regimes: tuple[str, ...] = ("box",),
) -> ShodhModel:
    there = [f["name"] for f in fields if not f.get("optional")]
    tree = {
        "name": "p",
        "data": {
            "grid": [16, 8, 8],
            "fields": fields,
            "regimes": [{"name": r, "path": "data", "only": there} for r in regimes],
        },
        "tokenizer": {"latent_channels": 8, "strides": [4, 2], "widths": [8, 8], "head_channels": 8},
        "operator": OPERATORS[kind],
    }
    config = config_from_dict(tree, "test")
    built = [f.build() for f in config.data.fields]
    domain = Domain(boundary, (2.0, 1.0, 1.0), tuple((f.name, False) for f in built if f.optional))
    constants = {name: pair for name, pair in CONSTANTS.items() if name in there}
    description = ModelDescription(
        parts=("tokenizer", "operator") if kind == "latents" else ("operator",),
        dtype="fp32",
        space=Space.of(
            FieldNormalizer(built, 3, dict.fromkeys(regimes, constants)), built, dict.fromkeys(regimes, domain)
        ),
        run=to_dict(config),
        parameters={},
        versions={},
        source=Source(name="run", sha256="0"),
    )
    model = ShodhModel(description)
    for part in ("tokenizer", "operator"):
        if getattr(model, part, None) is not None:
            initialise(getattr(model, part), 0)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=list(OPERATORS))
def model(request: pytest.FixtureRequest) -> ShodhModel:
    return build(request.param)


@pytest.fixture(scope="module")
def given() -> tuple[torch.Tensor, torch.Tensor]:
    """Physical fields that all 16-bit types hold exactly, and a mask."""
    draw = torch.Generator().manual_seed(0)
    fields = torch.randint(-8, 9, (2, 3, 6, 16, 8, 8), generator=draw).float() / 4
    fields[:, :, 3] = 300 + 2 * fields[:, :, 3].round()
    fields[:, :, 4] = 64.0
    static = (torch.rand(2, 1, 16, 8, 8, generator=draw) < 0.3).float()
    return fields.to(torch.bfloat16).float().half().float(), static


KINDS = [
    *(f"torch.{d}" for d in ("float16", "bfloat16", "float32", "float64")),
    *(f"numpy.{d}" for d in ("float16", "float32", "float64", ">f4")),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strided", [False, True])
def test_every_kind_gives_the_values_of_float32_in_the_kind_that_came(
    model: ShodhModel, given: tuple[torch.Tensor, torch.Tensor], kind: str, strided: bool
) -> None:
    fields, static = given
    expected = model.predict(fields, static, "box")
    assert expected.dtype == torch.float32 and expected.shape == (2, 6, 16, 8, 8)
    library, name = kind.split(".", 1)
    values: Any = fields.to(getattr(torch, name)) if library == "torch" else fields.numpy().astype(name)
    mask: Any = static if library == "torch" else static.numpy().astype(np.uint8)
    if strided and library == "torch":
        values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif strided:
        values = np.asfortranarray(values[..., ::-1])[..., ::-1]
        values.flags.writeable = False
    before = values.tolist()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.predict(values, mask, "box")
    assert type(found) is type(values)
    double = name == "float64"
    assert found.dtype == (getattr(torch if library == "torch" else np, "float64" if double else "float32"))
    assert torch.equal(torch.as_tensor(found).float(), expected)
    assert values.tolist() == before


def test_integer_masks_default_dtype_and_inference_mode_change_nothing(
    model: ShodhModel, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    fields, static = given
    expected = model.predict(fields, static, "box")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model.predict(fields, static.bool(), "box"), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert torch.equal(model.predict(fields.clone().requires_grad_(False), static.to(torch.uint8), "box"), expected)


def test_what_does_not_exist_is_not_read_and_constants_come_back(
    model: ShodhModel, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    fields, static = given
    found = model.rollout(fields, static, "box", steps=2)
    solid = static.bool()
    assert bool((found[:, :, 3][solid.expand(-1, 2, -1, -1, -1)] == OUTSIDE).all())
    assert bool((found[:, :, 4] == 101325.0).all())
    junk = fields.clone()
    junk[:, :, 5] = torch.nan
    junk[:, :, 3][solid.expand(-1, 3, -1, -1, -1)] = -1e30
    assert torch.equal(model.rollout(junk, static, "box", steps=2)[:, :, :5], found[:, :, :5])


@pytest.mark.parametrize("kind", OPERATORS)
def test_vectors_at_centres_are_averaged_onto_faces(kind: str, given: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A periodic axis wraps, the last face of a walled one is closed, scalars stay, and the given array is kept."""
    model, (fields, static) = build(kind, ("periodic", "wall", "periodic")), given
    faces, before = fields.clone(), fields.clone()
    for axis in range(3):
        component = fields[:, :, axis]
        faces[:, :, axis] = (component + component.roll(-1, 2 + axis)) / 2
    faces[:, :, 1, :, -1] = 0
    assert torch.equal(model.to_faces(fields), faces)
    expected = model.predict(faces, static, "box")
    assert torch.equal(model.predict(fields, static, "box", placement="center"), expected)
    assert np.array_equal(model.rollout(fields.numpy(), static, "box", 1, placement="center")[:, 0], expected.numpy())
    assert not torch.equal(model.predict(fields, static, "box"), expected)
    assert torch.equal(model.encode(fields, static, placement="center"), model.encode(faces, static, "box"))
    assert torch.equal(fields, before)
    with pytest.raises(DataError, match="placement='centre'; expected one of"):
        model.predict(fields, static, "box", placement="centre")  # type: ignore[arg-type]


BAD = {
    "type": (lambda f, s: (f.tolist(), s), "got list"),
    "integers": (lambda f, s: (f.int(), s), "torch.int32"),
    "complex": (lambda f, s: (f.numpy().astype("c8"), s), "complex64"),
    "text": (lambda f, s: (f, np.full(s.shape, "a")), "<U1"),
    "grid": (lambda f, s: (f[..., :4], s), r"[batch, time, 6, 16, 8, 8], got [2, 3, 6, 16, 8, 4]: z 4, not 8"),
    "channels": (lambda f, s: (f[:, :, :4], s), "got [2, 3, 4, 16, 8, 8]: channels 4, not 6"),
    "channels last": (lambda f, s: (f.movedim(2, -1), s), "channels 16, not 6; x 8, not 16; z 6, not 8"),
    "time": (lambda f, s: (f[:, 0], s), "got [2, 6, 16, 8, 8]: 5 axes, not the 6 batch, time, channels, x, y, z"),
    "history": (lambda f, s: (f[:, :1], s), "2 frames, oldest first, got [2, 1,"),
    "batch": (lambda f, s: (f, s[:1]), "2 samples, and static 1"),
    "empty": (lambda f, s: (f[:0], s[:0]), "8, 8]: batch 0"),
    "static": (lambda f, s: (f, s[:, 0]), "[batch, 1, 16, 8, 8], got [2, 16, 8, 8]"),
    "nothing": (lambda f, s: (f, None), "got None; regime 'box' has solid"),
    "fields first": (lambda f, s: (f[..., :4], None), "z 4, not 8"),
    "nan": (lambda f, s: (f * torch.nan, s), "NaN or infinity"),
    "large": (lambda f, s: (f.double() * 1e300, s), "float32 cannot hold"),
    "mask": (lambda f, s: (f, s * 255), "divide it by 255"),
    "no fluid": (lambda f, s: (f, s * 0 + 1), "every cell"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arrays_are_refused_in_one_line(
    model: ShodhModel, given: tuple[torch.Tensor, torch.Tensor], bad: str
) -> None:
    change, words = BAD[bad]
    with pytest.raises(DataError) as caught:
        model.predict(*change(*given), "box")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_latents_are_arrays_too(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = build("latents")
    assert isinstance(model, ShodhModel)
    fields, static = given
    latents = model.encode(fields.double().numpy(), static.numpy(), "box")
    assert latents.dtype == np.float64 and latents.shape == (2, 3, 8, 2, 1, 1)
    decoded = model.decode(latents, static, "box")
    assert isinstance(decoded, np.ndarray) and decoded.shape == fields.shape
    with pytest.raises(DataError, match="latents must be"):
        model.decode(latents[:, :, :4], static, "box")


def test_static_and_regime_may_be_left_out_where_there_is_no_choice(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    fields = [{"name": "velocity", "kind": "vector"}]
    velocity = given[0][:, :, :3]
    model = build("fields", fields=fields)
    expected = model.predict(velocity, torch.zeros(2, 0, 16, 8, 8), "box")
    assert torch.equal(model.predict(velocity), expected)
    several = build("fields", fields=fields, regimes=("box", "channel"))
    assert several.predict(velocity, regime="channel").shape == expected.shape
    with pytest.raises(DataError, match="regime must be given: one of box, channel"):
        several.predict(velocity)
