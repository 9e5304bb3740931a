"""From a configuration to models; the one place that knows their constructor arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from shodh.config import ExpertsConfig, RunConfig
from shodh.config.base import FieldSets
from shodh.models.field_space import FieldSpace
from shodh.models.kernels import Kernels
from shodh.models.operator import ExpertLayerFactory, LatentTransformer
from shodh.models.registry import FieldOperator, build_field_operator
from shodh.models.tokenizer import Tokenizer
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.groups import is_routed_expert
from shodh.schema.domain import num_static_features


def build_tokenizer(config: RunConfig, field_sets: FieldSets | None = None) -> Tokenizer:
    """The tokenizer of a run, on the current default device; weights are not drawn yet.

    Parameters
    ----------
    field_sets : tuple of tuples of str, optional
        Those that it has a head for, in its order; by default those of the run's regimes, as of one that it trains.
    """
    fields, sets = [f.build() for f in config.data.fields], field_sets or config.data.field_sets
    return Tokenizer(config.tokenizer, [f for f in fields if not f.static], [f for f in fields if f.static], sets)


def build_operator(
    config: RunConfig, expert_layer: ExpertLayerFactory = ExpertLayerReference, kernels: Kernels = "torch"
) -> LatentTransformer | FieldOperator:
    """The operator of a run, on the current default device; weights are not drawn yet."""
    given = operator_space(config)
    if not config.has_tokenizer:
        return build_field_operator(config.operator, given, expert_layer)
    x, y, z = given.grid
    return LatentTransformer(
        config.operator, given.channels, given.static, (x, y, z), given.history, expert_layer, kernels
    )


class Counts(NamedTuple):
    """Parameters of a model: all, those of routed experts, and those that a token meets (``top_k`` of its experts)."""

    total: int
    routed: int
    active: int


def count_parameters(model: nn.Module, experts: ExpertsConfig) -> Counts:
    """Of a model with such experts; buffers do not count."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total, routed = sum(sizes.values()), sum(n for name, n in sizes.items() if is_routed_expert(name))
    return Counts(total, routed, total - routed + routed * experts.top_k // max(1, experts.num_experts))


_SHAPES: dict[str, LatentTransformer | FieldOperator] = {}


def operator_shapes(config: RunConfig) -> LatentTransformer | FieldOperator:
    """The operator of a run on the meta device, which has shapes and no values; not to be changed.

    The last ones are kept: a plan, its memory and its work look at the same model.
    """
    key = config.model_dump_json(include={"data", "tokenizer", "operator"}, exclude={"operator": {"train"}})
    if key not in _SHAPES:
        while len(_SHAPES) >= 4:
            del _SHAPES[next(iter(_SHAPES))]
        with torch.device("meta"):
            _SHAPES[key] = build_operator(config)
    return _SHAPES[key]


def operator_space(config: RunConfig) -> FieldSpace:
    """Sizes of what the operator of a run is given: latents and their features, or fields."""
    if not config.has_tokenizer:
        return FieldSpace.of(config)
    num_static = sum(f.build().num_components(3) for f in config.data.fields if f.static)
    features = num_static_features(num_static, len(config.data.optional))
    return FieldSpace(config.tokenizer.latent_channels, features, config.latent_grid, config.data.history)
