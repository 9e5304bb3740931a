"""The whole probe on a tiny model with drawn weights: sections, figures, left-out regimes, dense models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shodh.config import RunConfig, load_config
from shodh.core.errors import ConfigError, DataError
from shodh.data import write_trajectories
from shodh.evaluate.evaluation import Evaluator
from shodh.models.factory import build_operator, build_tokenizer
from shodh.models.init import initialise
from shodh.report.page import Section, write_page
from shodh.routing.probe import probe_model
from shodh.routing.probe.causality import measure_effects
from shodh.routing.probe.expert_sections import match_section, similarity_section
from shodh.routing.probe.record import Recording, record
from shodh.routing.probe.windows import held_out_splits, left_out_regimes, spread, trained_regimes
from shodh.schema.fields import Field, RegimeSchema, Trajectories
from shodh.train.datasets import open_regimes
from shodh.train.latents import TrainedTokenizer
from shodh.train.run_folder import RunFolder

EXPERTS, LAYERS = 4, 2
Open = Callable[..., Evaluator]


def drawn_evaluator(config: RunConfig, seed: int) -> Evaluator:
    """A run with drawn weights, opened as if it had been trained."""
    opened = open_regimes(config)
    tokenizer, model = build_tokenizer(config), build_operator(config)
    initialise(tokenizer, 7)
    initialise(model, seed)
    trained = TrainedTokenizer(tokenizer.eval().requires_grad_(False), opened.space, (), Path("none"), "")
    folder = RunFolder(config.out / f"run-{seed}")
    return Evaluator(config, folder, "none", opened, trained, model.eval().requires_grad_(False), torch.device("cpu"))


@pytest.fixture(scope="module")
def open_tiny(write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Open:
    """``open_tiny(seed, **operator)``: a run of the tiny configuration, opened, with drawn weights."""

    def make(seed: int = 0, regimes: slice = slice(None), **operator: Any) -> Evaluator:
        path = tmp_path_factory.mktemp("probe") / "config.yaml"
        config = load_config(write_config(path, operator=operator))
        data = config.data.model_copy(update={"regimes": config.data.regimes[regimes]})
        return drawn_evaluator(config.model_copy(update={"data": data}), seed)

    return make


def by_key(sections: list[Section]) -> dict[str, Section]:
    return {section.key: section for section in sections}


def test_every_section_of_a_sparse_model_makes_a_page(open_tiny: Open, tmp_path: Path) -> None:
    sections = probe_model(open_tiny(0), open_tiny(1), limit=2, seeds=1)
    write_page(tmp_path, "probe", None, sections)
    keys = ["causality", "local_physics", "routing_map", "probe_fingerprint", "expert_similarity", "run_match"]
    assert list(by_key(sections)) == keys
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["run_match"]["layers"]) == LAYERS
    assert summary["probe_fingerprint"]["chance"]["trained regimes"] == 0.5
    assert set(summary["local_physics"]["explained"]["layer 0"]) >= {"vorticity", "strain_rate", "wall_distance"}
    matter = by_key(sections)["causality"].tables["experts_that_matter"]
    assert len(matter.rows) == LAYERS * EXPERTS
    assert {p.name for p in tmp_path.glob("map_*.png")} == {"map_open_channel.png", "map_porous_media.png"}


def test_one_regime_is_told_apart_from_nothing(open_tiny: Open) -> None:
    evaluator = open_tiny(0, regimes=slice(1), depth=1, experts={"num_experts": 2})
    (section,) = probe_model(evaluator, limit=2, seeds=1, chosen=("fingerprint",))
    assert section.summary == {"available": False} and not section.tables and "open_channel" in section.text


def recordings_of(evaluator: Evaluator) -> list[Recording]:
    return [record(evaluator, regime, "test", 4) for regime in trained_regimes(evaluator)]


def test_a_run_matched_with_itself_is_the_identity(open_tiny: Open) -> None:
    evaluator = open_tiny(0)
    recordings, model = recordings_of(evaluator), evaluator.operator
    for layer in match_section(model, recordings, model, recordings, "itself").summary["layers"]:
        assert layer["cka"]["pairs"] == {e: e for e in range(EXPERTS)}
        assert layer["cka"]["mean"] == pytest.approx(1, abs=1e-6)
        assert layer["tokens_at_matched_experts"] == 1


def test_interventions_that_cannot_matter_cost_nothing_and_the_others_are_measured(open_tiny: Open) -> None:
    evaluator = open_tiny(0)
    evaluator.operator.blocks[0].feed_forward.router.selection_bias.copy_(torch.tensor([0.0, 0.0, -9.0, -9.0]))
    effects = measure_effects(evaluator, recordings_of(evaluator), "test", 2, seeds=2)
    for regime in ("open_channel", "porous_media"):
        assert effects["remove", 0, 3, regime].latent == [1.0], "a dead expert"
        assert effects["remove all", None, None, regime].latent[0] != 1.0
        assert len(effects["shuffle samples", 0, None, regime].latent) == 2
        decoded = effects["force", None, 1, regime].decoded
        assert len(decoded) == 1 and np.isfinite(decoded).all()


def test_bilinear_experts_are_also_compared_exactly(open_tiny: Open) -> None:
    evaluator = open_tiny(0, experts={"activation": "bilinear"})
    section = similarity_section(evaluator.operator, recordings_of(evaluator))
    assert "without the self-contraction" in section.text
    assert section.tables["expert_pairs"].header[3:] == ["CKA", "tensor similarity", "with self-contraction"]
    assert all(abs(v) <= 1 for row in section.tables["expert_pairs"].rows for v in row[4:])


def test_a_dense_model_gives_one_section_that_says_so(open_tiny: Open) -> None:
    (section,) = probe_model(open_tiny(0, experts={"num_experts": 0}), limit=2)
    assert "dense" in section.text and section.figures == {}


def test_a_dense_run_is_no_partner_to_match_with(open_tiny: Open) -> None:
    with pytest.raises(ConfigError, match="dense run"):
        probe_model(open_tiny(0), open_tiny(1, experts={"num_experts": 0}), limit=2)


def test_runs_on_other_regimes_are_not_matched(open_tiny: Open) -> None:
    with pytest.raises(ConfigError, match="its regimes is"):
        probe_model(open_tiny(0), open_tiny(1, regimes=slice(1)), limit=2)


def test_left_out_regimes_are_told_apart_and_compared_with_known_ones(open_tiny: Open, tiny_data: Path) -> None:
    evaluator = open_tiny(0, regimes=slice(1), depth=1, experts={"num_experts": 2})
    left_out = {"unseen": tiny_data / "porous_media"}
    sections = by_key(probe_model(evaluator, left_out=left_out, limit=4, seeds=1))
    section = sections["probe_fingerprint"]
    found = section.summary["left_out"]["unseen"]
    assert found["chance"] == 0.5, "one left-out regime beside one trained one"
    (alone,) = probe_model(evaluator, left_out=left_out, limit=4, seeds=1, chosen=("fingerprint",))
    assert alone.summary == section.summary
    assert 0 <= found["told_apart"] <= 1
    assert found["looks_like"]["nearest mean"] == {"open_channel": 1.0}
    assert "with left-out regimes" in section.summary["accuracy"]
    assert "unseen" not in sections["causality"].summary["force_all_layers"], "what is left out has no error to beat"


def test_left_out_regimes_are_normalised_with_their_own_statistics(open_tiny: Open, tiny_data: Path) -> None:
    evaluator = open_tiny(0, regimes=slice(1))
    (unseen,) = left_out_regimes(evaluator, {"unseen": tiny_data / "porous_media"})
    assert unseen.left_out and list(unseen.regimes.space.normalizer.constants) == ["unseen"]
    assert held_out_splits(unseen, "test") == ("valid", "test")
    with pytest.raises(ConfigError, match="other names"):
        left_out_regimes(evaluator, {"open_channel": tiny_data / "porous_media"})
    with pytest.raises(DataError, match="nowhere"):
        left_out_regimes(evaluator, {"unseen": tiny_data / "nowhere"})


def test_the_same_tokens_are_recorded_whatever_the_model(open_tiny: Open) -> None:
    first, second = (record(e, trained_regimes(e)[1], "valid", 4) for e in (open_tiny(0), open_tiny(0)))
    assert first.inputs is not None and second.inputs is not None
    assert torch.equal(first.inputs, second.inputs)
    assert first.selected.shape == (LAYERS, 4, 8, 1)
    assert len(set(first.trajectory.tolist())) == 2, "windows are spread over the trajectories"
    np.testing.assert_allclose(first.shares().sum(-1), 1)


def write_flat(root: Path, name: str, fields: tuple[Field, ...], seed: int) -> None:
    """Two trajectories a split of a periodic regime of two dimensions."""
    rng = np.random.default_rng(seed)
    schema = RegimeSchema(name, fields, ("periodic", "wall"))
    for split in ("train", "valid", "test"):
        values = {f.name: rng.standard_normal((2, 4, 16, 24, *(2,) * (f.kind == "vector"))) for f in fields}
        trajectories = Trajectories(
            schema, (1.0, 2.0), 0.1 * np.arange(4), {k: v.astype("f4") for k, v in values.items()}
        )
        write_trajectories(root / name / "data" / split / "part.hdf5", trajectories)


def test_flat_regimes_with_different_fields_are_probed(write_config: Callable[..., Path], tmp_path: Path) -> None:
    velocity, heat = Field("velocity", "vector", placement="face"), Field("heat")
    write_flat(tmp_path, "windy", (velocity,), 0)
    write_flat(tmp_path, "hot", (heat,), 1)
    write_flat(tmp_path, "warm", (heat,), 2)
    fields = [{"name": "velocity", "kind": "vector", "optional": True}, {"name": "heat", "optional": True}]
    regimes = [{"name": n, "path": str(tmp_path / n), "only": [f]} for n, f in (("windy", "velocity"), ("hot", "heat"))]
    data = {"grid": [16, 24], "fields": fields, "regimes": regimes}
    config = load_config(write_config(tmp_path / "flat.yaml", data=data, operator={"depth": 1}))
    evaluator = drawn_evaluator(config, 0)
    sections = by_key(probe_model(evaluator, left_out={"warm": tmp_path / "warm"}, limit=2, seeds=1))
    explained = sections["local_physics"].tables["local_shares"].rows
    assert {(row[0], row[2]) for row in explained} == {
        ("windy", "|vorticity|"),
        ("windy", "strain rate"),
        ("windy", "distance to a wall or solid"),
        ("hot", "distance to a wall or solid"),
    }
    assert set(sections["routing_map"].figures) == {"map_windy", "map_hot"}
    assert sections["probe_fingerprint"].summary["left_out"].keys() == {"warm"}
    assert all(np.isfinite(row[4]) for row in sections["causality"].tables["interventions"].rows)


def test_windows_are_spread_from_the_first_to_the_last() -> None:
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 10) == [0, 1, 2]
