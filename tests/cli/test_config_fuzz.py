"""Some hundred broken configurations: a plan or one line with exit code 2, never a traceback."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helper import ROOT, main_of

from shodh.core.cli import run_main

VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**200, 10**9, 65536, 1e300, -0.5, float("nan"), float("inf"), "", "x" * 5000, "no",
    "1e400", "-1e-400", "../..", "a\0b", [], {}, [[[[]]]], [0], [-1, 2], {"a": {"b": 1}}, "ünï", "${x}", [1] * 3000,
]  # fmt: skip
TEXTS = ["a: &a [*a]", "\t", "{", "]", ": ", "- ", "'", "\x00", "\ufeff", "!!binary x", "0x" + "f" * 9000, "? ", "%"]


def leaves(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values of a tree but the root."""
    if place:
        yield place
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(value, (*place, key))


def mutant(text: str, draw: random.Random) -> bytes:
    """A configuration with one or two faults: in its tree, its text or its bytes."""
    tree = copy.deepcopy(yaml.safe_load(text))
    for _ in range(draw.choice((1, 1, 2))):
        *parents, last = draw.choice(list(leaves(tree)))
        node = tree
        for key in parents:
            node = node[key]
        kind = draw.random()
        if kind < 0.7:
            node[last] = copy.deepcopy(draw.choice(VALUES))
        elif kind < 0.8:
            del node[last]
        elif isinstance(node, dict):
            node[draw.choice(("seed", "stepz", 7, False, "", "name"))] = node.pop(last)
    out = yaml.safe_dump(tree, allow_unicode=True).encode()
    kind, place = draw.random(), draw.randrange(len(out))
    if kind < 0.1:
        out = out[:place] + draw.choice(TEXTS).encode() + out[place:]
    elif kind < 0.15:
        out = out[:place] + bytes([draw.randrange(256)]) + out[place + 1 :]
    elif kind < 0.2:
        out = out + out[:place]
    return out


@pytest.mark.parametrize(
    ("script", "config", "number"),
    [
        ("launch/pretrain.py", "demo", 100),
        ("launch/pretrain.py", "moe_pot_tiny", 60),
        ("launch/pretrain.py", "fno_tiny", 30),
        ("launch/study.py", "study_tiny", 30),
        ("launch/ccm.py", "ccm_vorticity", 40),
        ("launch/finetune.py", "finetune_tiny", 40),
    ],
)
def test_broken_configuration_is_answered(
    script: str,
    config: str,
    number: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    main, text, path = main_of(script), (ROOT / "launch/configs" / f"{config}.yaml").read_text(), tmp_path / "m.yaml"
    codes = []
    for seed in range(number):
        path.write_bytes(mutant(text, random.Random(f"{script} {config} {seed}")))
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: main(["--config", str(path), "--dry-run"]))
        errors = [line for line in capfd.readouterr().err.splitlines() if "WARNING" not in line]
        codes.append(ended.value.code)
        assert ended.value.code in (0, 2), (seed, path.read_text(errors="replace"))
        if ended.value.code == 2:
            assert len(errors) == 1 and errors[0].startswith("error: ") and len(errors[0]) < 2000, (seed, errors)
    assert codes.count(2) > number / 3
