"""Baselines agree with plain dense versions of what their papers define."""

from __future__ import annotations

import pytest
import torch
from expert_weights import EXPERTS, State

from shodh.core.errors import ConfigError
from shodh.merge import (
    Update,
    average,
    baselines,
    compose,
    dare,
    decompose,
    from_memory,
    lazy,
    random_direction,
    task_arithmetic,
    ties,
    to_memory,
)

Tensor = torch.Tensor


@pytest.fixture
def states() -> list[State]:
    draw = torch.Generator().manual_seed(0)
    shapes = {EXPERTS: (3, 20, 10), "operator.embed.weight": (31, 7), "operator.head.bias": (5,)}
    anchor = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return [anchor] + [{n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in anchor.items()} for _ in range(3)]


def flat(state: State) -> Tensor:
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def ties_reference(anchor: Tensor, experts: list[Tensor], density: float, scaling: float) -> Tensor:
    """As in the paper, on vectors of the whole model."""
    updates = torch.stack([expert - anchor for expert in experts])
    for update in updates:
        kept = update.abs().topk(round(density * update.numel())).indices
        mask = torch.zeros_like(update).index_fill_(0, kept, 1.0)
        update.mul_(mask)
    sign = torch.sign(updates.sum(0))
    merged = []
    for column, s in zip(updates.T.tolist(), sign.tolist(), strict=True):
        agreeing = [v for v in column if v * s > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return anchor + scaling * torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize("density", (0.05, 0.2, 1.0))
def test_ties_is_what_the_paper_defines(states: list[State], density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is of the whole model, found in blocks."""
    monkeypatch.setattr(lazy, "BLOCK", 64)
    found = to_memory(ties(from_memory(states[0]), [from_memory(s) for s in states[1:]], density, 0.7))
    expected = ties_reference(flat(states[0]), [flat(s) for s in states[1:]], density, 0.7)
    torch.testing.assert_close(flat(found), expected, rtol=1e-6, atol=1e-7)


def test_ties_keeps_the_density_it_is_told(states: list[State]) -> None:
    anchor = {name: torch.zeros_like(t) for name, t in states[0].items()}
    found = flat(to_memory(ties(from_memory(anchor), [from_memory(states[1])], 0.2)))
    assert int((found != 0).sum()) == round(0.2 * found.numel())


def test_dare_keeps_a_share_and_the_expectation(states: list[State]) -> None:
    """Every value is dropped, or the update over the density; which, is random. Tolerances: four standard errors."""
    anchor, expert = states[:2]
    update = flat(expert) - flat(anchor)
    density, draws = 0.25, 60
    changes = torch.stack(
        [
            flat(to_memory(dare(from_memory(anchor), [from_memory(expert)], density, 1.0, seed))) - flat(anchor)
            for seed in range(draws)
        ]
    )
    kept = changes != 0
    torch.testing.assert_close(changes[kept], (update / density).expand_as(changes)[kept], rtol=1e-3, atol=1e-6)
    count = kept.numel()
    assert abs(float(kept.double().mean()) - density) < 4 * (density * (1 - density) / count) ** 0.5
    error = (changes.mean(0) - update).square().sum() / update.square().sum()
    expected = (1 / density - 1) / draws
    assert 0.7 * expected < error < 1.3 * expected


def test_dare_that_drops_nothing_is_task_arithmetic(states: list[State]) -> None:
    anchor, *experts = (from_memory(s) for s in states)
    one, other = (to_memory(w) for w in (dare(anchor, experts, 1.0, 0.3), task_arithmetic(anchor, experts, 0.3)))
    torch.testing.assert_close(flat(one), flat(other), rtol=2.0**-23, atol=0.0)  # the terms are summed in another order
    expected = flat(states[0]) + 0.3 * sum(flat(s) - flat(states[0]) for s in states[1:])
    torch.testing.assert_close(flat(other), expected, rtol=1e-6, atol=1e-7)


def test_random_numbers_belong_to_seed_tensor_and_place(states: list[State]) -> None:
    """Two experts are thinned differently; a part of a tensor gets what the whole one gets."""
    anchor, low, high = (from_memory(s) for s in states[:3])
    direction = random_direction(decompose(anchor, low, high)[1], seed=1).weights()
    again, other = (random_direction(decompose(anchor, low, high)[1], seed=s).weights() for s in (1, 2))
    for name, tensor in direction.items():
        whole = tensor.read().flatten()
        assert torch.equal(again[name].read().flatten(), whole) and not torch.equal(other[name].read().flatten(), whole)
        assert torch.equal(tensor.part(2, 5), whole[2:5])
    assert not torch.equal(
        *(random_direction(Update(((from_memory({n: torch.ones(9)}), 1.0),))).weights()[n].read() for n in ("a", "b"))
    ), "two tensors of one shape"
    twice = flat(to_memory(dare(anchor, [low, low], 0.5, 1.0))) - flat(states[0])
    update = flat(states[1]) - flat(states[0])
    assert set((twice / (2 * update)).round().int().tolist()) == {0, 1, 2}


def test_random_direction_has_the_norm_of_the_true_one_in_every_tensor(states: list[State]) -> None:
    states[1]["operator.head.bias"] = states[2]["operator.head.bias"]
    anchor, low, high = (from_memory(s) for s in states[:3])
    _, direction = decompose(anchor, low, high)
    true, drawn = (to_memory(d.weights()) for d in (direction, random_direction(direction)))
    for name in true:
        assert float(drawn[name].norm()) == pytest.approx(float(true[name].norm()), rel=1e-6)
    # Independent directions in 600 dimensions: a cosine of standard deviation 0.04.
    one, other = true[EXPERTS].double().flatten(), drawn[EXPERTS].double().flatten()
    assert abs(float(one @ other / one.norm() / other.norm())) < 4 * 600**-0.5
    assert not drawn["operator.head.bias"].any()


def test_random_numbers_do_not_depend_on_how_much_is_read_at_once(
    states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lazy, baselines):
        monkeypatch.setattr(module, "BLOCK", 100)
    anchor, low, high = (from_memory(s) for s in states[:3])
    tensor = random_direction(decompose(anchor, low, high)[1]).weights()[EXPERTS]
    whole = tensor.read().flatten()
    assert torch.equal(torch.cat([tensor.part(i, i + 60) for i in range(0, 600, 60)]), whole)


def test_average_of_two_is_composition_in_the_middle(states: list[State]) -> None:
    anchor, low, high = (from_memory(s) for s in states[:3])
    middle = to_memory(compose(anchor, *decompose(anchor, low, high), 0.0))
    found = to_memory(average([low, high]))
    assert all(torch.equal(found[name], middle[name]) for name in middle)
    three = flat(to_memory(average([from_memory(s) for s in states[1:]])))
    torch.testing.assert_close(three, sum(flat(s) for s in states[1:]) / 3, rtol=1e-6, atol=1e-7)


def test_what_no_expert_changed_stays_bitwise_the_anchor(states: list[State]) -> None:
    for state in states[1:]:
        state[EXPERTS] = states[0][EXPERTS]
    anchor, *experts = (from_memory(s) for s in states)
    for weights in (task_arithmetic(anchor, experts), ties(anchor, experts), dare(anchor, experts), average(experts)):
        assert torch.equal(weights[EXPERTS].read(), states[0][EXPERTS])


def test_impossible_densities_are_refused(states: list[State]) -> None:
    anchor, *experts = (from_memory(s) for s in states)
    for density in (0.0, 1.5, -0.1):
        for method in (ties, dare):
            with pytest.raises(ConfigError, match="density"):
                method(anchor, experts, density)


def test_updates_add_and_scale() -> None:
    one, other = (from_memory({"a": torch.tensor([x])}) for x in (2.0, 3.0))
    update = 2.0 * (Update(((one, 1.0),)) + Update(((other, -1.0), (one, 0.5))))
    assert update.weights()["a"].read().tolist() == [0.0]
    assert len(update.points()) == 2
