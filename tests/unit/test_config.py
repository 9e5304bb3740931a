"""The configuration: strict, overridable, and the same after a round trip through YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from published import published

from shodh.config import apply_overrides, config_from_dict, dump_config, load_config, load_kept_config, to_dict
from shodh.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TWO_LEVEL = {"router": {"kind": "two_level", "groups": 2}}


def minimal(**more: Any) -> dict[str, Any]:
    return {"name": "run", "data": {"regimes": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}]}, **more}


GRIDS = ("study_", "ccm_", "finetune_")  # of runs, not runs
RUNS = sorted(p for p in (ROOT / "launch" / "configs").glob("*.yaml") if not p.name.startswith(GRIDS))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_configuration_of_the_project_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"opertor": {}}, "unknown key 'opertor': did you mean 'operator'?"),
        ({"operator": {"experts": {"topk": 1}}}, "unknown key 'operator.experts.topk': did you mean 'top_k'?"),
        ({"operator": {"train": {"steps": 1, "lerning_rate": 1}}}, "unknown key 'operator.train.lerning_rate'"),
        ({"operator": {"experts": {"router": {"kinds": "token"}}}}, "did you mean 'kind'?"),
        ({"parallel": {"ep-size": 2}}, "did you mean 'ep_size'?"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_match(place: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(minimal(**place), "some.yaml")
    assert message in str(caught.value) and str(caught.value).startswith("some.yaml: ")


def test_unknown_key_in_a_list_of_sections_is_found() -> None:
    tree = minimal()
    tree["data"]["regimes"][1]["shere"] = 2
    with pytest.raises(ConfigError, match="'data.regimes.1.shere'.*'share'"):
        config_from_dict(tree)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(minimal(sed=1, operator={"dimm": 2, "depth": 0}))
    assert all(text in str(caught.value) for text in ("'sed'", "'operator.dimm'", "operator.depth"))
    assert "\n" not in str(caught.value)


TWO_LEVEL = {"kind": "two_level", "groups": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"grid": [30, 32, 32]}}, r"grid \[30, 32, 32\].*\[30\] do not fit"),
        ({"data": {"grid": [24, 32, 32]}, "operator": {"patch": 2}}, "multiples of 16"),
        ({"data": {"regimes": []}}, "at least 1 item"),
        ({"data": {"fields": [{"name": "solid", "static": True}]}}, "changes in time"),
        ({"operator": {"dim": 60, "heads": 8}}, "dim=60 is not divisible by heads=8"),
        ({"operator": {"dim": 60, "heads": 20}}, "even head size"),
        ({"operator": {"dim": 36, "heads": 2}}, "dim=36 must be a multiple of 8"),
        ({"operator": {"experts": {"hidden": 12}}}, "experts.hidden=12 must be a multiple of 8"),
        ({"operator": {"experts": {"num_experts": 2, "top_k": 3}}}, "top_k=3 is more than num_experts=2"),
        ({"operator": {"experts": {"num_experts": 3, "router": TWO_LEVEL}}}, "num_experts=3 is not divisible by"),
        ({"operator": {"experts": {"num_experts": 4, "top_k": 3, "router": TWO_LEVEL}}}, "2 experts of a group"),
        ({"operator": {"train": {"steps": 10, "lr": -1}}}, r"operator.train.lr.*given -1"),
        (
            {"operator": {"experts": {"router": {"kind": "noisy_topk"}}}},
            "score softmax, normalise after.*top_k of at least 2",
        ),
        (
            {"operator": {"experts": {"router": {"kind": "noisy_topk", "score": "softmax", "normalise": "after"}}}},
            "no gradient; use top_k of at least 2$",
        ),
        ({"operator": {"train": {}}}, "missing key 'operator.train.steps'"),
        ({"name": "../elsewhere"}, "name"),
    ],
)
def test_impossible_settings_are_refused_with_their_numbers(changes: dict[str, Any], message: str) -> None:
    tree = minimal()
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if key == "data" else value
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tree)


def test_repeated_and_unknown_names_of_regimes_and_fields_are_refused() -> None:
    tree = minimal()
    tree["data"]["regimes"].append({"name": "a", "path": "elsewhere"})
    with pytest.raises(ConfigError, match=r"data.regimes has repeated names \['a'\]"):
        config_from_dict(tree)
    tree["data"]["regimes"][-1] = {"name": "c", "path": "c", "fields": {"velocty": "u"}}
    with pytest.raises(ConfigError, match="maps 'velocty', which is not in data.fields"):
        config_from_dict(tree)


@pytest.mark.parametrize("name", ["a/b", "..", "", "two words"])
@pytest.mark.parametrize("what", ["fields", "regimes"])
def test_name_that_cannot_go_into_files_and_weights_is_refused(what: str, name: str) -> None:
    changes: dict[str, Any] = {what: [{"name": name}]} if what == "fields" else {what: [{"name": name, "path": "x"}]}
    with pytest.raises(ConfigError, match=f"data.{what}.0.name"):
        config_from_dict(minimal(data={"regimes": [{"name": "a", "path": "x"}], **changes}))


@pytest.mark.parametrize("wrong", [{"boundary": ["loop"] * 3}, {"nme": "a", "path": "x"}, {"name": "a/b"}])
def test_a_list_whose_items_failed_is_not_called_too_short(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(minimal(data={"regimes": [{"name": "a", "path": "x", **wrong}]}))
    assert "data.regimes.0" in str(caught.value) and "at least 1 item" not in str(caught.value)


def test_split_without_training_trajectories_is_refused() -> None:
    regime = {"name": "a", "path": "x", "split": [0, 0.5, 0.5]}
    with pytest.raises(ConfigError, match="share of the training trajectories"):
        config_from_dict(minimal(data={"regimes": [regime]}))


def test_a_router_that_goes_by_changes_needs_two_frames() -> None:
    one = {**minimal()["data"], "history": 1}
    experts = {"router": {"kind": "operator"}}
    with pytest.raises(ConfigError, match=r"data.history=1: .*use data.history of at least 2"):
        config_from_dict(minimal(data=one, operator={"experts": experts}))
    dense = minimal(data=one, operator={"experts": {**experts, "num_experts": 0}})
    assert config_from_dict(dense).data.history == 1


def test_dense_model_needs_no_fitting_groups() -> None:
    assert config_from_dict(minimal(operator={"experts": {"num_experts": 0, "top_k": 3}})).operator.experts.top_k == 3


def test_overrides_reach_nested_keys_and_list_items_and_are_read_as_yaml() -> None:
    tree = {"a": {"b": [{"c": 1}, {"c": 2}], "keep": 0}}
    changed = apply_overrides(tree, ["a.b.1.c=[1, 2]", "a.new.deep=3.5e-2", "x=null", "a.t=a=b"])
    assert changed == {"a": {"b": [{"c": 1}, {"c": [1, 2]}], "keep": 0, "new": {"deep": 0.035}, "t": "a=b"}, "x": None}
    assert tree == {"a": {"b": [{"c": 1}, {"c": 2}], "keep": 0}}


@pytest.mark.parametrize("item", ["seed", "=3", "a.b.9.c=1", "a.b.first=1", "a.keep.deeper=1", "seed=[1"])
def test_override_without_a_place_or_value_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"a": {"b": [{"c": 1}], "keep": 0}}, [item])


def test_override_of_a_configuration_file_is_validated(write_config: Callable[..., Path], tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml")
    assert load_config(path, ["operator.train.steps=77", "data.regimes.0.share=3"]).operator.train.steps == 77
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        load_config(path, ["operator.train.step=77"])


@pytest.mark.parametrize(
    ("written", "name"), [("2024", "2024"), ("2024-05-01", "2024-05-01"), ("true", None), ("1.5", None)]
)
def test_a_name_of_digits_is_a_name(
    written: str, name: str | None, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_config(tmp_path / "c.yaml")
    if name is None:
        with pytest.raises(ConfigError, match="name: "):
            load_config(path, [f"name={written}"])
    else:
        assert load_config(path, [f"name={written}"]).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [("name: [", "not valid YAML"), ("- a\n- b", "expected a mapping"), ("", "expected a mapping"), ("3", "mapping")],
)
def test_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "bad.yaml" in str(caught.value)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml.*No such file"):
        load_config(tmp_path / "absent.yaml")


def test_resolved_copy_holds_every_default() -> None:
    config = config_from_dict(minimal())
    written = yaml.safe_load(dump_config(config))
    assert written["operator"]["experts"]["router"]["temperature"] == config.operator.experts.router.temperature
    assert written["tokenizer"]["train"]["betas"] == [0.9, 0.95]
    assert config_from_dict(written) == config


@pytest.mark.parametrize(("kind", "metric"), [("latent_transformer", "whitened"), ("unet", "variance")])
def test_a_run_of_before_the_metric_was_named_keeps_the_one_it_had(tmp_path: Path, kind: str, metric: str) -> None:
    operator = published({"kind": kind, "dim": 8, "depth": 1}) if kind == "unet" else {"kind": kind}
    tree = to_dict(config_from_dict(minimal(operator=operator)))
    path = tmp_path / "config.yaml"
    for written, expected in (("decoded" if kind != "unet" else "variance", None), (None, metric)):
        tree["operator"]["metric"] = written
        if written is None:
            del tree["operator"]["metric"]
        path.write_text(yaml.safe_dump(tree))
        assert load_kept_config(path).operator.metric == (expected or written)
