"""Errors of latents in the metric of the fields that they decode to: by variance of the channels, and decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_unroll import configured
from torch import Tensor, nn
from vocabulary import FIELDS, REGIMES

from shodh.config import TokenizerConfig
from shodh.config.reading import config_from_dict
from shodh.core.errors import ConfigError
from shodh.models.factory import build_tokenizer
from shodh.models.init import initialise
from shodh.models.tokenizer import PATCH, Tokenizer
from shodh.schema.domain import Domain, add_walls
from shodh.schema.fields import Field
from shodh.schema.space import RegimeSpace, Space
from shodh.train.field_task import operator_task
from shodh.train.latent_metric import DecodedError, channel_weights, weighted_square
from shodh.train.operator_task import roll_samples

PERIODIC = Domain(("periodic",) * 3, (1.0, 1.0, 1.0))


def linear_tokenizer(channels: int) -> Tokenizer:
    """An orthonormal decoder: principal components alone, and whitened latents of very different variance."""
    config = TokenizerConfig(latent_channels=channels, strides=(4, 2), widths=(8, 8), head_channels=8)
    model = Tokenizer(config, (Field("heat"), Field("dye")), ())
    initialise(model, 0)
    nn.init.zeros_(model.decoder.head.weight)
    draw = torch.Generator().manual_seed(0)
    model.basis.heads["heat+dye"].fit(torch.randn(300, 2 * PATCH**3, generator=draw))
    model.latent_std.copy_(torch.logspace(-3, 1, channels)[torch.randperm(channels, generator=draw)])
    model.latent_mean.normal_(generator=draw)
    return model.requires_grad_(False)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=draw).requires_grad_(), torch.randn(*shape, generator=draw)


def test_weighted_error_is_the_error_before_whitening_over_the_mean_variance() -> None:
    tokenizer = linear_tokenizer(12)
    prediction, target = pair(3, 12, 2, 1, 3)
    weights = channel_weights(tokenizer, [PERIODIC]).expand(3, -1)
    assert weights.mean(1).tolist() == pytest.approx([1.0] * 3)
    errors = weighted_square(prediction, target, weights)
    errors.sum().backward()
    u, v, std = prediction.detach().double().numpy(), target.double().numpy(), tokenizer.latent_std[0].double().numpy()
    for b in range(3):
        raw = [std[c] * (u[b, c] - v[b, c]) for c in range(12)]
        assert float(errors[b].detach()) == pytest.approx(np.square(raw).mean() / np.square(std).mean(), rel=1e-5)
        gradient = [2 * std[c] * raw[c] / np.square(std).mean() / v[b].size for c in range(12)]
        assert prediction.grad is not None
        np.testing.assert_allclose(prediction.grad[b].numpy(), gradient, rtol=1e-4, atol=1e-7)


def test_a_channel_without_variance_counts_nothing_and_equal_ones_alike() -> None:
    tokenizer = linear_tokenizer(4)
    tokenizer.latent_std.copy_(torch.tensor([[1e-6, 1.0, 1.0, 2.0]]))  # 1e-6 is the smallest that is stored.
    weights = channel_weights(tokenizer, [PERIODIC])
    assert weights[0].tolist() == pytest.approx([0.0, 2 / 3, 2 / 3, 8 / 3], abs=1e-6)
    for constant in (0.0, 1e-6):
        tokenizer.latent_std.fill_(constant)
        assert channel_weights(tokenizer, [PERIODIC])[0].isfinite().all()
    target = torch.zeros(1, 4, 1, 1, 1)
    noise = torch.tensor([1e3, 0.0, 0.0, 0.0]).view(1, 4, 1, 1, 1)
    assert float(weighted_square(noise, target, weights)) < 1e-5 < float(weighted_square(noise, target, None))


def test_weighted_error_is_the_decoded_one_of_an_orthonormal_decoder() -> None:
    """In value and in gradient, up to one factor, whatever the error is; the whitened error is not."""
    tokenizer = linear_tokenizer(12)
    space = Space(tokenizer.fields, 3, (RegimeSpace.of("a", PERIODIC, {"heat": (0.0, 1.0), "dye": (0.0, 1.0)}),))
    decoded = DecodedError(space, tokenizer, lambda samples: torch.zeros(len(samples), 0, 16, 8, 8))
    regime = torch.zeros(3, dtype=torch.int64)
    prediction, target = pair(3, 12, 2, 1, 1)
    with torch.no_grad():
        prediction *= torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1, 1, 1)
    weights = channel_weights(tokenizer, space.domains)[regime]
    of_fields = decoded(prediction, target, decoded.static([(0, 0, 0)] * 3, torch.device("cpu")), regime, regime)
    of_latents = {
        name: weighted_square(prediction, target, w) for name, w in (("variance", weights), ("whitened", None))
    }
    (scale,) = tokenizer.basis.heads["heat+dye"].scale.tolist()
    factor = scale**2 * float(tokenizer.latent_std.square().sum()) / (2 * PATCH**3)
    torch.testing.assert_close(of_fields, factor * of_latents["variance"], rtol=1e-4, atol=0)
    found = {}
    for name, errors in {"decoded": of_fields, **of_latents}.items():
        (found[name],) = torch.autograd.grad(errors.sum(), prediction)
    torch.testing.assert_close(found["decoded"], factor * found["variance"], rtol=1e-3, atol=1e-6)
    cosine = torch.cosine_similarity(found["decoded"].flatten(), found["whitened"].flatten(), 0)
    assert float(cosine) < 0.7


def test_decoded_error_is_that_of_the_fields_and_cells_that_exist() -> None:
    tree = {
        "name": "p",
        "data": {
            "grid": [16, 8, 8],
            "fields": FIELDS,
            "regimes": [{"name": name, "path": "d", "only": only} for name, only in REGIMES.items()],
        },
        "tokenizer": {"latent_channels": 8, "strides": [4, 2], "widths": [8, 8], "head_channels": 8},
    }
    config = config_from_dict(tree, "test")
    tokenizer = build_tokenizer(config)
    initialise(tokenizer, 0)
    tokenizer.requires_grad_(False).latent_std.copy_(torch.rand(2, 8, generator=torch.Generator().manual_seed(2)) + 0.1)
    constants = {"velocity": (0.0, 1.0), "heat": (0.0, 1.0), "dye": (0.0, 1.0)}
    spaces = []
    for name, only in REGIMES.items():
        domain = Domain(("periodic", "wall", "periodic"), (1.0, 1.0, 1.0), (("dye", "dye" in only),))
        spaces.append(RegimeSpace.of(name, domain, {k: v for k, v in constants.items() if k in only}))
    space = Space(tuple(f.build() for f in config.data.fields), 3, tuple(spaces))
    weights = channel_weights(tokenizer, space.domains)
    for row, std in zip(weights, tokenizer.latent_std, strict=True):  # Each set of fields has statistics of its own.
        torch.testing.assert_close(row, std.square() / std.square().mean())

    solid = (torch.rand(3, 1, 16, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.4).float()
    asked: list[object] = []

    def read(samples: object) -> Tensor:
        asked.append(samples)
        return solid

    decoded, regime = DecodedError(space, tokenizer, read), torch.tensor([1, 0, 1])
    prediction, target = pair(3, 8, 2, 1, 1)
    static = decoded.static([(1, 0, 4), (0, 2, 1), (1, 1, 0)], torch.device("cpu"))
    errors = decoded(prediction, target, static, regime, regime)
    assert asked == [[(1, 0, 4), (0, 2, 1), (1, 1, 0)]]
    for b, label in enumerate(regime.tolist()):
        geometry, one = add_walls(solid[b, None], space.domains[label]), torch.tensor([label])
        u, v = (tokenizer.decode(z[b, None], geometry, space.domains, one)[0] for z in (prediction, target))
        square, fluid = (u - v).square(), solid[b, 0] == 0
        by_channel = [*(square[c].mean() for c in range(3)), square[3][fluid].mean()]
        by_channel += [square[4].mean()] if label == 1 else []
        torch.testing.assert_close(errors[b], torch.stack(by_channel).mean())
    errors.sum().backward()
    assert prediction.grad is not None and prediction.grad.flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize("metric", ["whitened", "variance", "decoded"])
def test_a_relative_loss_is_relative_in_the_metric_of_the_error(metric: str) -> None:
    plain, forecaster, batch = configured("latents")
    assert forecaster.tokenizer is not None
    forecaster.tokenizer.latent_std.copy_(torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) + 0.1)
    grid = plain.config.cells

    def static(samples: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.stack([torch.full((1, *grid), float(key[0])) for key in samples])

    operator = plain.operator.model_copy(update={"loss": "over_persistence", "metric": metric, "decoded_every": 2})
    config = plain.config.model_copy(update={"operator": operator})
    names = ("latents", "static", "regime", "trajectory", "frame")
    windows = [[{name: batch[name][b] for name in names}] for b in range(2)]
    task = operator_task(config, plain.regimes, windows, forecaster.tokenizer, static)  # type: ignore[arg-type]
    frames, regime, index = batch["latents"], batch["regime"], batch["sample"][:, 0]
    decoded = DecodedError(forecaster.space, forecaster.tokenizer, static)
    fields = decoded.static([(0,), (1,)], torch.device("cpu"))
    weights = None if metric == "whitened" else channel_weights(forecaster.tokenizer, forecaster.space.domains)
    with torch.no_grad():
        ahead = forecaster.step(frames[:, :3], batch["static"], regime).latent
        for step in range(2):
            through = metric == "decoded" and step == 1
            pairs = (ahead, frames[:, 3]), (frames[:, -2], frames[:, -1])
            error, change = (
                decoded(u, v, fields, regime, index) if through else weighted_square(u, v, weights) for u, v in pairs
            )
            outcome = task.loss(forecaster.operator, batch, step)
            torch.testing.assert_close(outcome.loss, (error / change.clamp(min=0.01 * change.max())).mean())
            torch.testing.assert_close(outcome.errors, error)
            reported = weighted_square(ahead, frames[:, 3], weights).mean()
            name = "train/latent_mse" if metric == "whitened" else "train/latent_nmse"
            torch.testing.assert_close(outcome.metrics[name][0], reported)
            assert ("train/decoded_mse" in outcome.metrics) == through


def test_static_fields_move_with_shifted_latents() -> None:
    """A mean over cells does not depend on the place: neither does the decoded error, if the solid moves as well."""
    plain, forecaster, batch = configured("latents")
    assert forecaster.tokenizer is not None
    draw = torch.Generator().manual_seed(0)
    solid = (torch.rand(2, 1, *plain.config.cells, generator=draw) < 0.4).float()
    config = plain.config.model_copy(update={"operator": plain.operator.model_copy(update={"metric": "decoded"})})
    task = operator_task(config, plain.regimes, [], forecaster.tokenizer, lambda samples: solid)
    frames, static = batch["latents"], batch["static"]
    shifts = torch.tensor([[1, 0, 2], [0, 0, 1]])
    moved = roll_samples(frames, shifts)
    with torch.no_grad():
        there = task._error_of(batch, static, None, True)(frames[:, 0], frames[:, 1])
        rolled, unrolled = (task._error_of(batch, static, by, True)(moved[:, 0], moved[:, 1]) for by in (shifts, None))
    torch.testing.assert_close(rolled, there, rtol=1e-4, atol=1e-6)
    assert float((unrolled / there - 1).abs().min()) > 1e-3


@pytest.mark.parametrize(
    ("operator", "named"),
    [
        ({"metric": "variances"}, ["operator.metric", "variance", "whitened", "decoded"]),
        ({"metric": "decoded", "decoded_every": 0}, ["decoded_every"]),
        ({"kind": "unet", "loss": "mse", "random_shifts": False, "experts": {"num_experts": 0}, "metric": "whitened"},
         ["metric whitened", "unet"]),
        ({"noise_relative_to": "error"}, ["input_noise", "for example"]),
        ({"patch_jitter": True}, ["patch_jitter", "random_shifts"]),
        ({"kind": "unet", "loss": "mse", "random_shifts": False, "experts": {"num_experts": 0}, "patch_jitter": True},
         ["patch_jitter", "moe_pot"]),
        ({"unroll": {"steps": 0}}, ["operator.unroll.steps"]),
        ({"unroll": {"steps": 65}}, ["operator.unroll.steps"]),
        ({"unroll": {"gradient": "none"}}, ["operator.unroll.gradient", "pushforward"]),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(operator: dict[str, object], named: list[str]) -> None:
    data = {"grid": [16, 16, 16], "regimes": [{"name": "a", "path": "d"}]}
    with pytest.raises(ConfigError) as refused:
        config_from_dict({"name": "p", "data": data, "operator": operator}, "test")
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in named)
