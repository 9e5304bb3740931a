"""The file of a composition study: presets, backbones, the command line's changes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from known_family import FNO, HIGH, LOW, MOE_POT, study_tree

from shodh.core.errors import ConfigError
from shodh.experiments.composition.settings import MEMBERS, CCMConfig, load_ccm

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "launch" / "configs").glob("ccm_*.yaml"))


def write(root: Path, family: dict[str, Any] | None = None, **changes: Any) -> Path:
    path = root / "study.yaml"
    tree = study_tree(root, changes.pop("operator", FNO), family, **changes)
    path.write_text(yaml.safe_dump({**tree, "family": {k: _plain(v) for k, v in tree["family"].items()}}))
    return path


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_members_are_trained_on_their_own_data(tmp_path: Path) -> None:
    study = load_ccm(write(tmp_path, anchor_steps=100, expert_steps=20, expert_lr=3e-4))
    anchor, low, high = (study.run_config(2, member) for member in MEMBERS)
    assert anchor.seed == low.seed == high.seed == 2
    assert len({c.run_dir for c in (anchor, low, high)}) == 3
    assert anchor.data.regimes[0].path == study.anchor_folder
    assert low.data.regimes[0].path == study.value_folder(LOW) != high.data.regimes[0].path
    assert [c.operator.train.steps for c in (anchor, low, high)] == [100, 20, 20]
    assert [c.operator.train.lr for c in (anchor, low, high)] == [1e-3, 3e-4, 3e-4]
    assert all(c.family is not None for c in (anchor, low, high))
    assert [c.family.parameters["viscosity"] for c in (anchor, low, high) if c.family] == [(LOW, HIGH), LOW, HIGH]


def test_a_preset_goes_over_the_file_and_the_command_line_over_both(tmp_path: Path) -> None:
    scales = {"tiny": {}, "small": {"anchor_steps": 50, "family": {"test": 9}, "set": ["operator.dim=16"]}}
    path = write(tmp_path, scales=scales)
    small = load_ccm(path, "small", seeds=2, overrides=["study.family.train=7", "operator.dim=32"])
    assert (small.name, small.anchor_steps, small.seeds) == ("known-small", 50, 2)
    assert (small.family.train, small.family.test, small.family.valid) == (7, 9, 3)
    assert small.base_config().operator.dim == 32
    assert load_ccm(path, "small").base_config().operator.dim == 16
    assert load_ccm(path).base_config().operator.dim == 8


def test_a_backbone_changes_the_run_and_the_name(tmp_path: Path) -> None:
    backbones = {"tiny": {}, "wide": {"set": ["operator.dim=24"]}}
    wide = load_ccm(write(tmp_path, backbones=backbones), backbone="wide")
    assert wide.name == "known-wide" and wide.base_config().operator.dim == 24


def test_experts_are_spread_over_the_ranks_that_fit(tmp_path: Path) -> None:
    study = load_ccm(write(tmp_path, operator=MOE_POT), overrides=["parallel.ep_size=4"])
    assert [study.run_config(0, "low", world).parallel.ep_size for world in (1, 2, 4, 6, 8)] == [1, 2, 4, 2, 4]


def test_roles_and_folders_of_values(tmp_path: Path) -> None:
    study = load_ccm(write(tmp_path))
    assert [study.family.role_of(v) for v in study.family.values] == [
        "support",
        "interpolation",
        "support",
        "extrapolation",
    ]
    assert len({study.value_folder(v) for v in study.family.values}) == 4
    assert study.value_folder(1e-5) == study.data / "1e-05" / "vorticity_2d"
    with pytest.raises(ConfigError, match=r"viscosity=0\.5 is not in the family"):
        study.family.role_of(0.5)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ({"low": 0.011}, r"low=0\.011 is not in the support \[0\.01, 0\.03\]"),
        ({"low": HIGH}, r"low=0\.03 must be below high=0\.03"),
        ({"support": (LOW, HIGH, HIGH)}, r"support names \[0\.03\] twice"),
        ({"extrapolation": (0.05, 0.05)}, r"extrapolation names \[0\.05\] twice"),
        ({"interpolation": (LOW,)}, "more than one of support, interpolation and extrapolation"),
        ({"interpolation": (0.05,)}, r"interpolation: \[0\.05\] lie outside the support, 0\.01 to 0\.03"),
        ({"extrapolation": (0.02,)}, r"extrapolation: \[0\.02\] lie inside the support"),
        ({"validation": (0.0325,)}, r"validation: \[0\.0325\] are not in support or interpolation"),
        ({"extrapolation": (float("inf"),)}, "finite number"),
        ({"fixed": {"viscosity": 1.0}}, "viscosity is the parameter of the family"),
        ({"trian": 3}, "unknown key 'family.trian': did you mean 'train'"),
    ],
)
def test_impossible_families_are_refused(tmp_path: Path, family: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ccm(write(tmp_path, family))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "fno"}, r"backbone 'fno': the study has \['tiny'\]"),
        ({"methods": ["coord"]}, "methods need 'anchor'"),
        ({"methods": ["anchor", "anchor"]}, "methods names .* twice"),
        ({"prefix": 0}, "prefix: .*greater than 0"),
        ({"name": "a b"}, "name: "),
    ],
)
def test_impossible_studies_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ccm(write(tmp_path, **changes))


def test_an_unknown_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not defined at scale paper; it has \['tiny'\]"):
        load_ccm(write(tmp_path), "paper")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["study.prefix=3"], "trajectories have 7 frames, and history 2, prefix 3 and rollout 3 need 8"),
        (["data.history=3"], "history 3, prefix 2 and rollout 3 need 8"),
        (["data.stride=2"], r"data\.stride must be 1"),
        (["data.strides=[1, 2]"], r"data\.stride must be 1"),
        (["operator.conditions=[time_step]"], r"leave out operator\.conditions"),
        (["data.regimes.0.name=waves"], r"the one regime 'vorticity_2d', not \['waves'\]"),
        (["operator.kind=latent_transformer", "operator.loss=mse"], "needs a tokenizer; use one on fields"),
    ],
)
def test_a_base_run_that_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    study = load_ccm(write(tmp_path), overrides=overrides)
    with pytest.raises(ConfigError, match=message):
        study.base_config()


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_every_study_of_the_project_is_possible(path: Path, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each scale, with each backbone: anchor and experts have a configuration."""
    monkeypatch.chdir(ROOT)
    names = list(load_ccm(path, scale).backbones)
    assert {"fno", "dpot", "moe_pot"} <= set(names)
    for name in names:
        study: CCMConfig = load_ccm(path, scale, backbone=name)
        assert [study.run_config(0, member).seed for member in MEMBERS] == [0, 0, 0]
