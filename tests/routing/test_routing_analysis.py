"""The whole analysis on traces whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routing_traces import GRID, TOKENS, line, megatron_trace, sample, validation, write

from shodh.core.errors import DataError
from shodh.report.page import Headline, Section, write_page
from shodh.routing import analyse, find_traces, read_traces
from shodh.routing.verdict import classify

Choose = Callable[[int, np.random.Generator], np.ndarray]
PAIR = ("channel", "porous")


def run(folder: Path, *ranks: Sequence[str], split: str | None = None) -> tuple[Headline, dict[str, Section]]:
    headline, sections = analyse(read_traces(find_traces(write(folder, *ranks))), split)
    return headline, {section.key: section for section in sections}


def one_validation(folder: Path, choose: Choose, experts: int, regimes: Sequence[str] = PAIR) -> tuple[Any, Any]:
    return run(folder, list(validation(9, choose, regimes, experts, np.random.default_rng(0))))


def layer_summary(sections: dict[str, Section], layer: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = sections["specialisation"].summary["layers"][str(layer)]
    return found


def constant(regime: int, rng: np.random.Generator) -> np.ndarray:
    return np.full(GRID, regime)


def own_pair(regime: int, rng: np.random.Generator) -> np.ndarray:
    """Each regime has two experts, each with exactly half of every sample's tokens."""
    return 2 * regime + rng.permutation(np.arange(TOKENS) % 2).reshape(GRID)


def uniform(regime: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 4, GRID)


def collapsed(regime: int, rng: np.random.Generator) -> np.ndarray:
    return np.zeros(GRID, dtype=int)


