"""Composition is exact at the experts, within half a unit in the last place between them, and linear."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from expert_weights import EXPERTS, State, same_bits, wild_weights
from torch import Tensor

from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.weights import LazyWeights
from shodh.merge import Coordinates, compose, curve, decompose, from_memory, lazy, plane, to_memory
from shodh.merge.coordinates import Rule


def family(dtype: torch.dtype = torch.float32) -> tuple[State, State, State]:
    anchor, low, high = (wild_weights(seed, dtype) for seed in range(3))
    return anchor, low, high


def composed(alpha: float | Coordinates, states: tuple[State, State, State]) -> State:
    anchor, low, high = (from_memory(state) for state in states)
    return to_memory(compose(anchor, *decompose(anchor, low, high), alpha))


def tame(count: int, rows: tuple[int, ...] = (4, 5)) -> list[State]:
    names = (EXPERTS, "operator.blocks.1.attention.qkv.weight")
    draw = torch.Generator().manual_seed(0)
    return [{name: torch.randn(3, *rows, generator=draw) for name in names} for _ in range(count)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_experts_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    states = family(dtype)
    for alpha, expert in ((-1.0, states[1]), (1.0, states[2])):
        found = composed(alpha, states)
        assert found.keys() == expert.keys()
        for name, tensor in expert.items():
            assert same_bits(found[name], tensor), (name, alpha)


def test_the_formula_as_written_loses_the_experts() -> None:
    """In float32 and in float64: why composition adds factors before weights."""
    anchor, low, high = (state["operator.wild"] for state in family())
    for dtype in (torch.float32, torch.float64):
        a, d_low, d_high = anchor.to(dtype), low.to(dtype) - anchor.to(dtype), high.to(dtype) - anchor.to(dtype)
        back = a + (d_low + d_high) / 2 - (d_high - d_low) / 2
        assert not torch.equal(back.float(), low), dtype


@pytest.mark.parametrize("alpha", (-1.5, -0.9999999, -0.3, 0.0, 1 / 3, 0.75, 1.37))
def test_values_are_the_exact_ones_rounded(alpha: float) -> None:
    """Half a unit in the last place, and 2^-51 of the larger term; checked in rational numbers."""
    states = family()
    found = composed(alpha, states)
    for name in ("operator.wild", EXPERTS):
        columns = (t[name].flatten() for t in (*states, found))
        for row in zip(*(c.tolist() for c in columns), strict=True):
            anchor, low, high, value = map(Fraction, row)
            d_low, d_high = low - anchor, high - anchor
            exact = anchor + (d_low + d_high) / 2 + Fraction(alpha) * (d_high - d_low) / 2
            ulp = Fraction(float(np.spacing(np.float32(abs(float(exact))))))
            assert abs(value - exact) <= ulp / 2 + max(abs(low), abs(high)) * Fraction(1, 2**51)


def test_composition_is_continuous_into_its_ends() -> None:
    states = family()
    low, high = (state["operator.wild"].double() for state in states[1:])
    for power in range(2, 30, 3):
        step = 2.0**-power
        near = composed(1.0 - step, states)["operator.wild"].double()
        ulp = torch.from_numpy(np.spacing(high.abs().float().numpy())).double()
        assert ((near - high).abs() <= step / 2 * (high - low).abs() * (1 + 1e-6) + 2 * ulp).all(), power


def test_what_all_experts_share_stays_bitwise_the_same() -> None:
    anchor, low, high = family()
    low["operator.wild"], high["operator.wild"] = anchor["operator.wild"], anchor["operator.wild"]
    for alpha in (-1.5, -0.3, 0.1, 0.7, 1.25):
        found = composed(alpha, (anchor, low, high))["operator.wild"]
        assert torch.equal(found, anchor["operator.wild"]), alpha


def test_decomposition_adds_up_and_is_what_the_paper_defines() -> None:
    states = [{name: t.double() for name, t in state.items()} for state in tame(3)]
    anchor, low, high = (from_memory(state) for state in states)
    shared, direction = decompose(anchor, low, high)
    start, down, up = (state[EXPERTS] for state in states)
    torch.testing.assert_close(to_memory(shared.weights())[EXPERTS], ((down - start) + (up - start)) / 2)
    torch.testing.assert_close(to_memory(direction.weights())[EXPERTS], ((up - start) - (down - start)) / 2)
    half = compose(anchor, 0.5 * shared, direction, 0.25)
    torch.testing.assert_close(
        to_memory(half)[EXPERTS], start + 0.5 * ((down + up) / 2 - start) + 0.25 * (up - down) / 2
    )


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a block ends within an expert."""
    states = family()
    by_expert = Coordinates((0.3,), (Rule(match="*.experts.*", alpha=-0.7, experts=(1,)),))
    whole = [composed(alpha, states) for alpha in (0.3, by_expert)]
    monkeypatch.setattr(lazy, "BLOCK", 7)
    for alpha, expected in zip((0.3, by_expert), whole, strict=True):
        found = composed(alpha, states)
        assert all(same_bits(found[name], expected[name]) for name in expected)


def test_each_layer_and_expert_has_its_coordinate() -> None:
    """Experts at their ends are bitwise those, minus zeros included, whatever the others do."""
    states = family()
    states[2][EXPERTS][2] = -0.0
    rules = (
        Rule(match="operator.blocks.*", alpha=-1.0),
        Rule(match="*.experts.*", alpha=1.0, experts=(0, 2)),
        Rule(match="*.embed.*", alpha=0.5),
    )
    found = composed(Coordinates((0.0,), rules), states)
    _, low, high = states
    assert same_bits(found["operator.blocks.0.norm1.weight"], low["operator.blocks.0.norm1.weight"])
    for expert, source in enumerate((high, low, high)):
        assert same_bits(found[EXPERTS][expert], source[EXPERTS][expert]), expert
    assert torch.equal(found["operator.embed.weight"], composed(0.5, states)["operator.embed.weight"])
    assert torch.equal(found["operator.wild"], composed(0.0, states)["operator.wild"])


