"""A space is one file with one checksum: what is read is what was written, and nothing in it changes unseen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shodh.core.errors import CheckpointError, DataError
from shodh.schema.domain import Domain
from shodh.schema.fields import OUTSIDE, Field
from shodh.schema.space import SPACE_FILE, RegimeSpace, Space, digest

FIELDS = (
    Field("velocity", "vector", units="m/s", placement="face", solenoidal=True),
    Field("heat", units="K", masked_by="solid", positive=True),
    Field("dye", optional=True),
    Field("solid", static=True),
    Field("rock", static=True, static_scale="log"),
)
DOMAIN = Domain(("periodic", "wall", "open"), (2.0, 1.0, 0.1), (("dye", True),), (("heat", -1.5),), True, 0.1)
CONSTANTS = {"velocity": (0.0, 2.0), "heat": (0.1 + 0.2, 1e-300), "dye": (-7.0, 0.0), "rock": (1.0, 3.0)}
SPACE = Space(
    FIELDS, 3, (RegimeSpace.of("a", DOMAIN, CONSTANTS), RegimeSpace.of("b", replace(DOMAIN, flat=False), CONSTANTS))
)


def drawn_bits(seed: int) -> dict[str, tuple[float, float]]:
    """Constants of any bits that a finite float64 may have: of any size, denormal and negative ones."""
    bits = np.random.default_rng(seed).integers(0, 2**64, 200, dtype=np.uint64).view(np.float64)
    means, scales = np.split(bits[np.isfinite(bits)][:8], 2)
    return dict(zip(CONSTANTS, zip(means.tolist(), np.abs(scales).tolist(), strict=True), strict=True))


@pytest.mark.parametrize("constants", [CONSTANTS, {"heat": (-0.0, 5e-324)}, *map(drawn_bits, range(20))])
def test_what_is_read_is_what_was_written(constants: dict[str, tuple[float, float]], tmp_path: Path) -> None:
    """Every number to the last bit."""
    space = replace(SPACE, regimes=(RegimeSpace.of("a", DOMAIN, constants),))
    space.save(tmp_path)
    again = Space.load(tmp_path)
    assert again == space and hash(again) == hash(space) and again.checksum == space.checksum
    assert repr(again) == repr(space)


def changed(tree: Any) -> list[tuple[str, Any]]:
    """The tree with one of its leaves changed, for each of them."""
    if isinstance(tree, dict):
        return [(f"{k}.{where}", {**tree, k: new}) for k, old in tree.items() for where, new in changed(old)]
    if isinstance(tree, list):
        parts = [(i, where, new) for i, old in enumerate(tree) for where, new in changed(old)]
        return [(f"{i}.{where}", [*tree[:i], new, *tree[i + 1 :]]) for i, where, new in parts]
    if isinstance(tree, bool):
        return [("", not tree)]
    if isinstance(tree, int | float):
        return [("", tree + 1)]
    return [("", "other" if tree is None else f"{tree}x")]


LEAVES = [(where, tree) for where, tree in changed(SPACE.to_dict())]


@pytest.mark.parametrize(("where", "tree"), LEAVES, ids=[where for where, _ in LEAVES])
def test_no_value_changes_unseen(where: str, tree: dict[str, Any], tmp_path: Path) -> None:
    """Edited in the file it is refused; where it means something, it has another checksum."""
    (tmp_path / SPACE_FILE).write_text(json.dumps({**tree, "checksum": SPACE.checksum}))
    with pytest.raises(CheckpointError, match=SPACE_FILE):
        Space.load(tmp_path)
    try:
        found = Space.from_document({**tree, "checksum": digest(tree)}, "there")
    except CheckpointError as error:
        assert "there" in str(error)  # It means nothing.
    else:
        assert found.checksum == digest(tree) != SPACE.checksum and found != SPACE


def test_order_of_regimes_is_part_of_it() -> None:
    turned = SPACE.only(["b", "a"])
    assert turned.checksum != SPACE.checksum and turned.only(["a", "b"]) == SPACE
    with pytest.raises(DataError, match="no regime 'c'"):
        SPACE.only(["c"])


@pytest.mark.parametrize(
    "change",
    [
        {"regimes": ()},
        {"regimes": (SPACE.regimes[0], SPACE.regimes[0])},
        {"ndim": 4},
        {"regimes": (RegimeSpace.of("a", DOMAIN, {"fog": (0.0, 1.0)}),)},
        {"regimes": (RegimeSpace.of("a", DOMAIN, {"heat": (float("nan"), 1.0)}),)},
        {"regimes": (RegimeSpace.of("a", DOMAIN, {"heat": (0.0, -1.0)}),)},
    ],
)
def test_what_means_nothing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        replace(SPACE, **change)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "shodh-space"}', '{"format": "shodh-space", "version": 1}']
)
def test_files_that_are_no_space_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / SPACE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=SPACE_FILE):
        Space.load(tmp_path)
    with pytest.raises(CheckpointError, match=SPACE_FILE):
        Space.load(tmp_path / "absent")


def test_a_file_of_version_0_2_0_is_read_with_the_fields_of_its_run(tmp_path: Path) -> None:
    domains = {r.name: r.domain.to_dict() for r in SPACE.regimes}
    for domain in domains.values():
        del domain["time_step"]
    former = {"normalizer": SPACE.normalizer.to_dict(), "regimes": list(SPACE.names), "domains": domains}
    (tmp_path / SPACE_FILE).write_text(json.dumps(former))
    with pytest.raises(CheckpointError, match="expected format 'shodh-space'"):
        Space.load(tmp_path)
    read = Space.load(tmp_path, FIELDS)
    assert read.fields == FIELDS and read.domains == tuple(replace(d, time_step=None) for d in SPACE.domains)
    assert [r.constants for r in read.regimes] == [r.constants for r in SPACE.regimes]


def test_values_go_to_model_units_and_back() -> None:
    """Powers of two exactly; of masked cells only the fluid comes back, of constants their value."""
    space = replace(SPACE, regimes=(RegimeSpace.of("a", DOMAIN, {**CONSTANTS, "heat": (300.0, 8.0)}),))
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, space.num_channels, 3, 5, 4, generator=draw) * 50
    static = torch.stack([(torch.rand(2, 3, 5, 4, generator=draw) < 0.3).float(), torch.rand(2, 3, 5, 4) + 1], 1)
    back = space.to_physical(space.to_model(values, "a", static), 0, static)
    assert torch.equal(back[:, :, :3], values[:, :, :3])
    fluid = (static[:, :1] == 0).unsqueeze(1).expand(-1, 3, -1, -1, -1, -1)
    torch.testing.assert_close(back[:, :, 3:4][fluid], values[:, :, 3:4][fluid], rtol=1e-5, atol=1e-4)
    assert bool((back[:, :, 3:4][~fluid] == OUTSIDE).all()) and bool((back[:, :, 4] == -7).all())
    scaled = space.static_to_model(static, "a")
    assert torch.equal(scaled[:, 0], static[:, 0])
    torch.testing.assert_close(scaled[:, 1], (static[:, 1].log() - 1) / 3)
