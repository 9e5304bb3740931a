"""What configurations of operators on fields say as published models do, for tests that are about something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shodh.config.reading import merge_trees

MOE_POT = yaml.safe_load((Path(__file__).parents[2] / "launch" / "configs" / "moe_pot_tiny.yaml").read_text())
EXPERTS: dict[str, Any] = MOE_POT["operator"]["experts"]


def published(operator: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an operator on fields, completed by loss, shifts and experts as they were published."""
    sparse = {**EXPERTS, "hidden": operator.get("dim", 128)}
    experts = sparse if operator["kind"] == "moe_pot" else {"num_experts": 0}
    return merge_trees({"loss": "relative_l2", "random_shifts": False, "experts": experts}, operator)


#: A MoE-POT of one block on fields of 16^3 cells.
TINY_MOE_POT = published(
    {
        "kind": "moe_pot",
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "patch": 8,
        "field": {"mlp": 16, "decoder": 8},
        "experts": {"num_experts": 4, "top_k": 2},
        "train": {"steps": 2, "warmup": 1, "global_batch": 4},
    }
)
