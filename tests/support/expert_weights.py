"""Random weights of experts with every trap of floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from shodh.config import RunConfig
from shodh.core.seeding import generator
from shodh.core.weights import expected_shapes
from shodh.models.factory import build_operator
from shodh.models.init import initialise

State = dict[str, Tensor]
EXPERTS = "operator.blocks.0.feed_forward.experts.w1"


def wild_weights(seed: int, dtype: torch.dtype = torch.float32) -> State:
    """Magnitudes over the whole range of a dtype, subnormals, both zeros, and an ordinary layer beside."""
    draw = generator("wild", seed)
    info = torch.finfo(dtype)
    low, high = torch.tensor([info.smallest_normal, info.max / 4], dtype=torch.float64).log2().tolist()
    exponent = low - 8 + (high - low + 8) * torch.rand(37, 11, generator=draw, dtype=torch.float64)
    sign = torch.where(torch.rand(37, 11, generator=draw) < 0.5, -1.0, 1.0)
    wild = (sign * 2.0**exponent).to(dtype)
    wild[0] = 0.0
    wild[seed % 5] = -0.0
    return {
        "operator.wild": wild,
        "operator.embed.weight": torch.randn(6, 5, generator=draw).to(dtype),
        EXPERTS: torch.randn(3, 4, 5, generator=draw).to(dtype),
        "operator.blocks.0.norm1.weight": torch.randn(7, generator=draw).to(dtype),
        "operator.empty": torch.empty(0, 3, dtype=dtype),
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal as bytes: minus zero is not zero."""
    whole = one.shape == other.shape and one.dtype == other.dtype
    return whole and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def random_operator(config: RunConfig, *key: int | str) -> State:
    """An initialised operator with another random change of every weight."""
    model = build_operator(config)
    initialise(model, 0)
    state = {name: model.state_dict()[name].clone() for name in expected_shapes(model)}
    if key:
        for name, tensor in state.items():
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator(*key, name))
    return state
