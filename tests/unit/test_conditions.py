"""Time step and physical parameters as inputs of operators: constants, values, modulation, and what a user gives."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import published
from test_forecaster import OPERATORS, REGIMES
from test_forecaster import build as build_plain
from test_predict import build as build_model
from torch import Tensor

from shodh.checkpoint.description import Source, describe_run
from shodh.checkpoint.pretrained import ShodhModel, from_pretrained
from shodh.config import OperatorConfig
from shodh.core.errors import CheckpointError, ConfigError, DataError
from shodh.experiments.harness.flops import forward_flops
from shodh.models.conditioning import Conditioning
from shodh.models.factory import build_operator
from shodh.models.forecaster import Forecaster
from shodh.models.init import initialise
from shodh.schema.conditions import Condition, condition_values
from shodh.schema.space import Space
from shodh.train.rehearsal import rehearse_operator

STEP = Condition("time_step", False, 0.2, 0.1, (("a", 0.1, 0.3), ("b", 0.2, 0.2)))
NU = Condition("nu", True, math.log(0.01), 2.0, (("a", 0.001, 0.1),))
KINDS = {
    **{kind: OPERATORS[kind] for kind in ("latents", "fields", "operator")},
    "fno": {"kind": "fno", "dim": 8, "depth": 2, "modes": 1},
}


def test_constants_are_those_of_the_values_by_regime() -> None:
    near = Condition.fit("nu", {"a": np.array([1.0, 3.0]), "b": np.array([5.0])})
    assert (near.log, near.mean, near.range_of("a"), near.range_of("c")) == (False, 3.0, (1.0, 3.0), None)
    assert near.scale == pytest.approx(math.sqrt(8 / 3))
    wide = Condition.fit("nu", {"a": np.array([1e-4, 1e-2])})
    assert wide.log and wide.to_model(np.array([1e-4, 1e-2, 1e-3]), "x").tolist() == pytest.approx([-1, 1, 0])
    assert not Condition.fit("nu", {"a": np.array([-1.0, 100.0])}).log, "no logarithm of what may be negative"
    assert Condition.fit("nu", {"a": np.array([0.1, 0.1])}).scale == 1.0


@pytest.mark.parametrize(
    ("regime", "given", "expected"),
    [
        ("a", {"time_step": 0.3, "nu": 0.01}, [[1, 0], [1, 0]]),
        ("a", {"time_step": torch.tensor([0.1, 0.3]), "nu": None}, [[-1, math.nan], [1, math.nan]]),
        ("b", None, [[0, math.nan]] * 2),
        ("b", {"nu": [0.01, 0.01 * math.e**2]}, [[0, 0], [0, 1]]),
        ("new", {"nu": 0.01}, [[math.nan, 0]] * 2),
    ],
)
def test_values_are_given_or_follow_from_the_regime(regime: str, given: Any, expected: list[list[float]]) -> None:
    found = condition_values((STEP, NU), regime, given, 2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"nu": 0.01}, "lack time_step.*0.1 to 0.3"),
        ({"time_step": 0.1}, "lack nu"),
        ({"time_step": 0.1, "nu": 1, "viscosity": 1}, "'viscosity'.*takes time_step, nu"),
        ({"time_step": 0.1, "nu": 0.0}, "nu must be finite and positive.*got 0"),
        ({"time_step": -0.1, "nu": 1}, "time_step must be finite and positive, got -0.1"),
        ({"time_step": math.inf, "nu": 1}, "finite"),
        ({"time_step": math.nan, "nu": 1}, "NaN"),
        ({"time_step": [0.1, 0.1, 0.1], "nu": 1}, r"\[2\].*\[3\]"),
        ({"time_step": "fast", "nu": 1}, "a number.*'fast'"),
        ("nu", "map names"),
    ],
)
def test_what_cannot_be_told_is_refused(given: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        condition_values((STEP, NU), "a", given, 2)


def test_space_keeps_conditions_and_is_the_same_without() -> None:
    plain = build_plain("fields")[1].space
    space = replace(plain, conditions=(replace(STEP, ranges=(("dyed", 0.1, 0.3),)), NU))
    assert Space.from_document(space.document(), "here") == space
    assert space.checksum != plain.checksum == space.unconditioned().checksum
    assert "conditions" not in plain.document()
    other = next(name for name in space.names if name != "dyed")
    assert space.only([other]).conditions[0].ranges == ()
    with pytest.raises(DataError, match="different names"):
        replace(space, conditions=(STEP, STEP))


def build(kind: str) -> tuple[Forecaster, Forecaster]:
    """The same networks with conditions and without."""
    config, plain = build_plain(kind) if kind != "fno" else _fno()
    operator = config.operator.model_copy(update={"conditions": ("time_step", "nu")})
    model = build_operator(config.model_copy(update={"operator": operator}))
    initialise(model, 1)
    first, second = REGIMES
    conditions = (replace(STEP, ranges=((first, 0.1, 0.3), (second, 0.2, 0.2))), replace(NU, ranges=()))
    told = replace(plain, operator=model.eval(), space=replace(plain.space, conditions=conditions))
    return told, plain


def _fno() -> tuple[Any, Forecaster]:
    config, plain = build_plain("fields")
    operator = OperatorConfig(**published(KINDS["fno"]))
    config = config.model_copy(update={"operator": operator})
    model = build_operator(config)
    initialise(model, 1)
    return config, replace(plain, operator=model.eval(), experts=operator.experts)


def states(forecaster: Forecaster) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    grid = (16, 8, 24) if forecaster.tokenizer is not None else (7, 5, 3)
    fields = torch.randn(2, 3, forecaster.space.num_channels, *grid, generator=draw)
    static = (torch.rand(2, forecaster.space.num_static, *grid, generator=draw) < 0.3).float()
    return *forecaster.encode(fields, static, 0), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_operator_hears_its_conditions(kind: str) -> None:
    """Weights of the rest are drawn as without; values, time steps and absence differ; all of it has a gradient."""
    told, plain = build(kind)
    named, other = (dict(f.operator.named_parameters()) for f in (told, plain))  # type: ignore[union-attr]
    assert all(torch.equal(named[name], weight) for name, weight in other.items())
    assert {name.split(".")[0] for name in set(named) - set(other)} == {"conditioning"}
    given = states(told)
    values = [torch.tensor(v).expand(2, 2) for v in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, math.nan])]
    answers = [told.step(*given, conditions=v).latent for v in values]
    assert all(a.isfinite().all() for a in answers)
    assert all(not torch.allclose(a, b, rtol=1e-4) for n, a in enumerate(answers) for b in answers[:n])
    mixed = told.step(*given, conditions=torch.stack((values[1][0], values[3][0]))).latent
    torch.testing.assert_close(mixed, torch.stack((answers[1][0], answers[3][1])), rtol=1e-4, atol=1e-5)
    told.step(*given, conditions=values[1]).latent.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in told.operator.conditioning.parameters())  # type: ignore[union-attr]


def test_without_values_a_forecaster_takes_the_only_ones_or_refuses() -> None:
    told, _ = build("fields")
    first, features, labels = states(told)
    with pytest.raises(DataError, match="lack time_step"):
        told.step(first, features, labels)
    usual = told.step(first, features, labels + 1).latent
    expected = told.step(first, features, labels + 1, conditions=torch.tensor([[0.0, math.nan]] * 2)).latent
    torch.testing.assert_close(usual, expected)
    with pytest.raises(ConfigError, match="time_step, nu"):
        told.operator(first, features)  # type: ignore[misc]


def test_embedding_is_float32_whatever_its_weights_are_kept_in() -> None:
    conditioning = Conditioning(("time_step",), 16)
    initialise(conditioning, 0)
    x, near = torch.ones(2, 3, 16), torch.tensor([[0.5], [0.501]])  # Equal in bf16.
    exact = conditioning(x, near)
    assert not torch.equal(exact[0], exact[1])
    rounded = conditioning.to(torch.bfloat16)
    hidden = rounded.hidden(torch.cat((near, torch.ones(2, 1)), 1))
    assert hidden.dtype == torch.float32 and not torch.equal(hidden[0], hidden[1])
    assert rounded(x.bfloat16(), near).dtype == torch.bfloat16


def conditioned_model() -> ShodhModel:
    plain = build_model("fields")
    config = plain.config
    config = config.model_copy(update={"operator": config.operator.model_copy(update={"conditions": ("time_step",)})})
    space = replace(plain.space, conditions=(replace(STEP, ranges=(("box", 0.1, 0.3),)),))
    model = ShodhModel(describe_run(config, space, ("operator",), Source(name="run", sha256="0")))
    initialise(model.operator, 0)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


def test_predict_takes_conditions_and_a_folder_keeps_them(tmp_path: Path) -> None:
    model = conditioned_model()
    model.save_pretrained(tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert loaded.conditions == ("time_step",) and loaded.space == model.space
    draw = torch.Generator().manual_seed(0)
    fields = 2 + torch.rand(2, model.history, model.num_channels, *model.grid, generator=draw)
    static = torch.zeros(2, model.num_static, *model.grid)
    slow, fast = (model.rollout(fields, static, steps=2, conditions={"time_step": dt}) for dt in (0.1, 0.3))
    assert not torch.allclose(slow, fast, rtol=1e-4)
    assert torch.equal(loaded.rollout(fields, static, steps=2, conditions={"time_step": 0.3}), fast)
    each = loaded.predict(fields, static, conditions={"time_step": np.array([0.1, 0.3])})
    torch.testing.assert_close(each, torch.stack((slow[0, 0], fast[1, 0])), rtol=1e-4, atol=1e-3)
    with pytest.raises(DataError, match="lack time_step"):
        loaded.predict(fields, static)
    with pytest.raises(DataError, match="takes none"):
        build_model("fields").predict(fields, static, conditions={"time_step": 0.1})


def test_a_folder_whose_space_has_other_conditions_is_refused(tmp_path: Path) -> None:
    model = conditioned_model()
    model.save_pretrained(tmp_path)
    model.space.unconditioned().save(tmp_path)
    with pytest.raises(CheckpointError, match="different conditions"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["latents", "fields"])
def test_plans_and_studies_count_the_work_of_a_conditioned_operator(kind: str) -> None:
    config, _ = build_plain(kind)
    operator = config.operator.model_copy(update={"conditions": ("time_step",), "activation_checkpointing": False})
    told = config.model_copy(update={"operator": operator})
    more = 2 * (2 * operator.dim + 2 * operator.dim**2)  # Two products of one sample.
    assert forward_flops(told) - forward_flops(config) == more
    assert rehearse_operator(told, 2).flops > rehearse_operator(config, 2).flops


@pytest.mark.parametrize("names", [["nu", "nu"], [""]])
def test_names_are_checked(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"repeated|at least 1"):
        OperatorConfig(conditions=names)  # type: ignore[arg-type]
