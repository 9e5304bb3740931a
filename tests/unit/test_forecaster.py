"""A forecaster rolls out as the obvious loop does, with a tokenizer and without, and in any batch of regimes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from published import published
from torch import Tensor
from vocabulary import FIELDS, REGIMES

from shodh.config import RunConfig
from shodh.config.reading import config_from_dict
from shodh.core.errors import CheckpointError
from shodh.models.factory import build_operator, build_tokenizer
from shodh.models.forecaster import Forecaster
from shodh.models.init import initialise
from shodh.models.operator import OperatorOutput
from shodh.moe.fingerprint import fingerprint
from shodh.schema.domain import Domain, add_walls, static_features
from shodh.schema.space import RegimeSpace, Space

OPERATORS: dict[str, dict[str, Any]] = {
    "latents": {"dim": 32, "depth": 1, "heads": 2, "experts": {"num_experts": 2, "hidden": 32}},
    "fields": {"kind": "unet", "dim": 8, "depth": 1},
    "oracle": {  # Its routers are told the regime.
        "kind": "moe_pot",
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "patch": 1,
        "field": {"mlp": 16},
        "experts": {
            "num_experts": 4,
            "top_k": 1,
            "hidden": 16,
            "router": {"kind": "oracle", "groups": 2, "normalise": "before"},
        },
    },
}
# Its routers are shown what changes from frame to frame, of the frames that a rollout begins with.
OPERATORS["operator"] = {
    **OPERATORS["oracle"],
    "experts": {**OPERATORS["oracle"]["experts"], "router": {"kind": "operator", "groups": 4, "normalise": "before"}},
}


def build(kind: str) -> tuple[RunConfig, Forecaster]:
    """Odd sizes wherever the networks allow them: three past frames, a grid of three different axes."""
    tree = {
        "name": "p",
        "data": {
            "grid": [16, 8, 24] if kind == "latents" else [7, 5, 3],
            "history": 3,
            "fields": FIELDS,
            "regimes": [{"name": name, "path": "d", "only": only} for name, only in REGIMES.items()],
        },
        "tokenizer": {"latent_channels": 8, "strides": [4, 2], "widths": [8, 8], "head_channels": 8},
        "operator": OPERATORS[kind] if kind == "latents" else published(OPERATORS[kind]),
    }
    config = config_from_dict(tree, "test")
    fields = tuple(f.build() for f in config.data.fields)
    regimes = []
    for number, (name, only) in enumerate(REGIMES.items()):
        domain = Domain(("periodic", "wall", "periodic"), (2.0, 1.0, 3.0 + number), (("dye", "dye" in only),))
        constants = {"velocity": (0.0, 2.0), "heat": (300.0, 5.0 + number), "dye": (1.0, 0.5)}
        regimes.append(RegimeSpace.of(name, domain, {k: v for k, v in constants.items() if k in only}))
    operator = build_operator(config)
    initialise(operator, 1)
    tokenizer = None
    if kind == "latents":
        tokenizer = build_tokenizer(config)
        initialise(tokenizer, 2)
        tokenizer.eval().requires_grad_(False)
    return config, Forecaster.of(config, Space(fields, 3, tuple(regimes)), operator.eval(), tokenizer)


@pytest.fixture(scope="module", params=list(OPERATORS))
def model(request: pytest.FixtureRequest) -> tuple[RunConfig, Forecaster]:
    return build(request.param)


def draw(config: RunConfig, forecaster: Forecaster, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Physical fields of one more frame than is needed, and a mask, neither contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, forecaster.history + 1, forecaster.space.num_channels)
    fields = torch.randn(*config.cells[::-1], *shape[::-1], generator=generator).permute(5, 4, 3, 2, 1, 0)
    static = torch.rand(2, 1, *config.cells, generator=generator) < 0.3
    return fields, static.float()


def obvious(forecaster: Forecaster, fields: Tensor, static: Tensor, regime: int, steps: int) -> Tensor:
    """The rollout written out: normalise, encode or pad, step, decode every frame, one sample at a time."""
    space, rows = forecaster.space, []
    name, domain = space.names[regime], space.domains[regime]
    told = {"regime": torch.tensor([regime])} if forecaster.experts.router.kind == "oracle" else {}
    if forecaster.experts.num_experts == 0:
        told = {}
    absent = [] if "dye" in REGIMES[name] else [4]
    for b in range(len(fields)):
        mask, out = static[b : b + 1], []
        window = list(space.normalizer.normalize(fields[b : b + 1], name, mask)[:, -forecaster.history :].unbind(1))
        geometry, tokenizer = add_walls(mask, domain), forecaster.tokenizer
        if tokenizer is not None:
            window = [tokenizer.encode(frame, geometry) for frame in window]
        for _ in range(steps):
            if tokenizer is None:
                for frame in window:
                    frame[:, 3] = torch.where(mask[:, 0] == 1, 0.0, frame[:, 3])
                    frame[:, absent] = 1.0
            features = mask if tokenizer is None else static_features(geometry)
            if forecaster.experts.num_experts and forecaster.experts.router.kind == "operator" and not out:
                exists = torch.tensor([[c not in absent for c in range(5)]])
                wrapped = torch.tensor([[True, False, True]])
                told = {"fingerprint": fingerprint(torch.stack(window[-forecaster.history :], 1), wrapped, exists)}
            window.append(forecaster.operator(torch.stack(window[-forecaster.history :], 1), features, **told).latent)  # type: ignore[misc]
            frame = window[-1].clone()
            if tokenizer is not None:
                frame = tokenizer.assemble(tokenizer.emit(frame, geometry), domain)
            out.append(space.normalizer.denormalize(frame, name, mask))
        rows.append(torch.stack(out, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("regime", (0, 1))
def test_rollout_is_the_obvious_loop(model: tuple[RunConfig, Forecaster], regime: int) -> None:
    config, forecaster = model
    fields, static = draw(config, forecaster)
    with torch.no_grad():
        expected = obvious(forecaster, fields.clone(), static, regime, 3)
        found = forecaster.predict(fields, static, forecaster.space.names[regime], 3)
    there = forecaster.space.channel_numbers(regime)
    torch.testing.assert_close(found[:, :, there], expected[:, :, there], rtol=1e-4, atol=1e-4)
    assert found.shape == (2, 3, forecaster.space.num_channels, *config.cells)


def test_routers_go_by_the_given_frames_throughout_a_rollout() -> None:
    """Fingerprints of forecasts would be those of their errors as well."""
    config, forecaster = build("operator")
    fields, static = draw(config, forecaster)
    states, features = forecaster.encode(fields, static, 0)
    labels, seen = forecaster.labels(0, states), []

    def operator(*given: Tensor, **told: Tensor) -> OperatorOutput:
        seen.append(told["fingerprint"])
        return forecaster.operator(*given, **told)  # type: ignore[misc]

    with torch.no_grad():
        replace(forecaster, operator=operator).rollout(states, features, labels, 3)
    expected = forecaster.look(states[:, -forecaster.history :], labels)
    assert len(seen) == 3 and all(torch.equal(found, expected) for found in seen)


def test_a_longer_rollout_begins_as_a_shorter_one(model: tuple[RunConfig, Forecaster]) -> None:
    config, forecaster = model
    fields, static = draw(config, forecaster)
    with torch.no_grad():
        one, three = (forecaster.predict(fields, static, "dyed", steps) for steps in (1, 3))
    assert torch.equal(one, three[:, :1])


def test_samples_of_a_batch_may_be_of_different_regimes(model: tuple[RunConfig, Forecaster]) -> None:
    config, forecaster = model
    fields, static = draw(config, forecaster)
    fields = torch.where(fields.new_tensor([1, 1, 1, 1, 0]).view(-1, 1, 1, 1) > 0, fields, 0.0)
    parts = [forecaster.encode(fields[n : n + 1], static[n : n + 1], n) for n in (0, 1)]
    states, features = (torch.cat(p) for p in zip(*parts, strict=True))
    with torch.no_grad():
        together = forecaster.rollout(states, features, torch.tensor([0, 1]), 2)
        alone = [forecaster.rollout(*part, torch.tensor([n]), 2) for n, part in enumerate(parts)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_what_does_not_exist_is_not_read(model: tuple[RunConfig, Forecaster]) -> None:
    """Junk in an absent channel and in solids changes nothing of what is predicted."""
    config, forecaster = model
    fields, static = draw(config, forecaster)
    junk = fields.clone()
    junk[:, :, 3] = torch.where(static == 1, 1e6, junk[:, :, 3])
    if forecaster.tokenizer is None:  # A tokenizer is given zeros there: `ShodhModel` and the data see to it.
        junk[:, :, 4] = 1e6
    with torch.no_grad():
        clean, spoiled = (forecaster.predict(given, static, "clear", 2) for given in (fields, junk))
    assert torch.equal(clean[:, :, :4], spoiled[:, :, :4])


def test_rollouts_are_differentiable_in_states_and_weights(model: tuple[RunConfig, Forecaster]) -> None:
    config, forecaster = model
    fields, static = draw(config, forecaster)
    states, features = forecaster.encode(forecaster.space.to_model(fields, "dyed", static), static, 1)
    states = states.detach().requires_grad_(True)
    forecaster.rollout(states, features, forecaster.labels(1, states), 2).square().mean().backward()
    assert states.grad is not None and bool(states.grad[:, -1].abs().sum() > 0)
    assert not states.grad[:, : -forecaster.history].any(), "only the last states are read"


def test_exact_and_lone_tokenizers_are_refused_in_words(model: tuple[RunConfig, Forecaster]) -> None:
    config, forecaster = model
    fields, static = draw(config, forecaster)
    with pytest.raises(CheckpointError, match="tokenizer alone"):
        Forecaster.of(config, forecaster.space, None, forecaster.tokenizer).predict(fields, static, "dyed")
    if forecaster.tokenizer is None:
        with pytest.raises(CheckpointError, match="potential"):
            forecaster.predict(fields, static, "dyed", exact=True)