def test_perfectly_bifurcated(tmp_path: Path) -> None:
    headline, sections = one_validation(tmp_path, constant, 2)
    found = layer_summary(sections)
    assert found["u"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    assert found["nmi"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    assert found["purity"] == 1 and found["purity_by_chance"] == 0.5 and found["bifurcation_step"] == 9
    assert sections["fingerprint"].summary["nearest mean"]["accuracy"] == 1
    assert sections["fingerprint"].summary["logistic regression"]["accuracy"] == 1
    assert headline.verdict == "Specialised" and headline.tone == "good"
    assert headline.numbers["U, mean of layers"] == 1


def test_two_experts_a_regime(tmp_path: Path) -> None:
    headline, sections = one_validation(tmp_path, own_pair, 4)
    found = layer_summary(sections)
    assert found["u"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    assert found["nmi"] == pytest.approx(dict.fromkeys(("value", "low", "high"), math.sqrt(0.5)))
    assert headline.verdict == "Specialised"
    assert "0.707" in sections["specialisation"].text


def test_uniform_random(tmp_path: Path) -> None:
    headline, sections = one_validation(tmp_path, uniform, 4)
    found = layer_summary(sections)
    for name in ("u", "nmi"):
        assert found[name]["low"] == 0 <= found[name]["high"] < 0.02
        assert abs(found[name]["value"]) < 0.01
    accuracy = sections["fingerprint"].summary["nearest mean"]["accuracy"]
    assert abs(accuracy - 0.5) < 4 * math.sqrt(0.25 / 64)
    assert headline.verdict == "Balanced but unspecialised"


def test_collapsed(tmp_path: Path) -> None:
    headline, sections = one_validation(tmp_path, collapsed, 4)
    load = sections["load"].summary["layers"]["0"]
    assert (load["max_violation"], load["effective"], load["dead"], load["entropy"]) == pytest.approx((3, 1, 3, 0))
    assert layer_summary(sections)["u"]["value"] == 0
    assert headline.verdict == "Collapsed" and headline.tone == "bad"
    assert headline.numbers["largest share of one expert"] == "100 %"
    assert "3 of 4 experts are dead" in headline.text


def test_block_structure_of_16_experts_and_6_regimes(tmp_path: Path) -> None:
    """Regimes 0 to 3 have four experts each; 4 and 5 share 0 and 4 with exactly equal shares.

    The first four are read without error. Between the last two a classifier can only name one and the same for every
    sample (their features are equal), so 5 of 6 are right. I follows by hand: the expert is known to be 0 or 4 with
    probability 2/6 + 2/24, and then hides which of three regimes it is.
    """
    regimes = [f"regime_{c}" for c in "abcdef"]

    def choose(regime: int, rng: np.random.Generator) -> np.ndarray:
        even = np.arange(TOKENS)
        return (4 * regime + even % 4 if regime < 4 else 4 * (even % 2)).reshape(GRID)

    _, sections = one_validation(tmp_path, choose, 16, regimes)
    for name in ("nearest mean", "logistic regression"):
        found = sections["fingerprint"].summary[name]
        assert found["accuracy"] == pytest.approx(5 / 6) and found["chance"] == pytest.approx(1 / 6)
        confusion = np.array(found["confusion"])
        assert (confusion[:4, :4] == 32 * np.eye(4)).all() and not confusion[:4, 4:].any()
        assert (confusion[4] == confusion[5]).all() and confusion[4, 4:].sum() == 32
    # Joint of (regime, expert): a quarter of 1/6 in 16 cells, and 1/12 in 4 cells.
    joint = 16 / 24 * math.log(24) + 4 / 12 * math.log(12)
    shared = 1 / 24 + 2 / 12
    expert = 14 / 24 * math.log(24) - 2 * shared * math.log(shared)
    raw = (math.log(6) + expert - joint) / math.log(6)
    # Chance is taken off: a little below the plain value, which lies in the interval's reach.
    assert raw - 0.05 < layer_summary(sections)["u"]["value"] < raw


def planted(step: int, bifurcation: int, experts: int = 2) -> dict[str, list[int]]:
    """Independent before the step, then each regime at its own expert."""
    if step < bifurcation:
        return {name: [256] * experts for name in PAIR}
    return {name: [512 if e == i else 0 for e in range(experts)] for i, name in enumerate(PAIR)}


@pytest.mark.parametrize(("steps", "bifurcation", "width"), [(300, 137, 1), (2000, 840, 4)])
def test_planted_bifurcation_step(tmp_path: Path, steps: int, bifurcation: int, width: int) -> None:
    """Exact where each step has its point, else to the width of a stretch."""
    _, sections = run(tmp_path, [line(s, planted(s, bifurcation)) for s in range(steps)])
    assert sections["trace"].summary["steps in one point of a curve"] == width
    found = layer_summary(sections)["bifurcation_step"]
    assert found == bifurcation


def test_bifurcation_that_is_lost_does_not_count(tmp_path: Path) -> None:
    lines = [line(s, planted(s if s < 90 else 0, 50)) for s in range(100)]
    headline, sections = run(tmp_path, lines)
    assert layer_summary(sections)["bifurcation_step"] is None
    assert headline.numbers["all layers above U 0.9 from step"] == "never"


def test_ranks_of_different_length_and_regimes_that_come_later(tmp_path: Path) -> None:
    first = [line(s, planted(s, 0)) for s in range(60)]
    second = [line(s, {**planted(s, 0), "late": [0, 64]}) for s in range(30, 80)]
    headline, sections = run(tmp_path, first, [s.replace('"rank":0', '"rank":1') for s in second])
    assert set(layer_summary(sections)["shares"]) == {"channel", "porous", "late"}
    assert "Ranks end at different steps" in sections["trace"].text
    assert headline.verdict == "Partly specialised"  # "late" shares the expert of "porous"


def two_layers() -> Iterator[str]:
    """The second layer undoes a shift by one of three experts; choices settle over four validations."""
    rng = np.random.default_rng(3)
    for look, settled in enumerate((0.0, 0.5, 1.0, 1.0)):
        for number, regime in enumerate(PAIR):
            for trajectory in range(3):
                final = np.zeros(GRID, dtype=int) + number
                early = (final + 1) % 3
                count = int(settled * TOKENS)
                top1 = np.where((np.arange(TOKENS) < count).reshape(GRID), final, early)
                yield sample(10 * look, regime, trajectory, 0, top1, 3)
                yield sample(10 * look, regime, trajectory, 0, (top1 + 1) % 3, 3, layer=1)
        for layer in range(2):
            counts = {name: rng.integers(1, 9, 3) for name in PAIR}
            yield line(10 * look, counts, layer, "valid", pairs=[[4, 2, 0], [2, 8, 0], [0, 0, 0]])


def test_stability_and_structure(tmp_path: Path) -> None:
    _, sections = run(tmp_path, list(two_layers()))
    rows = [row for row in sections["stability"].tables["stability"].rows if row[0] == 0]
    assert rows == [[0, 0, 10, 0.5, 0.0], [0, 10, 20, 0.5, 0.5], [0, 20, 30, 0.0, 1.0]]
    structure = sections["structure"].summary
    assert structure["transitions"]["0 to 1"][:2].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert structure["co_activation"]["1"][:2].tolist() == [[1, 0.5, 0], [0.25, 1, 0]]
    assert structure["coherence"]["0"]["porous"]["equal"] == 1


def test_held_out_samples_are_preferred_and_a_split_can_be_asked_for(tmp_path: Path) -> None:
    lines = [line(s, planted(s, 500)) for s in range(40)]
    held_out = list(validation(39, constant, PAIR, 2, np.random.default_rng(0)))
    assert run(tmp_path, [*lines, *held_out])[0].verdict == "Specialised"
    assert run(tmp_path, [*lines, *held_out], split="train")[0].verdict == "Balanced but unspecialised"
    with pytest.raises(DataError, match="no split 'test'; it has train, valid"):
        run(tmp_path, lines, held_out, split="test")


def test_trajectories_do_not_leak_into_the_fingerprint(tmp_path: Path) -> None:
    """Each trajectory has experts of its own: its other frames would give it away, other trajectories do not."""
    lines = []
    for number, regime in enumerate(PAIR):
        for trajectory in range(6):
            lines += [
                sample(0, regime, trajectory, frame, np.full(GRID, 6 * number + trajectory), 12) for frame in range(4)
            ]
    counts = {name: [TOKENS] * 12 for name in PAIR}
    _, sections = run(tmp_path, [*lines, line(0, counts, split="valid")])
    # One trajectory of each regime is left out; it is equally far from both means: all are taken for the first.
    assert sections["fingerprint"].summary["nearest mean"]["accuracy"] == 0.5


def test_too_few_trajectories_are_told(tmp_path: Path) -> None:
    lines = list(validation(0, constant, PAIR, 2, np.random.default_rng(0), trajectories=1))
    _, sections = run(tmp_path, lines)
    assert "samples of channel are of one trajectory" in sections["fingerprint"].text


def test_trace_of_one_regime(tmp_path: Path) -> None:
    headline, sections = run(tmp_path, [line(s, {"channel": [5, 6, 7]}) for s in range(20)])
    assert headline.verdict == "Balanced, regimes unknown"
    assert "one regime, channel" in sections["specialisation"].text


def test_megatron_trace_has_a_page_without_regimes(tmp_path: Path) -> None:
    megatron_trace(tmp_path, lambda chosen: chosen)
    headline, sections = analyse(read_traces(find_traces(tmp_path)))
    write_page(tmp_path / "out", "megatron", headline, sections)
    assert headline.verdict == "Balanced, regimes unknown"
    assert "names no regimes" in (tmp_path / "out" / "index.html").read_text()
    found = {s.key: s for s in sections}
    assert set(found["structure"].summary) == {"co_activation", "transitions"}
    assert found["stability"].summary == {"available": False}


@pytest.mark.parametrize(("u", "entropy", "experts", "verdict"), [
    (0.95, 0.7, 8, "specialised"), (0.5, 0.9, 8, "partly specialised"), (0.1, 0.4, 8, "collapsed"),
    (0.95, 0.2, 8, "specialised on few experts"), (0.5, 0.2, 8, "partly specialised on few experts"),
    (0.1, 0.9, 8, "balanced but unspecialised"), (None, 0.9, 8, "balanced, regimes unknown"),
    (None, 0.1, 8, "collapsed"), (0.0, 1.0, 1, "one expert"),
])  # fmt: skip
def test_verdicts(u: float | None, entropy: float, experts: int, verdict: str) -> None:
    assert classify(u, entropy, experts) == verdict


def two_validations(trajectories: int = 8) -> list[str]:
    """Samples and batch records of two layers at steps 0 and 1."""
    rng = np.random.default_rng(0)
    parts = [validation(s, constant, PAIR, 2, rng, trajectories=trajectories, layer=n) for s in (0, 1) for n in (0, 1)]
    return [text for part in parts for text in part]


def test_samples_of_a_trace_that_was_cut_off(tmp_path: Path) -> None:
    """One sample without its last layer is left out; a validation without one of the regimes gives way to the last."""
    lines = two_validations()
    headline, sections = run(tmp_path / "one", [*lines[:-2], lines[-2][:-30]])
    assert headline.note.startswith("From 63 samples of the valid split at step 1.")
    assert "At step 1, 1 of 64 samples lack a layer" in sections["trace"].text
    assert sections["fingerprint"].summary["nearest mean"]["accuracy"] == 1
    half = len(lines) // 2
    headline, sections = run(tmp_path / "half", lines[: half + 40])
    assert headline.note.startswith("From 64 samples of the valid split at step 0.")
    assert "step 1 was cut off" in sections["trace"].text


def test_layers_that_training_was_not_traced_in(tmp_path: Path) -> None:
    """A limit of records may end the training's in the middle of a step."""
    train = [line(step, {"channel": [9, 0], "porous": [0, 9]}) for step in range(50)]
    headline, sections = run(tmp_path, [*train, *two_validations()])
    assert headline.verdict == "Specialised" and set(sections["specialisation"].summary["layers"]) == {"0", "1"}


def test_intervals_from_samples_of_few_trajectories_are_called_too_narrow(tmp_path: Path) -> None:
    few, many = (run(tmp_path / str(n), two_validations(n))[1]["specialisation"] for n in (2, 8))
    assert "take the intervals for too narrow" in few.text and "draw samples anew" in few.text
    assert "too narrow" not in many.text and "draw trajectories anew" in many.text
