"""Balance terms on one rank: their extremes, their gradients, their memory of micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shodh.config import BalanceConfig, ExpertsConfig
from shodh.moe.balance import BalanceTerms, GlobalBalance, entropy, update_selection_bias
from shodh.moe.routers import make_router
from shodh.moe.routing import Routing, count_assignments

EXPERTS = 6


def routing(probs: Tensor, selected: Tensor | None = None, groups: int = 0) -> Routing:
    """A decision with these probabilities; two-level if there are groups."""
    group_probs = probs.new_empty(len(probs), 0)
    if groups:
        group_probs = probs.view(len(probs), groups, -1).sum(-1)
    if selected is None:
        selected = probs.argmax(-1, keepdim=True)
    counts, weights = count_assignments(selected, EXPERTS), probs.gather(1, selected)
    return Routing(probs, probs.clamp(min=1e-9).log(), selected, counts, group_probs, weights)


def random_probs(tokens: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(tokens, EXPERTS, generator=draw)).softmax(-1)


BALANCED = torch.eye(EXPERTS).repeat(4, 1)
COLLAPSED = torch.eye(EXPERTS)[torch.zeros(24, dtype=torch.long)]
UNDECIDED = torch.full((24, EXPERTS), 1 / EXPERTS)


def test_switch_term_is_one_when_balanced_and_the_number_of_experts_when_collapsed() -> None:
    assert GlobalBalance()([routing(BALANCED)]).switch.item() == pytest.approx(1.0)
    assert GlobalBalance()([routing(COLLAPSED)]).switch.item() == pytest.approx(EXPERTS)
    spread = torch.arange(24).view(-1, 1) % EXPERTS
    assert GlobalBalance()([routing(UNDECIDED, spread)]).switch.item() == pytest.approx(1.0)


def test_information_is_largest_for_decided_and_evenly_used_experts() -> None:
    assert GlobalBalance()([routing(BALANCED)]).information.item() == pytest.approx(math.log(EXPERTS))
    assert GlobalBalance()([routing(COLLAPSED)]).information.item() == pytest.approx(0.0, abs=1e-7)
    assert GlobalBalance()([routing(UNDECIDED)]).information.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_information_lies_between_nothing_and_the_number_of_experts(seed: int) -> None:
    probs = random_probs(17, seed)
    assert 0.0 < GlobalBalance()([routing(probs)]).information.item() < math.log(EXPERTS)
    assert 0.0 < GlobalBalance()([routing(probs, groups=3)]).information.item() < math.log(3)


def test_two_levels_balance_within_groups_and_inform_between_them() -> None:
    # All tokens in the first of three groups, evenly over its two experts: balanced, without information.
    first = torch.eye(EXPERTS)[torch.arange(24) % 2]
    terms = GlobalBalance()([routing(first, groups=3)])
    assert terms.switch.item() == pytest.approx(1.0)
    assert terms.information.item() == pytest.approx(0.0, abs=1e-6)
    # Every group used, in each of them one expert alone: full information, collapse within the groups.
    lonely = torch.eye(EXPERTS)[2 * (torch.arange(24) % 3)]
    terms = GlobalBalance()([routing(lonely, groups=3)])
    assert terms.switch.item() == pytest.approx(2.0)
    assert terms.information.item() == pytest.approx(math.log(3))
    terms = GlobalBalance()([routing(BALANCED, groups=3)])
    assert (terms.switch.item(), terms.information.item()) == pytest.approx((1.0, math.log(3)))


def test_two_level_switch_is_the_mean_over_groups_weighted_by_their_shares() -> None:
    probs = random_probs(40, 3)
    ours = GlobalBalance()([routing(probs, groups=3)]).switch
    group = probs.argmax(-1) // 2
    expected = torch.zeros(())
    for g in range(3):
        rows = probs[group == g].view(-1, 3, 2)[:, g]
        within = (rows / rows.sum(-1, keepdim=True)).mean(0)
        chosen = probs[group == g].argmax(-1)
        fraction = torch.stack([(chosen == 2 * g + e).float().mean() for e in range(2)])
        expected += len(rows) / len(probs) * 2 * (fraction * within).sum()
    torch.testing.assert_close(ours, expected)


def test_z_loss_is_the_mean_square_of_the_log_partition() -> None:
    logits = torch.randn(9, EXPERTS, generator=torch.Generator().manual_seed(1))
    decision = routing(logits.softmax(-1))._replace(logits=logits)
    expected = (logits.exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(GlobalBalance()([decision]).z_loss, expected)


def test_importance_is_zero_when_balanced_and_one_less_than_the_experts_when_collapsed() -> None:
    assert GlobalBalance()([routing(BALANCED)]).importance.item() == pytest.approx(0.0, abs=1e-12)
    assert GlobalBalance()([routing(COLLAPSED)]).importance.item() == pytest.approx(EXPERTS - 1)
    # One of two: the weights count, not the choices.
    uneven = torch.zeros(8, EXPERTS)
    uneven[:, 0], uneven[:, 1] = 0.75, 0.25
    both = routing(uneven, torch.tensor([[0, 1]]).expand(8, -1))
    mean = 1 / EXPERTS
    variance = ((0.75 - mean) ** 2 + (0.25 - mean) ** 2 + (EXPERTS - 2) * mean**2) / EXPERTS
    assert GlobalBalance()([both]).importance.item() == pytest.approx(variance / mean**2)


def test_importance_does_not_depend_on_the_size_of_the_batch() -> None:
    probs = random_probs(16, 2)
    one, two = (GlobalBalance()([routing(probs.repeat(n, 1))]).importance for n in (1, 2))
    torch.testing.assert_close(one, two)


def test_load_is_the_variation_of_the_smooth_load() -> None:
    probs, load = random_probs(12, 6), random_probs(12, 7)
    terms = GlobalBalance()([routing(probs)._replace(load_probs=load)])
    total = load.sum(0)
    torch.testing.assert_close(terms.load, total.var(correction=0) / total.mean() ** 2)
    assert GlobalBalance()([routing(probs)]).load == 0


def test_later_terms_are_added_with_their_weights_and_reported_if_they_have_one() -> None:
    first = routing(random_probs(8, 0))._replace(load_probs=random_probs(8, 2), similarity=torch.tensor(0.25))
    terms = GlobalBalance()([first, first])
    config = BalanceConfig(switch=0, information=0, z_loss=0, importance=2.0, cv2=3.0, load=5.0, orthogonality=7.0)
    expected = 2 * terms.importance + 3 * (2 * terms.importance) + 5 * terms.load + 7 * 0.25
    torch.testing.assert_close(terms.weighted(config), expected)
    assert set(terms.reported(config)) == set(BalanceTerms._fields)
    assert set(terms.reported(BalanceConfig())) == {"switch", "information", "z_loss"}


def test_gradient_step_evens_out_importance() -> None:
    logits = (2 * torch.randn(30, EXPERTS, generator=torch.Generator().manual_seed(4))).requires_grad_()
    selected = logits.topk(2).indices

    def importance() -> Tensor:
        return GlobalBalance()([routing(logits.softmax(-1), selected)]).importance

    before = importance()
    before.backward()
    with torch.no_grad():
        logits -= 5 * logits.grad
    assert importance() < before


def test_layers_are_averaged_and_weights_have_the_right_sign() -> None:
    a, b = routing(random_probs(8, 0)), routing(random_probs(8, 1))
    each = [GlobalBalance()([r]) for r in (a, b)]
    both = GlobalBalance()([a, b])
    for name, ours, *parts in zip(BalanceTerms._fields, both, *each, strict=True):
        layers = torch.stack(parts)
        torch.testing.assert_close(ours, layers.sum() if name == "cv2" else layers.mean())
    config = BalanceConfig(switch=2.0, information=3.0, z_loss=5.0)
    expected = 2 * both.switch - 3 * both.information + 5 * both.z_loss
    torch.testing.assert_close(both.weighted(config), expected)


@pytest.mark.parametrize("groups", [0, 3])
def test_gradient_step_lowers_switch_and_raises_information(groups: int) -> None:
    logits = (2 * torch.randn(30, EXPERTS, generator=torch.Generator().manual_seed(4))).requires_grad_()

    def terms() -> BalanceTerms:
        return GlobalBalance()([routing(logits.softmax(-1), groups=groups)])

    before = terms()
    (before.switch - before.information).backward()
    with torch.no_grad():
        logits -= 0.5 * logits.grad
    after = terms()
    assert (after.switch - after.information) < (before.switch - before.information)
    assert not before.switch.isnan() and logits.grad.isfinite().all()


def test_last_micro_batch_sees_the_mean_of_the_whole_batch() -> None:
    probs = random_probs(32, 5)
    whole = GlobalBalance()([routing(probs)])
    balance = GlobalBalance()
    parts = [balance([routing(p)]) for p in probs.chunk(4)]
    torch.testing.assert_close(parts[-1].switch, whole.switch)
    torch.testing.assert_close(entropy(probs.mean(0)), parts[-1].information + entropy(probs.chunk(4)[-1]).mean())
    balance.start_step()
    torch.testing.assert_close(balance([routing(probs.chunk(4)[0])]).switch, parts[0].switch)


def test_validation_leaves_the_step_alone() -> None:
    balance, first, second = GlobalBalance(), random_probs(8, 0), random_probs(8, 1)
    balance([routing(first)])
    with torch.no_grad():
        seen = balance([routing(COLLAPSED)])
    assert seen.switch.item() == pytest.approx(EXPERTS)
    expected = GlobalBalance()
    expected([routing(first)])
    assert torch.equal(balance([routing(second)]).switch, expected([routing(second)]).switch)


def test_selection_bias_moves_by_its_rate_towards_the_mean_load() -> None:
    router = make_router(ExpertsConfig(num_experts=4, router={"kind": "token"}), 8)
    update_selection_bias(router, torch.tensor([10, 5, 0, 5]), 1e-3)
    assert torch.equal(router.selection_bias, torch.tensor([-1e-3, 0.0, 1e-3, 0.0]))
    update_selection_bias(router, torch.tensor([10, 2, 2, 2]), 1e-3)
    torch.testing.assert_close(router.selection_bias, torch.tensor([-2e-3, 1e-3, 2e-3, 1e-3]))


def test_selection_bias_evens_out_a_skewed_load() -> None:
    """The loss-free rule alone, on fixed scores: 2408.15664, figure 1."""
    router = make_router(ExpertsConfig(num_experts=EXPERTS, router={"kind": "token"}), 8)
    draw = torch.Generator().manual_seed(0)
    probs = (torch.randn(600, EXPERTS, generator=draw) + torch.tensor([1.5, 0, 0, 0, -0.5, -1])).softmax(-1)

    def load() -> Tensor:
        return router.choose(probs.log(), probs).counts.float()

    worst = load().max() / 100
    for _ in range(400):
        update_selection_bias(router, load(), 1e-3)
    assert worst > 2.0 and load().max() / 100 < 1.1
