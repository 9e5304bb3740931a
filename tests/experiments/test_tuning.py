"""Fine-tuning settings, runs and report, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from published import TINY_MOE_POT
from safetensors.torch import save_file

from shodh.config import load_config, to_dict
from shodh.core.errors import CheckpointError, ConfigError, TopologyError
from shodh.experiments.finetuning.base import Base, open_base, regimes_of
from shodh.experiments.finetuning.measure import count_trained
from shodh.experiments.finetuning.report import write_tuning_report
from shodh.experiments.finetuning.runs import (
    SCRATCH,
    ZERO_SHOT,
    describe_runs,
    draw_trajectories,
    expand_tuning,
)
from shodh.experiments.finetuning.settings import TuningConfig, load_tuning
from shodh.experiments.harness.run import Run
from shodh.models.factory import build_operator
from shodh.models.init import initialise


@pytest.fixture
def run(tmp_path: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    """``run(**operator)`` writes a run folder of the first tiny regime, with fresh weights as its checkpoint."""

    def write(**operator: Any) -> Path:
        path = write_config(tmp_path / "base.yaml")
        tree = yaml.safe_load(path.read_text())
        tree["operator"] = {**TINY_MOE_POT, **operator}
        tree["data"]["regimes"] = tree["data"]["regimes"][:1]
        folder = tmp_path / "runs" / "base"
        checkpoint = folder / "checkpoints" / "step_00000002"
        checkpoint.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        model = build_operator(load_config(folder / "config.yaml"))
        initialise(model, 0)
        save_file({n: p.detach().clone() for n, p in model.named_parameters()}, checkpoint / "model.safetensors")
        manifest = {"tag": checkpoint.name, "files": {}, "state": {"step": 2}, "topology": {}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        (folder / "latest").write_text(checkpoint.name)
        return folder

    return write


def settings(run: Path, tiny_data: Path, **changes: Any) -> TuningConfig:
    regimes = [{"name": "unseen", "path": str(tiny_data / "porous_media")}]
    tree = {
        "run": run,
        "out": run.parent,
        "name": "tuned",
        "regimes": regimes,
        "trajectories": [1, 3],
        "seeds": 2,
        **changes,
    }
    return load_tuning(None, **tree)


def expanded(run: Path, tiny_data: Path, world: int = 1, **changes: Any) -> dict[str, Run]:
    tuning = settings(run, tiny_data, **changes)
    runs = expand_tuning(tuning, open_base(tuning.run, tuning.checkpoint), world)
    found = {one.name: one for one in runs}
    assert len(found) == len(runs)
    return found


def test_runs_differ_in_what_learns_and_in_nothing_else(run: Callable[..., Path], tiny_data: Path) -> None:
    runs = expanded(run(), tiny_data)
    assert len(runs) == 2 * 2 * 5
    same = {
        name: to_dict(one.config) for name, one in runs.items() if one.labels["seed"] == 0 and one.labels["count"] == 3
    }
    for tree in same.values():
        for key in ("name", "finetune"):
            del tree[key]
        del tree["operator"]["experts"], tree["operator"]["train"]["lr"]
    assert len({json.dumps(tree, sort_keys=True) for tree in same.values()}) == 1
    rates = {one.labels["method"]: one.config.operator.train.lr for one in runs.values()}
    assert rates == pytest.approx({ZERO_SHOT: 1e-3, "all": 1e-4, "experts": 1e-3, "new_expert": 1e-3, SCRATCH: 1e-3})
    assert {c.labels["method"]: not c.weights for c in runs.values()} == {m: m == SCRATCH for m in rates}
    assert runs["unseen-n1-new_expert-s0"].config.operator.experts.num_added == 1


def test_a_frozen_router_is_still(run: Callable[..., Path], tiny_data: Path) -> None:
    runs = expanded(run(), tiny_data)
    for way, still in (("all", False), ("experts", True), ("new_expert", True)):
        experts = runs[f"unseen-n1-{way}-s0"].config.operator.experts
        schedule = experts.router.temperature_schedule
        assert schedule is not None and (schedule.decay == 1.0) == still
        assert (set(to_dict(experts.balance).values()) == {0.0}) == still
    router = expanded(runs["unseen-n1-all-s0"].weights[0].parents[1], tiny_data, router=True)
    assert router["unseen-n1-experts-s0"].config.operator.experts.balance.cv2 == 0.1


def test_trajectories_are_nested_drawn_by_seed_and_shared_by_all_methods(
    run: Callable[..., Path], tiny_data: Path
) -> None:
    runs = expanded(run(), tiny_data, trajectories=[1, 2], seeds=4)
    drawn: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for one in runs.values():
        (regime,) = one.config.data.regimes
        assert regime.trajectories is not None and len(regime.trajectories) == one.labels["count"]
        drawn.setdefault((one.labels["seed"], one.labels["count"]), set()).add(regime.trajectories)
    assert all(len(found) == 1 for found in drawn.values())
    for seed in range(4):
        (one,), (two,) = drawn[(seed, 1)], drawn[(seed, 2)]
        assert two[: len(one)] == one
    assert len(set().union(*(drawn[(seed, 2)] for seed in range(4)))) > 1


def test_experts_of_a_converted_or_moved_run_and_sizes(run: Callable[..., Path], tiny_data: Path) -> None:
    runs = expanded(run(), tiny_data)
    sizes = {c.labels["method"]: count_trained(c.config, trains=c.labels["method"] != ZERO_SHOT) for c in runs.values()}
    base = sizes[SCRATCH]["total"]
    added = 16 * 1 + 16 * 16 + 16  # gate, map and bias of one expert of width 16 in one layer
    assert sizes["new_expert"] == {"total": base + added, "trained": added}
    assert sizes["experts"] == {"total": base, "trained": 4 * (16 * 16 + 16)}
    assert sizes[ZERO_SHOT] == {"total": base, "trained": 0} and sizes["all"]["trained"] == base
    tuning = settings(runs["unseen-n1-all-s0"].weights[0].parents[1], tiny_data)
    text = describe_runs(tuning, list(runs.values()))
    assert "20 runs" in text and "unseen-n3-scratch-s1" in text


@pytest.mark.parametrize(
    ("operator", "changes", "error", "expected"),
    [
        (
            {"experts": {"num_experts": 0}},
            {},
            ConfigError,
            "run unseen-n1-experts-s0: finetune.train=experts: the model",
        ),
        ({}, {"trajectories": [1, 4]}, ConfigError, "--trajectories 4: regime 'unseen' has 3 training trajectories"),
        ({}, {"set": ["parallel.ep_size=3"]}, TopologyError, "ep_size=3 needs at least 3 ranks"),
        ({}, {"set": ["data.history=0"]}, ConfigError, "data.history"),
        ({}, {"checkpoint": "step_9"}, CheckpointError, "has no checkpoint 'step_9'"),
        ({}, {"train": ["all", "all"]}, ConfigError, "train are repeated"),
        ({"experts": {"num_experts": 4, "top_k": 2, "num_added": 1}}, {}, ConfigError, "has added experts already"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    run: Callable[..., Path],
    tiny_data: Path,
    operator: dict[str, Any],
    changes: dict[str, Any],
    error: type[Exception],
    expected: str,
) -> None:
    with pytest.raises(error) as caught:
        expanded(run(**operator), tiny_data, **changes)
    assert expected in str(caught.value)


def test_a_dense_model_is_tuned_whole(run: Callable[..., Path], tiny_data: Path) -> None:
    runs = expanded(run(kind="dpot", experts={"num_experts": 0}), tiny_data, train=["all"])
    assert {one.labels["method"] for one in runs.values()} == {ZERO_SHOT, "all", SCRATCH}


def test_regimes_of_the_command_line(run: Callable[..., Path], tiny_data: Path, tmp_path: Path) -> None:
    base = open_base(run())
    setting = f"unseen={tiny_data / 'porous_media'}"
    (regime,) = regimes_of([setting], [], base)
    assert regime.path == tiny_data / "porous_media" and regime.only is None
    (renamed,) = regimes_of([setting], ["unseen.tracer=solid"], base)
    assert renamed.fields == {"tracer": "solid"}
    for regimes, maps, expected in (
        (["unseen"], [], "expected NAME=PATH"),
        ([f"unseen={tmp_path / 'absent'}"], [], "absent: it does not exist"),
        ([setting], ["unseen.tracer"], "--map 'unseen.tracer': expected REGIME.OURS=THEIRS"),
        ([setting], ["other.tracer=x"], "no regime 'other' is given"),
        ([setting], ["unseen.tracer=smoke"], r"tracer=smoke: the run has the fields \['velocity'"),
    ):
        with pytest.raises(ConfigError, match=expected):
            regimes_of(regimes, maps, base)
    fields = base.config.data.fields[:1] + base.config.data.fields[2:]
    data = base.config.data.model_copy(update={"fields": fields})
    poorer = Base(base.path, base.config.model_copy(update={"data": data}), base.weights)
    with pytest.raises(ConfigError, match=r"has the fields \['tracer'\], which the vocabulary of .* lacks"):
        regimes_of([setting], [], poorer)
    (known,) = regimes_of([f"open_channel={tiny_data / 'porous_media'}"], [], base)
    with pytest.raises(ConfigError, match="give the unseen regime 'open_channel' another name"):
        draw_trajectories(known, base, 0, (1,))


def write_result(one: Run, errors: dict[str, float]) -> None:
    """A finished one whose VRMSE is given by way; its rollout's steps are 2 and 4 times as large, persistence 1."""
    error = errors[one.labels["method"]] * (1 + 0.01 * one.labels["seed"])
    measures = {
        name: {"tracer": {"model": values, "persistence": persistence}}
        for name, values, persistence in (
            ("l2re", error, 1.0),
            ("vrmse", error, 1.0),
            ("rollout", [2 * error, 4 * error], [1.0, 1.0]),
            ("rollout_l2re", [2 * error, None], [1.0, 1.0]),
        )
    }
    values = {
        "run": {"name": one.name, **one.labels},
        "identity": one.identity(),
        "parameters": {"total": 10, "trained": 5},
        "seconds_per_step": 0.1,
        "evaluation": {"regimes": {one.labels["regime"]: measures}},
        # Two trajectories: the second is twice as hard for every way but fine-tuning of everything.
        "by_trajectory": {"vrmse": {"tracer": [error, error if one.labels["method"] == "all" else 2 * error]}},
    }
    one.config.run_dir.mkdir(parents=True)
    (one.config.run_dir / "result.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("scratch", "verdict"), [(0.8, "lowers"), (0.2, "raises"), (0.4, "makes no difference")])
def test_report_states_what_the_runs_say(
    run: Callable[..., Path], tiny_data: Path, scratch: float, verdict: str
) -> None:
    tuning = settings(run(), tiny_data, seeds=3, trajectories=[1, 2])
    runs = expand_tuning(tuning, open_base(tuning.run))
    errors = {ZERO_SHOT: 0.9, "all": 0.4, "experts": 0.5, "new_expert": 0.6, SCRATCH: scratch}
    absent = "unseen-n1-experts-s2"
    for one in runs:
        if one.name != absent:
            write_result(one, errors)
    text = write_tuning_report(tuning, runs)
    assert f"Starting from the trained run {verdict}" in text
    summary = json.loads((tuning.folder / "report" / "summary.json").read_text())
    assert summary["missing"] == {absent: "not run yet"}
    table = summary["errors"]["errors"]
    assert [row["method"] for row in table[:6]] == [ZERO_SHOT, "all", "experts", "new_expert", SCRATCH, "persistence"]
    by_method = {row["method"]: row for row in table if row["trajectories"] == 2}
    assert by_method["all"]["VRMSE"] == pytest.approx(0.404) and by_method["persistence"]["VRMSE"] == 1
    assert by_method["all"]["VRMSE rollout"] == pytest.approx(3 * 0.404)
    assert by_method["all"]["L2RE rollout"] is None, "a rollout that diverged has no error"
    assert [row["seeds"] for row in table if row["method"] == "experts"] == [2, 3]
    compared = [r for r in summary["claims"]["claims"] if r["trajectories"] == 2 and r["measure"] == "VRMSE"]
    ratios = {(r["method"], r["against"]): r["ratio"] for r in compared}
    assert ratios[("experts", ZERO_SHOT)] == pytest.approx(0.5 / 0.9)
    assert ratios[("all", SCRATCH)] == pytest.approx(0.4 / scratch)
    nested = {(r["method"], r["against"]): (r["nested low"], r["nested high"]) for r in compared}
    assert nested[("all", SCRATCH)] == pytest.approx((0.4 / (2 * scratch), 0.4 / scratch))
    assert nested[("experts", ZERO_SHOT)] == pytest.approx((0.5 / 0.9,) * 2)  # Alike in every trajectory.
    long = [r for r in summary["claims"]["claims"] if r["measure"] == "VRMSE rollout"]
    assert all(r["nested low"] is None for r in long), "these results do not know the rollouts of trajectories"
    files = {path.name for path in (tuning.folder / "report").iterdir()}
    assert {
        "index.html",
        "errors.csv",
        "claims.csv",
        "results.csv",
        "error_by_trajectories.png",
        "runs_missing.csv",
    } <= files
