"""Kinds of operators on fields by name."""

from __future__ import annotations

from shodh.config import OperatorConfig
from shodh.models.dpot import PotOperator
from shodh.models.field_space import FieldSpace
from shodh.models.fno import FnoOperator
from shodh.models.operator import ExpertLayerFactory
from shodh.models.unet import UnetOperator

FieldOperator = PotOperator | FnoOperator | UnetOperator


def build_field_operator(config: OperatorConfig, space: FieldSpace, expert_layer: ExpertLayerFactory) -> FieldOperator:
    """The operator that ``config.kind`` names, on the current default device; weights are not drawn yet."""
    if config.kind == "fno":
        return FnoOperator(config, space)
    if config.kind == "unet":
        return UnetOperator(config, space)
    return PotOperator(config, space, expert_layer)