# Curves and planes


@pytest.mark.parametrize("kind", ("piecewise", "polynomial"))
def test_a_curve_goes_through_its_experts_bit_by_bit(kind: str) -> None:
    states = [wild_weights(seed) for seed in range(4)]
    positions = (-1.0, -0.37, 0.1, 1.0)
    span = curve([from_memory(s) for s in states], positions, kind)  # type: ignore[arg-type]
    for position, state in zip(positions, states, strict=True):
        found = to_memory(span.at(position))
        assert all(same_bits(found[name], state[name]) for name in state), position


def at(span_weights: LazyWeights) -> Tensor:
    return span_weights[EXPERTS].read()


def test_polynomial_reproduces_weights_that_are_a_polynomial_of_the_coordinate() -> None:
    """Of the degree it should, and of no higher one; piecewise does so for degree one only, also beyond the ends."""
    a, b, c = (state[EXPERTS].double() for state in tame(3))
    nodes = (-1.0, 0.2, 1.0)

    def error(kind: str, degree: int, x: float) -> float:
        coefficients = (a, b, c, a - b)[: degree + 1]
        value = lambda p: sum((w * p**i for i, w in enumerate(coefficients)), torch.zeros_like(a))  # noqa: E731
        span = curve([from_memory({EXPERTS: value(p)}) for p in nodes], nodes, kind)  # type: ignore[arg-type]
        return float((at(span.at(x)) - value(x)).abs().max())

    for x in (-1.3, -0.4, 0.5, 1.4):
        assert error("polynomial", 2, x) < 1e-13 and error("polynomial", 3, x) > 1e-2
        assert error("piecewise", 1, x) < 1e-13 and error("piecewise", 2, x) > 1e-2


def test_two_experts_on_a_curve_are_the_line() -> None:
    states = family()
    for kind in ("piecewise", "polynomial"):
        span = curve([from_memory(s) for s in states[1:]], (-1.0, 1.0), kind)  # type: ignore[arg-type]
        for alpha in (-1.2, 0.4):
            found, expected = to_memory(span.at(alpha)), composed(alpha, states)
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_planes_go_through_their_experts_and_reproduce_linear_weights() -> None:
    a, b, c, d = (state[EXPERTS].double() for state in tame(4))
    value = lambda x, y: a + x * b + y * c + x * y * d  # noqa: E731
    corners = ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))
    patch = plane([from_memory({EXPERTS: value(*p)}) for p in corners])
    triangle = ((-1.0, -0.5), (1.0, -0.25), (0.1, 0.9))
    flat = lambda x, y: a + x * b + y * c  # noqa: E731
    through = plane([from_memory({EXPERTS: flat(*p)}) for p in triangle], triangle)
    for p in corners:
        assert torch.equal(at(patch.at(p)), value(*p))
    for p in triangle:
        assert torch.equal(at(through.at(p)), flat(*p))
    for p in ((0.3, -0.8), (1.4, 0.2)):
        torch.testing.assert_close(at(patch.at(p)), value(*p), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(at(through.at(p)), flat(*p), rtol=1e-12, atol=1e-12)
    by_expert = Coordinates((0.0, 0.0), (Rule(match="*.experts.*", alpha=(1.0, -1.0), experts=(1,)),))
    assert torch.equal(at(patch.at(by_expert))[1], value(1.0, -1.0)[1])
    torch.testing.assert_close(at(patch.at(by_expert))[0], value(0.0, 0.0)[0])


def test_impossible_spans_are_refused() -> None:
    states = [from_memory(state) for state in tame(4)]
    for make, expected in (
        (lambda: curve(states[:3], (-1.0, 1.0, 0.5)), "increasing"),
        (lambda: curve(states[:1], (0.0,)), ">= 2"),
        (lambda: curve(states[:2], (-1.0, 1.0), "cubic"), "expected one of"),  # type: ignore[arg-type]
        (lambda: plane(states[:3], ((0, 0), (1, 1), (2, 2))), "lie on a line"),
        (lambda: plane(states[:3]), "needs 4 experts"),
        (lambda: plane(states, ((0, 0), (1, 1), (2, 3))), "for three experts"),
    ):
        with pytest.raises(ConfigError, match=expected):
            make()


# What cannot be merged


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop(EXPERTS), "is in the anchor only"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is in the low expert only"),
        (lambda s: s.update({EXPERTS: torch.zeros(2, 4, 5)}), r"\[3, 4, 5\] float32 in the anchor and \[2, 4, 5\]"),
        (lambda s: s.update({EXPERTS: s[EXPERTS].bfloat16()}), "bfloat16 in the low expert"),
    ],
)
def test_other_architectures_are_refused(change: object, expected: str) -> None:
    anchor, low, high = tame(3)
    change(low)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=expected):
        decompose(from_memory(anchor), from_memory(low), from_memory(high))


def test_values_that_overflow_are_refused_and_not_written() -> None:
    low, high = ({"a": torch.tensor([sign * 6e4], dtype=torch.float16)} for sign in (-1, 1))
    anchor = {"a": torch.zeros(1, dtype=torch.float16)}
    with pytest.raises(CheckpointError, match="a: a merged value is not finite in float16"):
        composed(1.5, (anchor, low, high))
