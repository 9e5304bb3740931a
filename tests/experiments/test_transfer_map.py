"""The map of negative transfer: what its runs share, that they go on and stand alone, and what its page concludes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import yaml

from shodh.core.errors import ConfigError
from shodh.core.strict_json import write_json
from shodh.experiments.harness.settings import load_settings
from shodh.experiments.transfer.map.learner import Learner, build_model
from shodh.experiments.transfer.map.parted import PartedTransformer
from shodh.experiments.transfer.map.report import headline
from shodh.experiments.transfer.map.results import Claim, MapResults, Point
from shodh.experiments.transfer.map.runs import MapRun, expand
from shodh.experiments.transfer.map.settings import MapConfig
from shodh.experiments.transfer.map.unseen import nearest, prediction, unseen_section
from shodh.experiments.transfer.map.worker import Group, carry_out, job_of
from shodh.models.init import initialise
from shodh.models.unfolding import fold, unfold
from shodh.physics.opposed import OPPOSED

CPU = torch.device("cpu")
Make = Callable[..., MapConfig]


@pytest.fixture
def study(tmp_path: Path) -> Make:
    """``study(**changes)``: two advections and diffusion, models of one layer, six steps in streams of two."""

    def make(*overrides: str, **changes: Any) -> MapConfig:
        tree = {
            "kind": "map", "name": "m", "question": "?", "out": str(tmp_path), "counts": [2, 3], "dims": [8],
            "seeds": 1, "routers": {"token": {"granularity": "sample"}, "oracle": {"kind": "oracle"}},
            "regimes": ["advection_right", "advection_left", "diffusion"], "grid": 16, "samples": 2, "held_out": 4,
            "gradient_samples": 4, "stream": 2,
            "operator": {"depth": 1, "heads": 2, "train": {"steps": 6, "lr": 0.003, "warmup": 2}},
        }  # fmt: skip
        path = tmp_path / "map.yaml"
        path.write_text(yaml.safe_dump({**tree, **changes}))
        return load_settings(MapConfig, path, "tiny", overrides)

    return make


def pick(runs: Sequence[MapRun], *starts: str) -> list[MapRun]:
    return [run for start in starts for run in runs if run.name.startswith(start)]


def test_specialists_are_shared_by_all_mixes(study: Make) -> None:
    names = [run.name for run in expand(study(fields=["normalised", "raw"], seeds=2))]
    assert len(set(names)) == len(names) == 2 * 2 * (3 + 2 * 5)
    assert sum("diffusion" in name for name in names) == 2 * 2


def test_sizes_are_equal_where_they_are_compared(study: Make) -> None:
    routers = {"operator": {"kind": "operator", "groups_by": "mlp"}, "oracle": {"kind": "oracle"}}
    runs = expand(study(routers=routers))

    def size(start: str, routed: bool = True) -> int:
        (run,) = pick(runs, start)
        return sum(p.numel() for n, p in build_model(run).named_parameters() if routed or ".experts." not in n)

    dense, total, oracle = (size(f"{arm}-k3") for arm in ("dense", "dense_total", "oracle"))
    gate = sum(p.numel() for n, p in build_model(pick(runs, "operator-k3")[0]).named_parameters() if "router." in n)
    assert gate > 1000 and size("dense_router-k3") == pytest.approx(dense + gate, abs=3 * 8)  # A hidden unit.
    assert total == oracle  # The oracle's gate has one choice a group, and is frozen.
    assert dense == size("advection_left") == size("oracle-k3", routed=False) + (oracle - size("oracle-k3", False)) // 3


def test_unfolding_keeps_every_cell() -> None:
    frames = torch.arange(2 * 3 * 64.0).view(2, 3, 1, 8, 8)
    latents = unfold(frames, 4)
    assert latents.shape == (2, 3, 16, 2, 2, 1)
    assert torch.equal(latents[1, 2, :, 1, 0, 0].view(4, 4), frames[1, 2, 0, 4:, :4])
    odd = torch.arange(5 * 6 * 15.0).view(5, 6, 15)
    assert unfold(odd, 3).shape == (45, 2, 5, 1) and torch.equal(fold(unfold(odd, 3), 3), odd)


def test_run_does_not_depend_on_those_beside_it(study: Make, tmp_path: Path) -> None:
    runs = expand(study())
    together = Group(pick(runs, "token-k2", "diffusion", "dense-k3", "dense-k2"), tmp_path / "a", CPU)
    alone = Group(pick(runs, "dense-k2"), tmp_path / "b", CPU)
    for group in (together, alone):
        assert group.train(Event())
    pairs = zip(together.learners[-1].model.parameters(), alone.learners[0].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_killed_group_goes_on_with_the_same_numbers(study: Make, tmp_path: Path) -> None:
    router = {"kind": "operator", "groups_by": "clusters", "cluster_samples": 12}
    runs = pick(expand(study(routers={"operator": router})), "operator-k2", "advection_left")
    straight = Group(runs, tmp_path / "straight", CPU)
    assert straight.train(Event())
    stopped = Event()
    stopped.set()
    done = []
    while True:  # Every time it is stopped after one stream of steps.
        group = Group(runs, tmp_path / "state", CPU)
        done.append(group.done)
        if group.train(stopped):
            break
    assert done == [0, 2, 4]
    for one, other in zip(straight.learners, group.learners, strict=True):
        pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_longer_dense_model_takes_more_steps_beside_the_others(study: Make, tmp_path: Path) -> None:
    runs = pick(expand(study(longer=1.5, dense_total=False)), "dense-k2", "dense_longer-k2")
    assert [run.operator.train.steps for run in runs] == [6, 9]
    together, alone = Group(runs, tmp_path / "a", CPU), Group(runs[:1], tmp_path / "b", CPU)
    for group in (together, alone):
        assert group.train(Event())
    pairs = zip(together.learners[0].model.parameters(), alone.learners[0].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    steps = [int(next(iter(learner.optimizer.state.values()))["step"]) for learner in together.learners]
    assert steps == [6, 9]


def test_parted_model_shares_the_rest(study: Make) -> None:
    """At equal weights it is the dense model; a gradient of its own parameters is that of the regime's samples."""
    (run,) = pick(expand(study()), "dense-k3")
    model = build_model(run)
    initialise(model, 0)
    history, static = torch.randn(7, 2, 16, 4, 4, 1), torch.zeros(7, 0, 4, 4, 1)
    labels = torch.tensor([2, 0, 0, 2, 0, 2, 2])  # In any order, and one regime without a sample.
    parted = PartedTransformer(deepcopy(model), 3, ["blocks.*.attention.*", "head.*"])
    expected, found = model(history, static).latent, parted(history, static, labels).latent
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.arange(7.0).view(-1, 1, 1, 1, 1)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    every = dict(parted.named_parameters())
    for name, parameter in model.named_parameters():
        own = "attention" in name or "head" in name
        copies = [every[f"models.{n}.{name}"].grad for n in range(3 if own else 1)]
        assert own == (f"models.1.{name}" in every)
        assert torch.allclose(sum(c for c in copies if c is not None), parameter.grad, rtol=1e-4, atol=1e-5)
        assert not own or copies[1] is None or not copies[1].any()
    model.zero_grad()
    (model(history[labels == 2], static[labels == 2]).latent * weights[labels == 2]).sum().backward()
    for name in ("head.weight", "blocks.0.attention.qkv.weight"):
        assert torch.allclose(every[f"models.2.{name}"].grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_parted_model_learns_and_goes_on(study: Make, tmp_path: Path) -> None:
    settings = study(apart={"own_ends": ["embed.*", "head.*"]}, unseen=True)
    runs = pick(expand(settings), "own_ends-k3")
    straight, stopped = Group(runs, tmp_path / "a", CPU), Event()
    assert straight.train(Event()) and not straight.others
    stopped.set()
    while not (group := Group(runs, tmp_path / "b", CPU)).train(stopped):
        pass
    pairs = zip(straight.learners[0].model.parameters(), group.learners[0].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    values = group.learners[0].measure(group.frames([("held out", 0)]))
    (dense,) = pick(expand(settings), "dense-k3")
    size = sum(p.numel() for p in build_model(dense).parameters())
    assert values["active"] == size and values["parameters"] == size + 2 * (8 * 32 + 8 + 32 * 8 + 32)


def test_plasticity_is_that_of_a_model_that_goes_on(study: Make) -> None:
    settings = study(plasticity=3, counts=[2])
    runs = pick(expand(settings), "dense-k2", "oracle-k2")
    assert carry_out(job_of(settings, "d8-normalised-s0", runs), CPU, Event())
    dense, oracle = (run.read() for run in runs)
    assert "plasticity" not in oracle and "unseen" not in dense
    assert set(dense["plasticity"]["new"]) == set(OPPOSED) - set(runs[0].regimes)
    # What new weights learn from these samples, step by step, and what no step at all leaves of the mix.
    group = Group(runs[:1], settings.folder / "none", CPU)
    held_out = {"swift": group.others["swift"].samples([("held out", n) for n in range(4)])}
    new = Learner(runs[0], group.others, CPU, ["swift"])
    new.train = new.train.model_copy(update={"steps": 3, "warmup": 1})
    for step, batch in enumerate(group.lessons["swift"]):
        new.step(step, batch)
    assert new.measure(held_out)["errors"]["swift"] == dense["plasticity"]["new"]["swift"]
    assert dense["plasticity"]["trained"]["swift"] != dense["plasticity"]["new"]["swift"]
    untouched = group.learners[0].adapted("swift", group.others, [], new=False).measure(held_out)["errors"]
    assert untouched == group.learners[0].unseen(held_out, group.others)["errors"]


def test_wholly_parted_model_is_its_specialists(study: Make, tmp_path: Path) -> None:
    """Where nothing clips their joint gradient, and Adam's step does not see that the mean is over three regimes."""
    settings = study("operator.train.clip=1e9", "operator.train.betas=[0.9, 0.999]", apart={"own": ["*"]})
    runs = pick(expand(settings), "own-k3", "advection_right", "advection_left", "diffusion")
    group = Group(runs, tmp_path / "a", CPU)
    assert group.train(Event())
    parted, *alone = group.learners
    held_out = group.frames([("held out", number) for number in range(4)])
    found = parted.measure(held_out)["errors"]
    for learner in alone:
        (name,) = learner.regimes
        assert found[name] == pytest.approx(learner.measure(held_out)["errors"][name], rel=1e-3)


def test_result_of_other_patterns_or_lessons_is_refused(study: Make) -> None:
    settings = study(apart={"own": ["head.*"]}, counts=[2], plasticity=1)
    runs = pick(expand(settings), "own-k2", "dense-k2", "advection_left")
    assert carry_out(job_of(settings, "d8-normalised-s0", runs), CPU, Event())
    own, dense, alone = pick(
        expand(study(apart={"own": ["embed.*"]}, counts=[2], plasticity=2)), *(r.name for r in runs)
    )
    with pytest.raises(ConfigError, match="is of other settings of apart"):
        own.read()
    with pytest.raises(ConfigError, match="is of other settings of plasticity"):
        dense.read()
    assert alone.read()


def test_group_stopped_between_results_does_not_train_again(study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = study(counts=[2])
    runs = pick(expand(settings), "dense-k2", "token-k2", "advection_left")
    job, stop = job_of(settings, "d8-normalised-s0", runs), Event()

    def stop_at(path: Path, values: Any) -> None:
        write_json(path, values)
        stop.set()

    monkeypatch.setattr("shodh.experiments.transfer.map.worker.write_json", stop_at)
    assert not carry_out(job, CPU, stop)
    assert sum(run.finished for run in runs) == 1
    monkeypatch.undo()
    monkeypatch.setattr(Learner, "step", lambda *_: pytest.fail("a step is taken again"))
    assert carry_out(job, CPU, Event()) and all(run.finished for run in runs)
    assert not list((settings.folder / "states").glob("*"))


def test_state_of_other_settings_is_not_gone_on_with(study: Make, tmp_path: Path) -> None:
    stopped = Event()
    stopped.set()
    assert not Group(pick(expand(study()), "dense-k2"), tmp_path / "state", CPU).train(stopped)
    changed = pick(expand(study("operator.train.lr=0.1")), "dense-k2")
    assert Group(changed, tmp_path / "state", CPU).done == 0


@pytest.mark.parametrize("fields", ["normalised", "raw"])
def test_loss_is_relative_in_normalised_fields_alone(study: Make, fields: str) -> None:
    (run,) = pick(expand(study(fields=[fields])), "dense-k3")
    group = Group([run], run.result.parent / "state", CPU)
    changes = torch.tensor([group.data[name].change for name in run.regimes])
    expected = 1 / changes if fields == "normalised" else torch.ones(3)
    assert torch.equal(group.learners[0].weights, expected)


def test_gradients_of_one_regime_twice_are_the_same_but_for_noise(study: Make) -> None:
    (run,) = pick(expand(study()), "dense-k2")
    group = Group([run], run.result.parent / "state", CPU)
    learner: Learner = group.learners[0]
    same = group.data["advection_left"].samples([("g", n) for n in range(8)])
    learner.weights = torch.tensor([1.0, 4.0])  # The second regime's loss is the first's times four.
    found = learner.gradients({"advection_right": same, "advection_left": same})
    assert found["corrected"]["advection_right ~ advection_left"] == pytest.approx(1)
    assert found["cosine"]["advection_right ~ advection_left"] == pytest.approx(found["within"]["advection_left"])
    assert found["norm"] == pytest.approx({"advection_right": 0.5, "advection_left": 2.0})
    assert found["norm_floor"]["advection_left"] == pytest.approx(found["norm_floor"]["advection_right"])


def test_finished_group_is_reported_and_kept(study: Make) -> None:
    settings = study()
    runs = expand(settings)
    job = job_of(settings, "d8-normalised-s0", runs)
    assert carry_out(job, CPU, Event()) and all(run.finished for run in runs)
    assert not list((settings.folder / "states").glob("*"))
    times = [run.result.stat().st_mtime_ns for run in runs]
    assert carry_out(job, CPU, Event()) and times == [run.result.stat().st_mtime_ns for run in runs]
    (oracle,) = pick(runs, "oracle-k3")
    assert oracle.read()["information"] == pytest.approx([1.0])
    changed = expand(study("operator.train.steps=7"))[0]
    with pytest.raises(ConfigError, match="is of other settings of operator"):
        changed.read()


def test_regimes_that_a_mix_leaves_out_are_asked_of_models_without_labels(study: Make) -> None:
    routers = {"operator": {"kind": "operator", "cluster_samples": 12}, "oracle": {"kind": "oracle"}}
    settings = study(unseen=True, counts=[3], routers=routers)
    runs = pick(expand(settings), "dense-", "operator-", "oracle-", "diffusion-")
    assert carry_out(job_of(settings, "d8-normalised-s0", runs), CPU, Event())
    dense, operator, oracle, specialist = (run.read() for run in runs)
    assert "unseen" not in oracle and "unseen" not in specialist
    assert set(dense["unseen"]["errors"]) == set(operator["unseen"]["places"]) == set(OPPOSED) - set(settings.regimes)
    assert not dense["unseen"]["places"] and set(operator["places"]) == set(settings.regimes)
    # The error is what the model gives on these samples, over what persistence does.
    group = Group([run for run in expand(settings) if run.arm == "dense"], settings.folder / "none", CPU)
    assert operator["unseen"]["errors"]["swift"] != dense["unseen"]["errors"]["swift"]
    assert len(dense["unseen"]["errors"]["swift"]) == settings.held_out
    swift = group.others["swift"]
    frames = swift.samples([("held out", number) for number in range(512)])
    assert (frames[:, -1] - frames[:, -2]).square().mean() == pytest.approx(swift.change, rel=0.1)
    section = unseen_section(MapResults(settings, runs))
    assert section is not None and len(section.tables["unseen_errors"].rows) == 2 * 13
    assert set(section.tables) == {"unseen_errors", "unseen_places", "unseen_prediction"}


def test_the_nearest_trained_regime_is_that_of_the_cluster() -> None:
    places = {"a": {"cluster": [0, 0, 1, 0]}, "b": {"cluster": [1, 1, 1, 1]}, "c": {"cluster": [2, 0, 2, 2]}}
    strange = {
        "x": {"cluster": [2, 2], "distance": [1.0, 1.5]},
        "y": {"cluster": [1, 0], "distance": [2.0, 4.0]},
        "z": {"cluster": [0, 0], "distance": [9.0, 8.0]},
    }
    unseen = {"errors": {"x": [1.0, 2.0], "y": [3.0, 4.0], "z": [5.0, 7.0]}, "places": strange}
    values = {"places": places, "unseen": unseen}
    assert nearest(values, "x") == ("c", 1.0) and nearest(values, "z") == ("a", 1.0) and nearest(values, "y")[1] == 0.5
    assert prediction(values, samples=False) == pytest.approx(1)
    assert 0.9 < prediction(values, samples=True) < 1


#: Errors of models of three seeds over specialists' by arm.
PLANTED = {"dense": 1.5, "dense_router": 1.45, "dense_total": 1.4, "token": 1.5, "oracle": 1.2}
WIDER = {"dense_router", "token"}  # A router's parameters.


def planted(settings: MapConfig, slope: float = 0.5) -> MapResults:
    """Results with specialists on ``N^-slope``, and `PLANTED` indices, up to a percent by seed and sample."""
    runs = expand(settings)
    for run in runs:
        size = 1000 * run.dim
        jitter = 0.002 * run.seed + 0.001 * (len(run.arm) % 3)
        error = size**-slope * PLANTED.get(run.arm, 1.0) * (1 + jitter)
        squares = [error**2 * factor for factor in (0.9, 1.0, 1.1, 1.0)]
        active = size + 100 * (run.arm in WIDER)
        values = {"errors": dict.fromkeys(run.regimes, squares), "parameters": size, "active": active, "seconds": 1.0}
        write_json(run.result, {"identity": run.identity(), "steps": run.operator.train.steps, **values})
    return MapResults(settings, runs)


def test_indices_laws_and_verdict_are_those_of_the_planted_errors(study: Make) -> None:
    results = planted(study(seeds=3, dims=[8, 16, 32]))
    point = Point("normalised", 3, 16)
    for arm, ratio in PLANTED.items():
        c = results.comparison(point, arm, "specialist")
        assert c is not None and c.ratio == pytest.approx(ratio, rel=0.005)
        interval = results.bootstrap(point, arm, "specialist")
        assert interval is not None and interval.low < c.ratio * 1.001 and interval.high > c.ratio * 0.999
    law = results.law("normalised", "diffusion")
    assert law is not None and law.slope == pytest.approx(0.5, abs=0.01)
    effective = results.effective(point, "dense", "diffusion")
    assert effective is not None and effective[1] is not None
    assert effective[0] == pytest.approx(1.5 / math.sqrt(3), rel=0.01)  # Over a specialist of N / 3.
    assert effective[1] == pytest.approx(1.5**-2, rel=0.02)
    top = headline(results)
    assert top.verdict == "Negative transfer, lowered by oracle, and by no router that learns"
    assert top.numbers["oracle"]["ratio"] == pytest.approx(0.8, rel=0.01)


def test_learned_router_that_lowers_the_error_is_named(study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the dense model that has a router's parameters too."""
    monkeypatch.setitem(PLANTED, "token", 1.3)
    top = headline(planted(study(seeds=3)))
    assert top.verdict == "Negative transfer, lowered without labels by token"
    assert top.numbers["token"]["against"] == "dense_router"
    assert top.numbers["token"]["ratio"] == pytest.approx(1.3 / 1.45, rel=0.01)
    assert top.numbers["oracle"]["against"] == "dense"
    monkeypatch.setattr(f"{__name__}.WIDER", {"dense_router"})  # As of clusters, which have no parameters.
    assert headline(planted(study(seeds=3))).numbers["token"]["against"] == "dense"


def test_more_steps_of_the_dense_model_have_the_last_word(study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that lowers the error at equal steps, and is above a dense model of more steps, is no answer."""
    monkeypatch.setitem(PLANTED, "token", 1.2)
    monkeypatch.setitem(PLANTED, "dense_longer", 1.0)
    results = planted(study(seeds=3, longer=2.0, apart={"own": ["head.*"]}))
    point = Point("normalised", 3, 8)
    assert not any(claim.arm == "dense_longer" for claim in results.claims)
    assert results.claims[Claim(point, "token", "dense_longer")].verdict == "higher"
    assert results.claims[Claim(point, "own", "dense")].verdict == "lower"
    found = headline(results)
    assert found.verdict == "Negative transfer, lowered by own, and by no router that learns"
    assert results.time(point, "dense_longer") == 2.0 and results.time(point, "token") == 1.0


@pytest.mark.parametrize(("dense", "seeds", "words"), [(1.0, 3, "No negative"), (1.5, 2, "No negative")])
def test_nothing_is_claimed_without_a_difference_or_enough_seeds(
    study: Make, monkeypatch: pytest.MonkeyPatch, dense: float, seeds: int, words: str
) -> None:
    monkeypatch.setitem(PLANTED, "dense", dense)
    assert headline(planted(study(seeds=seeds))).verdict.startswith(words)


def test_diverged_run_is_never_the_lower_one(study: Make) -> None:
    settings = study(seeds=3, counts=[3])
    assert "oracle" in headline(planted(settings)).verdict
    (run,) = [r for r in expand(settings) if r.name.startswith("oracle-k3") and r.seed == 1]
    values = run.read()
    values["errors"]["diffusion"][0] = None
    write_json(run.result, values)
    results = MapResults(settings, expand(settings))
    assert results.claims[(Point("normalised", 3, 8), "oracle", "dense")].verdict == "open"  # type: ignore[index]
    assert "oracle" not in headline(results).verdict


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regimes": ["advection"]}, "unknown regimes"),
        ({"regimes": ["fisher", "fisher"]}, "repeated"),
        ({"counts": [4]}, "counts up to 4, and there are 3 regimes"),
        ({"grid": 18}, "not divisible by unfold"),
        ({"routers": {"dense": {}}}, "dense: there is such a model"),
        ({"apart": {"token": ["head.*"]}}, "token: there is such a model"),
        ({"apart": {"specialist": ["head.*"]}}, "specialist: there is such a model"),
        ({"longer": 1.0}, "longer"),
        ({"longer": float("inf")}, "longer"),
        ({"apart": {"own": []}}, "apart"),
        ({"noise": -0.1}, "noise"),
        ({"dims": [12], "expansion": 0.5}, "no multiple of 8"),
        ({"routers": {"x": {"kind": "tokn"}}}, "did you mean 'token'"),
        ({"operator": {"kind": "fno", "train": {"steps": 1}}}, "latent_transformer"),
    ],
)
def test_impossible_map_is_refused(study: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(study(**changes))
