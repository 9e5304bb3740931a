"""The comparison with the peers: through the command, from nothing and after a kill, and what it concludes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tools.bench.side_by_side.models import MODELS, Shape, Size
from tools.bench.side_by_side.page import all_duels, headline, verdicts
from tools.bench.side_by_side.results import Results, chosen_rates
from tools.bench.side_by_side.sets import Data
from tools.bench.side_by_side.training import CAP, batch_of, errors

ROOT = Path(__file__).resolve().parents[2]
CELL = "cells/dam_break.dpot.steps.0.json"


#: One interpreter for what would be three commands: from nothing, after a kill, and with another scale.
THRICE = """
import pathlib, sys, peers
from shodh.core.errors import ConfigError
out, *asked = sys.argv[1:]
cell = pathlib.Path(out, "cells/dam_break.dpot.steps.0.json")
peers.main(["--out", out, "--scale", "tiny", *asked])
cell.rename(pathlib.Path(out, "before.json"))
peers.main(["--out", out, *asked])
try:
    peers.main(["--out", out, "--scale", "small", "--page"])
except ConfigError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_models_on_one_set_and_again_after_a_kill(tmp_path: Path) -> None:
    asked = ("--only", "dam_break", "fno", "dpot", "--seeds", "1", "--rates", "published")
    command = [sys.executable, "-c", THRICE, str(tmp_path), *asked]
    done = subprocess.run(command, cwd=ROOT / "tools" / "bench", capture_output=True, text=True, timeout=250)
    assert "--scale small" in done.stderr.splitlines()[-1] and "tiny" in done.stderr.splitlines()[-1], done.stderr
    page = json.loads((tmp_path / "page" / "peers.json").read_text())
    rows = {(row["budget"], row["model"]): row for row in page["rows"]}
    assert set(rows) == {(b, m) for b in ("seconds", "steps") for m in ("fno", "dpot", "persistence")}
    assert all(0 < row["vrmse"] < CAP and 0 < row["rollout_nrmse"] < CAP for row in rows.values())
    assert {rows["steps", model]["rate"] for model in ("fno", "dpot")} == {1e-3}
    assert "dam break" in (tmp_path / "page" / "index.html").read_text()
    before, again = (json.loads((tmp_path / name).read_text()) for name in ("before.json", CELL))
    assert again["loss"] == before["loss"] and again["test"] == before["test"]
    assert done.stderr.count("dam_break.fno.steps.0") == 1  # What is finished is not done again.


@pytest.mark.parametrize("name", MODELS)
def test_every_model_predicts_a_frame_from_the_seed(name: str) -> None:
    if missing := MODELS[name].missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    widths = dict.fromkeys(("fno", "neuralop_fno", "neuralop_tfno", "dpot", "latent", "pde_transformer"), 16)
    size, shape = Size(4, 4, {**widths, "unet_classic": 4, "unet_convnext": 4}), Shape(2, 3, 16, True)
    history = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    models = [MODELS[name].build(size, shape, seed) for seed in (0, 0, 1)]
    frames = [model.eval()(history) for model in models]
    assert frames[0].shape == (2, 3, 16, 16)
    assert torch.equal(frames[0], frames[1])
    drawn = [torch.cat([p.detach().flatten().abs() for p in model.parameters()]) for model in models]
    assert not torch.equal(drawn[0], drawn[2])


def test_batches_depend_on_the_key_alone_and_targets_follow() -> None:
    data = torch.arange(3 * 9.0).view(3, 9, 1, 1, 1)
    given, target = batch_of(data, ("set", 0, 5), 64, 4)
    assert torch.equal(given.flatten(1)[:, -1] + 1, target.flatten())
    assert torch.equal(given, batch_of(data, ("set", 0, 5), 64, 4)[0])
    assert not torch.equal(given, batch_of(data, ("set", 0, 6), 64, 4)[0])
    assert set(given[:, 0].flatten().tolist()) <= {t * 9.0 + s for t in range(3) for s in range(5)}


def test_nrmse_is_of_physical_units_and_what_explodes_is_capped() -> None:
    data = Data({}, {"height": slice(0, 1)}, torch.tensor([5.0]), torch.tensor([2.0]))
    truth = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = errors(truth + 0.1, truth, data)
    physical = (truth * 2 + 5).double().square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(found["nrmse"], 0.2 / physical)
    torch.testing.assert_close(
        found["vrmse"], 0.1 / truth.double().var((1, 2, 3), correction=0).sqrt(), rtol=1e-5, atol=0
    )
    assert errors(truth * torch.nan, truth, data)["vrmse"].tolist() == [CAP] * 4


def planted(model: str, error: float, budget: str = "seconds", seed: int = 0, **more: Any) -> dict[str, Any]:
    values = error * np.linspace(0.9, 1.1, 8) * (1 + 0.01 * seed)
    split = {"one_step": {"vrmse": values, "nrmse": values}}
    split["rollout"] = {name: np.tile(values[:, None], 3) for name in ("vrmse", "nrmse")}
    return {"data": "dam_break", "model": model, "budget": budget, "seed": seed, "valid": split, "test": split, **more}


def results(*records: dict[str, Any]) -> Results:
    return Results({(r["data"], r["model"], r["budget"], r["seed"]): r for r in records})


@pytest.mark.parametrize(("ours", "lost"), [(0.3, True), (0.1, False)])
def test_a_set_where_a_peer_is_better_is_said_to_be_lost(ours: float, lost: bool) -> None:
    still = planted("persistence", 0.05)
    models = {"fno": ours, "dpot": 0.9, "unet_classic": 0.2, "pde_transformer": 0.8}
    known = results(*(planted(m, error, seed=s) for m, error in models.items() for s in range(3)), still)
    found = all_duels(known)
    (duel,) = found["seconds", "one_step"]
    assert (duel.ours, duel.theirs) == ("fno", "unet_classic")
    assert duel.ratio == pytest.approx(ours / 0.2)
    assert duel.comparison.verdict == ("higher" if lost else "lower")
    assert len(verdicts([duel], lost=lost).rows) == 1 and not verdicts([duel], lost=not lost).rows
    first = headline(known, found, [])
    assert first.numbers["equal seconds, rollout: lost"] == f"{int(lost)} of 1"
    assert first.numbers["equal seconds, rollout: first"] == f"{int(not lost)} of 1"
    assert f"{int(lost)} of 1" in first.verdict and "persistence" in first.text


def test_the_rate_with_the_least_validation_error_is_chosen() -> None:
    tried = {1e-3: 0.4, 3e-3: 0.2, 1e-2: 0.5}
    found = results(*(planted("fno", error, f"tune-{rate:g}", rate=rate) for rate, error in tried.items()))
    assert chosen_rates(found) == {"fno": 3e-3}
