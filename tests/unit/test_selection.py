"""The best validation, and the end of a run that finds no better one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shodh.config import BestConfig, config_from_dict, load_config
from shodh.config.reading import apply_overrides
from shodh.core.distributed import SharedError
from shodh.core.errors import ConfigError
from shodh.schema.measures import measure
from shodh.train.callbacks.checkpoints import _resume_selection
from shodh.train.callbacks.selection import Selection, check_measure
from shodh.train.decoded import defined, field_vrmse, frame_errors
from shodh.train.plan import make_plan

MEASURE = "valid/decoded_vrmse"


def selected(values: Sequence[float], patience: int = 0) -> Any:
    """A trainer after validations that found ``values``, one a step."""
    trainer: Any = SimpleNamespace(step=0, best=None, stale=0, improved=False, ended=None)
    trainer.train = SimpleNamespace(steps=100)
    selection = Selection(BestConfig(measure=MEASURE, patience=patience))
    trainer.saved = []
    for value in values:
        if trainer.ended:
            break
        trainer.step, trainer.improved = trainer.step + 1, False
        trainer.validated = {MEASURE: value, "valid/persistence_vrmse": 9.0}
        selection.after_step(trainer)
        trainer.saved += [trainer.step] * trainer.improved
    return trainer


def test_a_checkpoint_is_saved_where_the_lowest_value_so_far_is_found() -> None:
    trainer = selected([3.0, 2.0, 2.0, 2.5, 1.0, 1.5])
    assert trainer.saved == [1, 2, 5] and trainer.stale == 1 and trainer.ended is None
    assert (trainer.best.step, trainer.best.value, trainer.best.persistence) == (5, 1.0, 9.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_the_best(wrong: float) -> None:
    trainer = selected([wrong, 3.0, wrong, 2.0, wrong])
    assert trainer.saved == [2, 4] and trainer.best.value == 2.0
    assert selected([wrong] * 3).best is None


def test_a_run_ends_after_so_many_validations_without_a_better_one() -> None:
    trainer = selected([3.0, 2.0, 2.1, math.nan, 2.2, 1.0], patience=3)
    assert trainer.step == 5 and trainer.best.step == 2 and "in 3 validations" in trainer.ended
    assert selected([math.nan, math.nan], patience=2).ended is not None
    assert selected([3.0, 3.1, 2.0, 2.1, 1.0], patience=2).ended is None


@pytest.mark.parametrize(
    ("measure", "at_hand", "kept"), [(MEASURE, True, True), (MEASURE, False, False), ("valid/latent_mse", True, False)]
)
def test_a_resumed_run_forgets_a_best_that_is_gone_or_was_judged_otherwise(
    tmp_path: Path, measure: str, at_hand: bool, kept: bool
) -> None:
    if at_hand:
        (tmp_path / "step_00000004").mkdir()
        (tmp_path / "step_00000004" / "manifest.json").touch()
    trainer: Any = SimpleNamespace(step=6, best=None, stale=0, ended=None)
    trainer.train = SimpleNamespace(steps=10, best=BestConfig(measure=MEASURE, patience=2))
    best = {"step": 4, "measure": measure, "value": 1.0, "persistence": None}
    _resume_selection(trainer, {"best": best, "stale": 2}, tmp_path)
    assert (trainer.best is not None) == (trainer.ended is not None) == kept and trainer.stale == (2 if kept else 0)


def test_a_measure_that_a_validation_lacks_ends_the_run() -> None:
    trainer: Any = SimpleNamespace(step=1, best=None, validated={"valid/other": 1.0})
    with pytest.raises(SharedError, match="the validation has no valid/decoded_vrmse"):
        Selection(BestConfig()).after_step(trainer)


def test_unknown_measures_are_refused_with_those_that_there_are() -> None:
    measures, regimes = ("latent_mse", "persistence_mse", "decoded_vrmse", "persistence_vrmse"), ("a", "b")
    for known in ("valid/latent_mse", "valid/decoded_vrmse", "valid/decoded_vrmse/b"):
        check_measure(BestConfig(measure=known), measures, regimes)
    for unknown in ("valid/latent", "latent_mse", "valid/decoded_vrmse/c", "valid/persistence_vrmse", "", "valid//a"):
        with pytest.raises(ConfigError, match="use valid/latent_mse, valid/decoded_vrmse, or .*valid/latent_mse/a"):
            check_measure(BestConfig(measure=unknown), measures, regimes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"ema": 1.0}, "less than 1"), ({"ema": -0.1}, "greater"), ({"best": {"patience": 2}}, "valid_every=0")],
)
def test_impossible_settings_are_refused(tiny_tree: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    tree = {**tiny_tree, "operator": {**tiny_tree["operator"], "train": {"steps": 3, **settings}}}
    with pytest.raises(ConfigError, match=said):
        config_from_dict(tree)


def test_a_group_that_is_null_can_be_set(tiny_tree: dict[str, Any]) -> None:
    """As in the config.yaml of a run."""
    train = {"steps": 3, "valid_every": 1, "best": None}
    tree = {**tiny_tree, "operator": {**tiny_tree["operator"], "train": train}}
    best = config_from_dict(apply_overrides(tree, ["operator.train.best.patience=2"])).operator.train.best
    assert best == BestConfig(patience=2)
    assert load_config("demo").operator.train.ema == 0


def fields(number: int = 0) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A space of two regimes, the first with a masked scalar and a vector, the second with the scalar; and samples."""
    draw = torch.Generator().manual_seed(number)
    prediction, truth = (torch.randn(3, 3, 4, 4, generator=draw) for _ in range(2))
    static = (torch.rand(3, 1, 4, 4, generator=draw) < 0.3).float()
    channels = [{"a": slice(0, 1), "b": slice(1, 3)}, {"a": slice(0, 1)}]
    space: Any = SimpleNamespace(masks=lambda n: {"a": 0} if n == 0 else {}, channels=lambda n: channels[n])
    return space, prediction, truth, static


