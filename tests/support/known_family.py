"""A family whose answer is known: its data are rollouts of the composed models themselves.

The trajectories of a value come from the model at the coordinate of that value, so that there, and in general only
there, the error vanishes up to rounding. The models are tiny, random and never trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from published import published
from safetensors.torch import save_file

from shodh.checkpoint.convert import convert
from shodh.checkpoint.description import read_pretrained
from shodh.checkpoint.pretrained import ShodhModel, from_pretrained
from shodh.config import dump_config
from shodh.config.reading import section_from_dict
from shodh.core.seeding import generator
from shodh.core.weights import expected_shapes, load_into
from shodh.data import write_trajectories
from shodh.experiments.composition.settings import CCMConfig
from shodh.merge import compose, coordinate, decompose, from_files, from_memory, to_memory
from shodh.models.factory import build_operator
from shodh.models.init import initialise
from shodh.schema.domain import Domain
from shodh.schema.fields import Field, RegimeSchema, Trajectories
from shodh.schema.space import RegimeSpace, Space
from shodh.train.run_folder import RunFolder

GRID = (16, 16)
REGIME = "vorticity_2d"
HISTORY, PREFIX, ROLLOUT = 2, 2, 3
FRAMES = HISTORY + PREFIX + ROLLOUT
LOW, HIGH = 0.01, 0.03
SUPPORT, INTERPOLATION, EXTRAPOLATION = (LOW, HIGH), (0.0225,), (0.0325,)
#: Fields are normalised with these, so that physical and normalised units differ.
MEAN, SCALE = 0.25, 2.0

Changes = dict[str, Any]

FNO: Changes = published({"kind": "fno", "dim": 8, "depth": 2, "modes": 4})
MOE_POT: Changes = published(
    {
        "kind": "moe_pot",
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "patch": 4,
        "experts": {"num_experts": 4, "top_k": 2, "num_shared": 1, "hidden": 16},
    }
)


def study_tree(root: Path, operator: Changes, family: Changes | None = None, **changes: Any) -> dict[str, Any]:
    """The settings of the study as a plain mapping, its base run written beside it."""
    base = root / "base.yaml"
    config = {
        "name": "base",
        "data": {
            "grid": list(GRID),
            "history": HISTORY,
            "fields": [{"name": "vorticity"}],
            "regimes": [{"name": REGIME, "path": str(root / "data")}],
        },
        "operator": {**operator, "train": {"steps": 4, "global_batch": 4, "warmup": 1, "lr": 1e-3}},
        "evaluation": {"batch": 2},
    }
    base.write_text(yaml.safe_dump(config))
    tree = {
        "name": "known",
        "question": "Does composition give back a family that it made?",
        "out": str(root / "runs"),
        "data": str(root / "data"),
        "base": str(base),
        "backbone": "tiny",
        "backbones": {"tiny": {}},
        "seeds": 1,
        "anchor_steps": 4,
        "expert_steps": 4,
        "expert_lr": 1e-3,
        "prefix": PREFIX,
        "rollout": ROLLOUT,
        "published_improvement": 42.8,
        "family": {
            "regime": REGIME,
            "parameter": "viscosity",
            "frames": FRAMES,
            "train": 1,
            "valid": 3,
            "test": 3,
            "low": LOW,
            "high": HIGH,
            "support": SUPPORT,
            "interpolation": INTERPOLATION,
            "extrapolation": EXTRAPOLATION,
            "validation": (LOW, 0.0225),
            **(family or {}),
        },
    }
    return {**tree, **changes}


def known_study(root: Path, operator: Changes = FNO, **changes: Any) -> CCMConfig:
    """The settings of the study, validated."""
    return section_from_dict(CCMConfig, study_tree(root, operator, **changes), "known family")


def build_known(root: Path, operator: Changes = FNO, **changes: Any) -> CCMConfig:
    """Write models and data of a known family."""
    study = known_study(root, operator, **changes)
    for seed in range(study.seeds):
        anchor = write_member(study, seed, "anchor", None)
        for member in ("low", "high"):
            write_member(study, seed, member, anchor)
    write_data(study)
    return study


def write_member(study: CCMConfig, seed: int, member: str, anchor: Path | None) -> Path:
    """What training and conversion of a member leave behind, with random weights."""
    config = study.run_config(seed, member)  # type: ignore[arg-type]
    model = build_operator(config)
    initialise(model, seed)
    state = {name: model.state_dict()[name].clone() for name in expected_shapes(model)}
    for name, tensor in state.items():
        if member != "anchor":
            size = 0.15 * tensor.std() if tensor.numel() > 1 else 0.01
            tensor += size * torch.randn(tensor.shape, generator=generator(seed, member, name))
    run = RunFolder(config.run_dir)
    run.path.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in state.items()}, run.path / "model.safetensors")
    (run.path / "config.yaml").write_text(dump_config(config))
    fields = [f.build() for f in config.data.fields]
    domain = Domain(("periodic",) * 3, (1.0, 1.0, 1.0 / GRID[0]), flat=True)
    regime = RegimeSpace.of(REGIME, domain, {"vorticity": (MEAN, SCALE)})
    Space(tuple(fields), 2, (regime,)).save(run.path)
    run.record_start(None if anchor is None else read_pretrained(anchor)[0].source.sha256)
    out = study.folder_of(seed, member)  # type: ignore[arg-type]
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(run.path / "model.safetensors", out)
    return out


def composed(study: CCMConfig, alpha: float, seed: int = 0) -> ShodhModel:
    """The model at a coordinate."""
    paths = [study.folder_of(seed, member) for member in ("anchor", "low", "high")]
    weights = [from_memory(to_memory(from_files(read_pretrained(path)[1]))) for path in paths]
    model = from_pretrained(paths[0])
    load_into(model, to_memory(compose(weights[0], *decompose(*weights), alpha)), Path("composed"))
    return model


def write_data(study: CCMConfig) -> None:
    """Rollouts of the composed models of seed 0, from smooth random frames."""
    schema = RegimeSchema(REGIME, (Field("vorticity"),), ("periodic", "periodic"))
    for value in study.family.values:
        model = composed(study, coordinate(value, LOW, HIGH))
        for split in ("train", "valid", "test"):
            count = getattr(study.family, split)
            start = smooth(count, split, repr(value))
            later = model.rollout(start, torch.zeros(count, 0, *GRID), REGIME, FRAMES - HISTORY)
            frames = torch.cat((start, later), 1)[:, :, 0].numpy()
            found = Trajectories(schema, (1.0, 1.0), 0.1 * np.arange(FRAMES), {"vorticity": frames})
            write_trajectories(study.value_folder(value) / "data" / split / "part.hdf5", found)


def smooth(count: int, *key: str) -> torch.Tensor:
    """Two random frames of order one with a few Fourier modes: ``[count, 2, 1, *GRID]``."""
    spectrum = torch.fft.rfft2(torch.randn(count, HISTORY, 1, *GRID, generator=generator(*key)))
    spectrum[..., 3:-2, :] = 0
    spectrum[..., 3:] = 0
    frames = torch.fft.irfft2(spectrum, s=GRID)
    return frames / frames.std()
