"""Sizes of a study's models, counted on the meta device, and the dense model that is as large as a sparse one."""

from __future__ import annotations

from typing import Any

from shodh.config import RunConfig, config_from_dict, to_dict
from shodh.core.errors import ConfigError
from shodh.models.factory import count_parameters, operator_shapes

TOLERANCE = 0.01  # of "equally many parameters"


def model_size(config: RunConfig) -> dict[str, int]:
    """Weights of the operator, and those that a token meets."""
    counts = count_parameters(operator_shapes(config), config.operator.experts)
    return {"total_parameters": counts.total, "active_parameters": counts.active}


def widened_dense(sparse: RunConfig, as_dpot: bool = False) -> dict[str, Any]:
    """Changes of ``operator`` that make it dense, with as many parameters as ``sparse`` has active, router included.

    One width is changed: ``experts.hidden``, or ``field.mlp`` where experts are of form linear, whose own width is that
    of the operator; to a multiple that suits matrix products, if one comes within `TOLERANCE`.

    Parameters
    ----------
    as_dpot : bool
        DPOT in place of a MoE-POT: its feed-forward is of two affine maps.

    Raises
    ------
    ConfigError
        No width does.
    """
    experts = sparse.operator.experts
    if as_dpot and sparse.operator.kind != "moe_pot":
        raise ConfigError(f"dpot is compared with a base run of kind moe_pot, not {sparse.operator.kind}")
    target = model_size(sparse)["active_parameters"]
    multiples: tuple[int, ...]
    if experts.form == "linear" or as_dpot:
        section, key, multiples = "field", "mlp", (16, 1)
    else:
        section, key, multiples = "experts", "hidden", (16,) if experts.activation == "gelu" else (8, 1)
    start: int = getattr(getattr(sparse.operator, section), key)

    def changes(width: int) -> dict[str, Any]:
        changed: dict[str, Any] = {"experts": {"num_experts": 0}}
        if as_dpot:
            changed["kind"] = "dpot"
        changed.setdefault(section, {})[key] = width
        return changed

    def size(width: int) -> int:
        tree = to_dict(sparse)
        for name, value in changes(width).items():
            tree["operator"][name] = {**tree["operator"][name], **value} if isinstance(value, dict) else value
        return model_size(config_from_dict(tree))["total_parameters"]

    least = size(start)
    each = (size(start + multiples[0]) - least) / multiples[0]
    for multiple in multiples:
        width = start + multiple * round((target - least) / (each * multiple)) if each else start
        found = size(width)
        if abs(found / target - 1) <= TOLERANCE:
            return changes(width)
    raise ConfigError(
        f"a dense model of equal active size: {section}.{key}={width} gives {found} parameters, and the sparse one has "
        f"{target} active, which is not within {TOLERANCE:.0%}; use dense_active, or a larger operator"
    )
