"""A step reads nothing from its device: it runs on the meta device, whose values nobody can read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published import published
from torch import nn
from vocabulary import FIELDS, REGIMES

from shodh.config import RunConfig
from shodh.config.reading import config_from_dict
from shodh.models.factory import build_operator, build_tokenizer
from shodh.schema.domain import Domain, num_static_features
from shodh.schema.space import RegimeSpace, Space
from shodh.train.datasets import Regimes
from shodh.train.field_task import operator_task
from shodh.train.tokenizer_task import TokenizerTask
from shodh.train.trainer import Batch, Task, to_device

META = torch.device("meta")
BATCH = 3
EVERY = {"switch": 0.1, "cv2": 0.1, "importance": 0.1, "orthogonality": 0.1}
SIZES = {"dim": 32, "depth": 2, "heads": 2}
AFTER = {"score": "softmax", "normalise": "after"}


def latent(**experts: Any) -> dict[str, Any]:
    settings = {"num_experts": 4, "hidden": 32, "balance": EVERY, **experts}
    return {**SIZES, "input_noise": 0.1, "experts": settings}


def fields(kind: str, **settings: Any) -> dict[str, Any]:
    return published({**SIZES, "kind": kind, "patch": 4, "input_noise": 0.1, **settings})


CASES: dict[str, dict[str, Any]] = {
    "token": latent(top_k=2),
    "context": latent(router={"kind": "context", "gate": "conv", **AFTER}, top_k=2),
    "two_level": latent(router={"kind": "two_level"}),
    "noisy": latent(router={"kind": "noisy_topk", **AFTER}, top_k=2, balance={**EVERY, "load": 0.1}),
    "checkpointed": {**latent(), "activation_checkpointing": True},
    "dense": latent(num_experts=0, balance={}),
    "fourier": {**latent(), "mixer": "fourier", "modes": 1},
    "whitened": {**latent(), "metric": "whitened"},
    "decoded": {**latent(), "metric": "decoded", "decoded_every": 1},
    "unrolled": {**latent(), "unroll": {"steps": 2}, "noise_relative_to": "error"},
    "pushforward": fields("dpot", modes=2, unroll={"steps": 2, "gradient": "pushforward"}, patch_jitter=True),
    "moe_pot": fields("moe_pot", experts={"num_experts": 4, "top_k": 2, "form": "linear", "hidden": 32}),
    "dpot": fields("dpot", modes=2),
    "fno": fields("fno", modes=2),
    "unet": fields("unet"),
}


def configuration(operator: dict[str, Any]) -> RunConfig:
    tree = {
        "name": "p",
        "data": {
            "grid": [16, 16, 16],
            "history": 2,
            "fields": FIELDS,
            "regimes": [{"name": name, "path": "d", "only": only} for name, only in REGIMES.items()],
        },
        "tokenizer": {"latent_channels": 8, "strides": [4, 2], "widths": [8, 8], "head_channels": 8},
        "operator": operator,
    }
    return config_from_dict(tree, "a test")


def regimes_of(config: RunConfig) -> Regimes:
    constants = {"velocity": (0.0, 1.0), "heat": (0.5, 2.0), "dye": (0.0, 1.0)}
    spaces = [
        RegimeSpace.of(
            name,
            Domain(
                ("periodic", "wall", "periodic") if name == "dyed" else ("periodic",) * 3,
                (1.0, 1.0, 1.0),
                presence=(("dye", "dye" in only),),
            ),
            {field: constants[field] for field in only if field != "solid"},
        )
        for name, only in REGIMES.items()
    ]
    return Regimes([], Space(tuple(f.build() for f in config.data.fields), 3, tuple(spaces)))


def batch_of(**tensors: torch.Size | tuple[int, ...]) -> Batch:
    """Samples of both regimes on the host, as a loader gives them."""
    keys = {"regime": torch.tensor([1, 0, 1]), "trajectory": torch.arange(BATCH), "frame": torch.arange(BATCH)}
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(BATCH, *shape, generator=draw) for name, shape in tensors.items()} | keys


def take_step(task: Task, model: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    task.start_step()
    outcome = task.loss(model.to_empty(device=device).to(torch.bfloat16), to_device(batch, device), 0)
    outcome.loss.backward()
    return outcome.loss


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_an_operator_reads_nothing_from_its_device(case: str) -> None:
    config = configuration(CASES[case])
    tokenizer = build_tokenizer(config).to_empty(device=META) if config.has_tokenizer else None
    task = operator_task(
        config, regimes_of(config), [], tokenizer, lambda samples: torch.zeros(len(samples), 1, 16, 16, 16)
    )
    frames = 2 + config.operator.unroll.steps
    batch = batch_of(fields=(frames, 5, 16, 16, 16), static=(1, 16, 16, 16))
    if config.has_tokenizer:
        batch = batch_of(latents=(frames, 8, 2, 2, 2), static=(num_static_features(1, 1), 2, 2, 2))
    assert take_step(task, build_operator(config).train(), batch, META).is_meta


def test_a_step_of_a_tokenizer_reads_nothing_from_its_device() -> None:
    config = configuration(latent())
    task = TokenizerTask(config, regimes_of(config))
    batch = batch_of(fields=(1, 5, 16, 16, 16), static=(1, 16, 16, 16))
    assert take_step(task, build_tokenizer(config).train(), batch, META).is_meta


def test_the_meta_device_refuses_what_would_wait() -> None:
    held = to_device(batch_of(latents=(2,)), META)
    for read in (torch.Tensor.tolist, torch.Tensor.nonzero, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(held["regime"])
    assert held["sample"].tolist() == [[1, 0, 0], [0, 1, 1], [1, 2, 2]], "keys stay on the host"
