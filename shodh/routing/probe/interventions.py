"""Interventions on routing: hooks that change which experts the tokens meet, one model and one block at a time.

An intervention changes *which* expert serves a slot, and keeps the weight of the slot, so that a change of identity is
not mixed up with a change of strength; `remove` alone sets weights, to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shodh.core.seeding import Key, generator
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.routing import Routing, count_assignments


class Decision(NamedTuple):
    """What a router chose for ``B`` samples: ``weights`` and ``selected [B, S, K]``, and ``probs [B, S, E]``."""

    weights: Tensor
    selected: Tensor
    probs: Tensor


Choice = tuple[Tensor, Tensor]  # weights, selected
Override = Callable[[int, Decision], Choice]  # of a layer's number and decision


def sparse_layers(model: nn.Module) -> list[ExpertLayerReference]:
    """The expert layers of a model, in order; empty for a dense one."""
    return [m for m in model.modules() if isinstance(m, ExpertLayerReference)]


@contextmanager
def override_routing(model: nn.Module, override: Override) -> Iterator[None]:
    """Within the block, every router of ``model`` acts, and reports, as ``override`` says.

    Parameters
    ----------
    model : Module
        With layers of the plain-torch twin.
    override : callable
        ``(layer, decision) -> (weights, selected)``, both ``[B, S, K]``.
    """
    with ExitStack() as stack:
        for number, layer in enumerate(sparse_layers(model)):
            stack.callback(layer.router.register_forward_hook(_hook(number, override)).remove)
        yield


def _hook(layer: int, override: Override) -> Callable[..., Routing]:
    def change(_: nn.Module, arguments: tuple[Tensor, ...], routing: Routing) -> Routing:
        shape = arguments[0].shape[:2]
        whole = Decision(*(x.unflatten(0, shape) for x in (routing.weights, routing.selected, routing.probs)))
        weights, selected = (x.flatten(0, 1) for x in override(layer, whole))
        counts = count_assignments(selected, routing.num_experts)
        return routing._replace(selected=selected, counts=counts, weights=weights)

    return change


def at_layer(layer: int, override: Override) -> Override:
    """``override`` at one layer, all others as they are."""

    def change(number: int, decision: Decision) -> Choice:
        return override(number, decision) if number == layer else (decision.weights, decision.selected)

    return change


def remove(*experts: int) -> Override:
    """Take away the routed output of some experts; what is shared stays."""

    def change(_: int, decision: Decision) -> Choice:
        gone = torch.isin(decision.selected, torch.tensor(experts, device=decision.selected.device))
        return decision.weights.masked_fill(gone, 0.0), decision.selected

    return change


def reroute(expert: int) -> Override:
    """Send an expert's tokens to the most probable expert that does not serve them yet, at the same weight.

    Where every other expert serves a token already, nothing is left to send it to, and its slot is taken away.
    """

    def change(_: int, decision: Decision) -> Choice:
        weights, selected, probs = decision
        taken = probs.scatter(-1, selected, -1.0)
        taken[..., expert] = -1.0
        best, substitute = taken.max(-1, keepdim=True)
        struck = selected == expert
        return weights.masked_fill(struck & (best < 0), 0.0), torch.where(struck, substitute, selected)

    return change


def force(expert: int) -> Override:
    """Send every token to one expert with all the weight it had."""

    def change(_: int, decision: Decision) -> Choice:
        return decision.weights, torch.full_like(decision.selected, expert)

    return change


def shuffle_tokens(*key: Key) -> Override:
    """Permute the choices among the tokens of each sample: usage by sample stays, place is lost."""

    def change(layer: int, decision: Decision) -> Choice:
        samples, tokens = decision.selected.shape[:2]
        draw = torch.rand(samples, tokens, generator=generator(*key, layer)).argsort(1).to(decision.selected.device)
        return decision.weights, decision.selected.gather(1, draw.unsqueeze(-1).expand_as(decision.selected))

    return change


def transplant(choices: Sequence[Tensor]) -> Override:
    """Give the samples the choices ``[B, S, K]``, one tensor a layer, of other samples."""

    def change(layer: int, decision: Decision) -> Choice:
        return decision.weights, choices[layer].to(decision.selected)

    return change
