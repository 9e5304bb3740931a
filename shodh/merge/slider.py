"""A model whose weights slide along a direction: for read-outs that evaluate, or differentiate, many coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from shodh.core.errors import ConfigError
from shodh.core.weights import LazyWeights, load_into
from shodh.merge.components import ROUTED_EXPERTS, component, layer
from shodh.merge.coordinates import Coordinates, Rule
from shodh.merge.lazy import from_memory, to_memory
from shodh.merge.span import Update, compose

Grouping = Literal["all", "layer", "expert"]


class Slider:
    """Puts a model at coordinates, and differentiates a loss in them.

    Keeps the direction, and each checkpoint that composition needs, in memory.

    Parameters
    ----------
    model : Module
        Its parameters and buffers have the names of the weights; left at the last coordinate.
    anchor, shared, direction
        As for `shodh.merge.span.compose`.
    by : {"all", "layer", "expert"}
        One coordinate; one a layer; or one a routed expert of each layer, and one for the rest.
    """

    def __init__(
        self, model: nn.Module, anchor: LazyWeights, shared: Update, direction: Update, by: Grouping = "all"
    ) -> None:
        self.model = model
        self.groups, self._rules = _group(anchor, by)
        constant = Update(((anchor, 1.0),)) + shared
        points = (constant + direction).points()
        # The anchor's factors cancel: it need not be in memory.
        needed = (constant.factors(points) != 0) | (direction.factors(points) != 0)
        held: dict[int, LazyWeights] = {
            id(p): from_memory(to_memory(p)) if used else p for p, used in zip(points, needed, strict=True)
        }
        self._anchor = held[id(anchor)]
        self._shared, self._direction = (
            Update(tuple((held[id(weights)], factor) for weights, factor in update.terms))
            for update in (shared, direction)
        )
        self._slope = {
            name: tensor.values(0, tensor.numel).float() for name, tensor in self._direction.weights().items()
        }

    def coordinates(self, alpha: float | Sequence[float] | np.ndarray) -> Coordinates:
        """Coordinates by tensor of one number a group; raises `ConfigError` for another count."""
        values = np.atleast_1d(np.asarray(alpha, dtype=np.float64))
        if values.shape != (len(self.groups),):
            raise ConfigError(f"{values.size} coordinates; expected {len(self.groups)}: {', '.join(self.groups[:4])}")
        rules = tuple(
            Rule(match=match, alpha=float(a), experts=experts)
            for a, (match, experts) in zip(values, self._rules, strict=True)
            if match is not None
        )
        return Coordinates((float(values[0]),), rules)

    def set(self, alpha: float | Sequence[float] | np.ndarray) -> nn.Module:
        """The model at a coordinate, or at one a group."""
        weights = compose(self._anchor, self._shared, self._direction, self.coordinates(alpha))
        load_into(self.model, to_memory(weights), Path("composed weights"))
        return self.model

    def evaluate(self, loss: Callable[[nn.Module], float | Tensor]) -> Callable[[float], float]:
        """``alpha -> loss(model at alpha)`` without gradients, for the read-outs."""

        @torch.no_grad()
        def at(alpha: float) -> float:
            return float(loss(self.set(alpha)))

        return at

    def loss_and_gradient(
        self, loss: Callable[[nn.Module], Tensor]
    ) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        """``alpha [d] -> (loss, d loss / d alpha [d])``, for `shodh.merge.readout.read_gradient`.

        By the chain rule, ``sum(gradient * direction)`` over the weights of a group: one backward pass gives the
        derivative in every coordinate. Buffers move with alpha too, and are not differentiated.
        """

        def at(alpha: np.ndarray) -> tuple[float, np.ndarray]:
            self.set(alpha)
            parameters = dict(self.model.named_parameters())
            frozen = [p for p in parameters.values() if not p.requires_grad]
            for p in frozen:
                p.requires_grad_(True)
            try:
                with torch.enable_grad():
                    value = loss(self.model)
                    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            finally:
                for p in frozen:
                    p.requires_grad_(False)
            return float(value.detach()), self._project(dict(zip(parameters, gradients, strict=True)))

        return at

    def _project(self, gradients: dict[str, Tensor | None]) -> np.ndarray:
        numbers = self.coordinates(np.arange(len(self.groups)))  # the group of each tensor, in place of its coordinate
        total = np.zeros(len(self.groups))
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            group = numbers.at(name, gradient.shape)[0].astype(int)
            rows = gradient.double().cpu().reshape(group.size, -1)
            np.add.at(total, group.reshape(-1), (rows * self._slope[name].reshape(group.size, -1)).sum(1).numpy())
        return total


def _group(weights: LazyWeights, by: Grouping) -> tuple[list[str], list[tuple[str | None, tuple[int, ...] | None]]]:
    """Names of the groups, and the pattern and experts that each covers; None: whatever the others leave."""
    if by == "all":
        return ["all"], [(None, None)]
    if by == "layer":
        # The longer come later, and go before the shorter that match them too.
        layers = sorted({layer(name) for name in weights}, key=lambda key: (key.count("."), key))
        return layers, [(f"{key}*" if key in weights else f"{key}.*", None) for key in layers]
    if by != "expert":
        raise ConfigError(f"coordinates by {by!r}: expected all, layer or expert")
    stacks = {layer(name): weights[name].shape[0] for name in weights if component(name) == ROUTED_EXPERTS}
    if not stacks:
        raise ConfigError("coordinates by expert: the model has no routed experts")
    places = [(key, expert) for key in sorted(stacks) for expert in range(stacks[key])]
    rules = [(f"{key}.*.experts.*", (expert,)) for key, expert in places]
    return ["rest", *(f"{key} expert {expert}" for key, expert in places)], [(None, None), *rules]
