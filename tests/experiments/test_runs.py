"""From a study file to runs: everything equal but what is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published import published

from shodh.config import RunConfig, config_from_dict, to_dict
from shodh.core.errors import ConfigError
from shodh.experiments.harness.flops import BACKWARD, flop_counter, forward_flops, sample_inputs, step_flops
from shodh.experiments.harness.run import Run
from shodh.experiments.harness.settings import load_settings
from shodh.experiments.harness.sizes import TOLERANCE, model_size
from shodh.experiments.transfer.runs import expand
from shodh.experiments.transfer.settings import StudyConfig
from shodh.models.factory import build_operator
from shodh.models.init import initialise

ROOT = Path(__file__).resolve().parents[2]
ALL = ["sparse", "dense_active", "dense_total", "specialist", "specialist_share", "sparse_hash", "sparse_frozen"]
ALL += ["sparse_oracle"]
BOTH = ["open_channel", "porous_media"]
STUDIES = sorted((ROOT / "launch" / "configs").glob("study_*.yaml"))
STUDIES = [path for path in STUDIES if "kind" not in yaml.safe_load(path.read_text())]  # Maps have a test of their own.


@pytest.fixture
def study_file(tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    """``study_file(**changes)`` writes a study of the tiny configuration."""
    base = write_config(tmp_path / "base.yaml")

    def write(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        tree = {"name": "s", "question": "?", "base": str(base), "mixes": {"both": BOTH}, "models": ALL, **changes}
        path.write_text(yaml.safe_dump({**tree, "out": str(tmp_path / "runs")}))
        return path

    return write


def load_study(path: Path, scale: Any = "tiny", **changes: Any) -> StudyConfig:
    return load_settings(StudyConfig, path, scale, **changes)


def by_name(runs: list[Run]) -> dict[str, Run]:
    assert len({run.name for run in runs}) == len(runs)
    return {run.name: run for run in runs}


def test_runs_differ_in_what_is_compared_and_in_nothing_else(study_file: Callable[..., Path]) -> None:
    runs = by_name(expand(load_study(study_file(seeds=2))))
    assert len(runs) == 2 * (6 + 2 * 2)
    sparse, dense = (to_dict(runs[f"both-{m}-s1"].config) for m in ("sparse", "dense_active"))
    assert dense["operator"]["experts"].pop("num_experts") == 0
    assert sparse["operator"]["experts"].pop("num_experts") == 4
    for tree in (sparse, dense):
        del tree["name"]
    assert sparse == dense
    first, second = (to_dict(runs[f"both-sparse-s{s}"].config) for s in (0, 1))
    assert {k for k in first if first[k] != second[k]} == {"name", "seed"}
    assert len({run.config.tokenizer_dir for run in runs.values()}) == 1


def test_specialists_have_all_steps_or_the_steps_of_their_share(study_file: Callable[..., Path]) -> None:
    runs = by_name(expand(load_study(study_file(seeds=1))))
    whole, share = runs["porous_media-specialist-s0"], runs["porous_media-specialist_share2-s0"]
    assert [r.name for r in whole.config.data.regimes] == ["porous_media"] == list(share.labels["regimes"])
    assert (whole.config.operator.train.steps, share.config.operator.train.steps) == (10, 5)


def test_specialist_of_a_part_of_the_batch_sees_what_the_mix_has_of_its_regime(study_file: Callable[..., Path]) -> None:
    study = load_study(study_file(seeds=1, models=["dense_active", "specialist_batch"]))
    runs = by_name(expand(study))
    mixed, alone = (runs[name].config for name in ("both-dense_active-s0", "porous_media-specialist_batch2-s0"))
    assert [r.name for r in alone.data.regimes] == ["porous_media"]
    trains = [to_dict(config.operator)["train"] for config in (mixed, alone)]
    assert [train.pop("global_batch") for train in trains] == [8, 4]
    assert trains[0] == trains[1], "all steps, at the same rates"
    with pytest.raises(ConfigError, match="specialist_batch2-s0: a batch of 8 samples .* each of 2 regimes on 8 ranks"):
        expand(study, world_size=8)


def test_models_are_of_the_size_that_their_name_says(study_file: Callable[..., Path]) -> None:
    runs = by_name(expand(load_study(study_file(seeds=1))))
    size = {
        m: model_size(runs[f"both-{m}-s0"].config) for m in ("sparse", "dense_active", "dense_total", "sparse_hash")
    }
    # A hash router has no weights, so what is left must agree to the last one.
    assert size["sparse_hash"]["active_parameters"] == size["dense_active"]["total_parameters"]
    assert size["sparse_hash"]["total_parameters"] == size["dense_total"]["total_parameters"]
    assert size["sparse"]["total_parameters"] > size["sparse_hash"]["total_parameters"]


def test_dense_router_has_as_many_parameters_as_the_sparse_model_active(study_file: Callable[..., Path]) -> None:
    runs = by_name(expand(load_study(study_file(seeds=1, models=["sparse", "dense_router"], routers=["two_level"]))))
    sparse, dense = (model_size(runs[f"both-{m}-s0"].config) for m in ("sparse-two_level", "dense_router"))
    assert dense["total_parameters"] == dense["active_parameters"]
    assert dense["total_parameters"] == pytest.approx(sparse["active_parameters"], rel=TOLERANCE)


def test_dense_router_makes_up_for_the_large_gate_of_moe_pot(study_file: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    tree = yaml.safe_load(base.read_text())
    operator = {"kind": "moe_pot", "dim": 64, "depth": 2, "heads": 4, "patch": 8, "field": {"mlp": 64, "decoder": 8}}
    operator["experts"] = {"router": {"gate": "conv", "score": "softmax"}}
    base.write_text(yaml.safe_dump({**tree, "operator": {**published(operator), "train": {"steps": 5}}}))
    runs = by_name(expand(load_study(study_file(seeds=1, models=["sparse", "dense_active", "dense_router"]))))
    sparse, narrow, wide = (
        model_size(runs[f"both-{m}-s0"].config)["active_parameters"] for m in ("sparse", "dense_active", "dense_router")
    )
    assert wide == pytest.approx(sparse, rel=TOLERANCE)
    assert narrow < 0.95 * sparse

    dpot = expand(load_study(study_file(seeds=1, models=["dpot"])))[0].config
    assert dpot.operator.kind == "dpot"
    assert model_size(dpot)["total_parameters"] == pytest.approx(sparse, rel=TOLERANCE)


def test_dpot_is_compared_with_a_moe_pot_alone(study_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="base run of kind moe_pot, not latent_transformer"):
        expand(load_study(study_file(models=["dpot"])))


def test_dense_router_says_where_no_width_fits(study_file: Callable[..., Path]) -> None:
    """Hidden widths that come in halves are multiples of 16: too coarse for a model this small."""
    study = load_study(study_file(models=["dense_router"]), overrides=["operator.experts.activation=gelu"])
    with pytest.raises(ConfigError, match="equal active size: experts.hidden=.* not within 1%"):
        expand(study)


def test_what_is_compared_with_has_the_experts_of_the_first_variant(study_file: Callable[..., Path]) -> None:
    models = ["sparse", "dense_total", "sparse_hash", "sparse_oracle"]
    runs = by_name(expand(load_study(study_file(seeds=1, models=models, experts=[8, 4], balances=["none", "both"]))))
    found = {m: runs[f"both-{m}-s0"].config.operator.experts for m in models[1:]}
    assert found["sparse_hash"].num_experts == found["sparse_oracle"].num_experts == 8
    assert found["sparse_hash"].balance.switch == found["sparse_oracle"].balance.switch == 0.0
    size = model_size(runs["both-dense_total-s0"].config)["total_parameters"]
    assert size == model_size(runs["both-sparse_hash-s0"].config)["total_parameters"]


def test_oracle_gets_a_group_for_each_regime(study_file: Callable[..., Path]) -> None:
    three = [{"name": n, "path": "absent"} for n in "abc"]
    study = load_study(study_file(seeds=1, models=["sparse_oracle"], regimes=three, mixes={"all": list("abc")}))
    experts = expand(study)[0].config.operator.experts
    assert (experts.router.kind, experts.router.groups, experts.num_experts) == ("oracle", 3, 6)


def test_axes_vary_the_sparse_model_alone(study_file: Callable[..., Path]) -> None:
    changes = {
        "routers": ["token", "two_level", "operator"],
        "balances": ["switch"],
        "experts": [2, 4],
        "groups": [2, 4],
    }
    runs = expand(load_study(study_file(seeds=1, models=["sparse", "dense_active"], **changes)))
    names = {run.labels["label"] for run in runs}
    sizes = ("e2-g2", "e4-g2", "e4-g4")
    grouped = {f"sparse-{kind}-switch-{size}" for kind in ("two_level", "operator") for size in sizes}
    assert names == {"dense_active", "sparse-token-switch-e2", "sparse-token-switch-e4", *grouped}
    found = next(c for c in runs if c.labels["label"] == "sparse-two_level-switch-e4-g4").config.operator.experts
    assert (found.num_experts, found.router.groups, found.balance.information) == (4, 4, 0.0)


def test_controls_of_a_study_of_clusters_are_given_no_clusters(study_file: Callable[..., Path]) -> None:
    router = "operator.experts.router={kind: operator, groups_by: clusters, cluster_samples: 64}"
    study = load_study(study_file(seeds=1, models=["sparse", "sparse_hash", "sparse_oracle"], set=[router]))
    routers = [run.config.operator.experts.router for run in expand(study)]
    by = {(router.kind, router.groups_by, router.cluster_samples) for router in routers}
    assert by == {("operator", "clusters", 64), ("hash", "clusters", 1024), ("oracle", "clusters", 1024)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modles": []}, "did you mean 'models'?"),
        ({"scales": {"small": {"sets": []}}}, "did you mean 'set'?"),
        ({"scales": {"small": {"set": 3}}}, "at scale small: set: "),
        ({"scales": {"large": {}}}, "scales.large"),
        ({"models": ["spare"]}, "models"),
        ({"mixes": {"both": ["open_channel", "ocean"]}}, "unknown regimes ['ocean']"),
        ({"mixes": {"both": ["heat", "heat"]}}, "repeated regimes"),
        ({"groups": [2]}, "add one to routers"),
        ({"base": "absent.yaml"}, "cannot read configuration absent.yaml"),
        ({"experts": [3], "routers": ["two_level"]}, "run both-sparse-two_level-e3-s0"),
    ],
)
def test_impossible_studies_are_refused_by_name(
    study_file: Callable[..., Path], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(load_study(study_file(**changes)))
    assert expected in str(caught.value)


def test_scale_with_a_base_of_its_own_leaves_the_studys_changes_behind(study_file: Callable[..., Path]) -> None:
    path = study_file(set=["operator.train.steps=7"], scales={"paper": {"base": "x.yaml", "seeds": 5}})
    paper = load_study(path, "paper", overrides=["seed=1"])
    assert (str(paper.base), paper.set, paper.overrides, paper.name) == ("x.yaml", (), ("seed=1",), "s-paper")
    assert paper.seeds == 5
    assert load_study(path).set == ("operator.train.steps=7",)
    with pytest.raises(ConfigError, match="not defined at scale small"):
        load_study(path, "small")


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_every_study_of_the_project_expands(path: Path, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study: StudyConfig = load_study(path, scale)
    runs = by_name(expand(study, world_size=8 if scale == "paper" else 1))
    assert len({run.labels["seed"] for run in runs.values()}) == study.seeds >= 3
    assert {run.labels["model"] for run in runs.values()} == set(study.models)


def moe_pot(tree: dict[str, Any], **experts: Any) -> RunConfig:
    operator = {"kind": "moe_pot", "dim": 32, "depth": 2, "heads": 2, "patch": 4, "field": {"mlp": 32, "decoder": 8}}
    return config_from_dict({**tree, "operator": published({**operator, "experts": experts, "train": {"steps": 1}})})


@pytest.mark.parametrize("kind", ["token", "context", "frozen", "hash"])
def test_work_of_the_sparse_model_is_what_its_real_forward_pass_does(tiny_tree: dict[str, Any], kind: str) -> None:
    """Against the counter on the routed model itself, with real tokens; its attention is not counted on a CPU."""
    tree = {**tiny_tree, "operator": {**tiny_tree["operator"], "experts": {"hidden": 32, "router": {"kind": kind}}}}
    config = config_from_dict(tree)
    counted = _counted(config)
    tokens, operator = 8, config.operator
    attention = 4 * operator.depth * tokens**2 * operator.dim
    assert forward_flops(config) == pytest.approx(counted + attention, rel=0.005)


@pytest.mark.parametrize("top_k", [2, 4])
def test_work_of_moe_pot_grows_with_top_k_as_its_real_forward_pass_does(tiny_tree: dict[str, Any], top_k: int) -> None:
    config = moe_pot(tiny_tree, num_experts=16, top_k=top_k)
    assert forward_flops(config) == pytest.approx(_counted(config), rel=0.005)


def _counted(config: RunConfig) -> int:
    model = build_operator(config).eval()
    initialise(model, 0)
    history, static = sample_inputs(config, "cpu")
    torch.manual_seed(0)
    with (
        flop_counter() as counter,
        torch.no_grad(),
    ):
        model(history.normal_(), static.zero_())
    return int(counter.get_total_flops())


def test_backward_pass_costs_twice_the_forward_pass(tiny_tree: dict[str, Any]) -> None:
    """But for the gradient of the first map's input, which nobody needs; hence at most, and nearly."""
    operator = {**tiny_tree["operator"], "mixer": "fourier", "experts": {"num_experts": 0, "hidden": 64}}
    config = config_from_dict({**tiny_tree, "operator": operator})
    model = build_operator(config)
    initialise(model, 0)
    history, static = (x.normal_() for x in sample_inputs(config, "cpu"))
    with flop_counter() as counter:
        model(history, static).latent.square().mean().backward()
    both = forward_flops(config) * (1 + BACKWARD)
    assert 0.85 * both < counter.get_total_flops() <= both
    assert step_flops(config) == both * config.operator.train.global_batch