def test_vrmse_of_a_sample_is_the_mean_over_the_fields_of_its_regime() -> None:
    """Masked cells and absent fields do not count, whatever stands there."""
    space, prediction, truth, static = fields()
    batch = {"sample": torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0]]), "regime": torch.tensor([1, 0, 0])}
    found = frame_errors(space, batch, prediction, truth, static)
    masked = measure("vrmse", prediction[1:, :1], truth[1:, :1], exists=static[1:, 0, None] == 0)
    expected = torch.stack((masked, measure("vrmse", prediction[1:, 1:], truth[1:, 1:]))).mean(0)
    torch.testing.assert_close(found[1:], expected)
    torch.testing.assert_close(found[:1], measure("vrmse", prediction[:1, :1], truth[:1, :1]))
    hidden = torch.cat((torch.where(static == 1, torch.nan, prediction[:, :1]), prediction[:, 1:]), 1)
    torch.testing.assert_close(frame_errors(space, batch, hidden, truth, static)[1:], expected)


def test_what_does_not_vary_is_left_out_and_what_is_not_finite_is_infinite() -> None:
    space, prediction, truth, static = fields(1)
    still = truth.clone()
    still[0, 2], still[1, 1:], still[2] = 5.0, 0.0, 1.0  # a component, a field, all
    found = field_vrmse(space, 0, prediction, still, static)
    scalar = measure("vrmse", prediction[:, :1], still[:, :1], exists=static[:, 0, None] == 0)
    torch.testing.assert_close(found[0], (scalar[0] + measure("vrmse", prediction[:1, 1:2], still[:1, 1:2])[0]) / 2)
    torch.testing.assert_close(found[1], scalar[1])
    assert found[2].isnan() and defined(found, torch.tensor([0, 0, 0]))[0].shape == (2,)
    prediction[0, 1, 0, 0] = torch.nan
    assert field_vrmse(space, 0, prediction, truth, static)[0] == torch.inf


def test_the_plan_counts_the_average() -> None:
    sizes = [make_plan(load_config("demo", [f"operator.train.ema={ema}"])).stage.memory.optimizer for ema in (0, 0.99)]
    assert sizes[1] == pytest.approx(sizes[0] * 16 / 12)
