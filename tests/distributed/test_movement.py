"""The check after the first step: what stood still is named, unless float32 could not show its step."""

from __future__ import annotations

from typing import Any

import pytest
from engine_jobs import still_after
from helper import ROOT, run_ranks

LOST, PUT_BACK = ["more.bias", "more.weight"], ["norm.weight"]
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lost": ({"lr": 1e-3, "lost": "more"}, LOST),
    "lost, at a small rate": ({"lr": 1e-7, "lost": "more"}, LOST),
    "lost, after heavy clipping": ({"lr": 1e-3, "clip": 1e-13, "lost": "more"}, LOST),
    "put back": ({"lr": 1e-3, "put_back": "norm.weight"}, PUT_BACK),
    "put back, at a small rate": ({"lr": 1e-7, "put_back": "norm.weight"}, PUT_BACK),
    "no gradient": ({"lr": 1e-3, "zero": "all"}, []),
    "usual": ({"lr": 1e-3}, []),
    # Float32 rounds these steps away: ones do not feel 2e-8, nor, after AdamW's epsilon, a gradient of 1e-13.
    "one cycle's first": ({"lr": 2e-8}, []),
    "heavy clipping": ({"lr": 1e-3, "clip": 1e-13}, []),
    "heaviest clipping": ({"lr": 1e-3, "clip": 1e-30}, []),
    "least rate": ({"lr": 1e-45}, []),
    "no rate": ({"lr": 0.0}, []),
}


@pytest.mark.parametrize("stage", (1, 2))
def test_what_stood_still_is_named_and_nothing_else(stage: int) -> None:
    """On engines of one rank, at each of which something goes wrong in the optimiser, or nothing."""
    (found,) = run_ranks(
        1, still_after, ROOT / "ds_configs" / f"zero{stage}.json", [case for case, _ in CASES.values()]
    )
    assert dict(zip(CASES, found)) == {name: expected for name, (_, expected) in CASES.items()}
