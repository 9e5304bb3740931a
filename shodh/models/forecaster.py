"""How a model forecasts: fields -> states -> next states -> fields; the one place that rolls out.

A *state* is what the operator steps: the latents of a frame, or where there is no tokenizer the frame itself, padded
where its regime lacks a channel or a mask takes cells away. *Features* are the operator's static input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from shodh.config import ExpertsConfig, RunConfig
from shodh.core.errors import CheckpointError
from shodh.models.operator import OperatorOutput
from shodh.models.tokenizer import Potential, Tokenizer
from shodh.moe.fingerprint import fingerprint
from shodh.moe.step import router_arguments
from shodh.schema.conditions import Values
from shodh.schema.domain import add_walls, static_features
from shodh.schema.space import Space


class Encoded(NamedTuple):
    """States ``[B, T, ...]`` and features ``[B, ...]``."""

    states: Tensor
    features: Tensor


@dataclass(frozen=True)
class Forecaster:
    """A space, an operator, and of models on latents a tokenizer; all in model units but `predict`.

    Parameters
    ----------
    history : int
        States that a step needs.
    experts : ExpertsConfig
        Says what the routers are told.
    operator : callable
        ``(states, features, **router arguments) -> OperatorOutput``; None of a tokenizer alone.
    of_fields : bool
        Whether states are fields, whose channels a regime may lack, and not latents.
    """

    space: Space
    history: int
    experts: ExpertsConfig
    operator: Callable[..., OperatorOutput] | None
    tokenizer: Tokenizer | None = None
    of_fields: bool = False

    @classmethod
    def of(
        cls,
        config: RunConfig,
        space: Space,
        operator: Callable[..., OperatorOutput] | None,
        tokenizer: Tokenizer | None = None,
    ) -> Self:
        """Of the networks of a run."""
        experts, of_fields = config.operator.experts, not config.has_tokenizer
        return cls(space, config.data.history, experts, operator, tokenizer, of_fields)

    def on(self, space: Space) -> Self:
        """The same networks on other regimes."""
        return replace(self, space=space)

    def labels(self, regime: int, like: Tensor) -> Tensor:
        """The label of a regime for as many samples as ``like`` has."""
        return torch.full((len(like),), regime, device=like.device)

    def encode(self, fields: Tensor, static: Tensor, regime: int) -> Encoded:
        """Fields ``[B, T, C, *grid]`` and static fields ``[B, S, *grid]`` of one regime."""
        if self.tokenizer is None:
            return Encoded(*self.space.pad(fields, static, self.labels(regime, fields)))
        geometry = add_walls(static, self.space.domains[regime])
        unit = self.tokenizer.units(self.space.domains, [regime], fields.device)
        head = self.tokenizer.heads(self.space.domains, [regime]) * len(fields)  # Not read from the device.
        latents = [self.tokenizer.encode(frame, geometry, unit, head) for frame in fields.unbind(1)]
        return Encoded(torch.stack(latents, 1), static_features(geometry))

    def step(
        self,
        states: Tensor,
        features: Tensor,
        labels: Tensor,
        told: Mapping[str, Any] | None = None,
        conditions: Tensor | None = None,
    ) -> OperatorOutput:
        """The state that follows ``states [B, history, ...]``, and how it was routed; differentiable.

        Samples may be of different regimes, ``labels [B]``. In channels and cells that do not exist the answer means
        nothing. ``told`` are `router_arguments`, by default those of an evaluation; ``conditions [B, N]`` is in model
        units, by default `Space.usual`.
        """
        if self.operator is None:
            raise CheckpointError("there is a tokenizer alone; use a run of launch/pretrain.py")
        if told is None:
            told = router_arguments(self.experts, labels, look=lambda: self.look(states, labels))
        if self.space.conditions:
            given = self.space.usual(labels) if conditions is None else conditions
            return self.operator(states, features, conditions=given, **told)
        return self.operator(states, features, **told)

    def look(self, states: Tensor, labels: Tensor) -> Tensor:
        """Fingerprints ``[B, F]`` of states ``[B, history, ...]``: what routers that observe are shown.

        Of the label, the domain is used: which axes wrap around, and which fields exist.
        """
        exists = self.space.exists(labels) if self.of_fields else None
        return fingerprint(states, self.space.periodic(labels), exists)

    def unroll(
        self,
        states: Tensor,
        features: Tensor,
        labels: Tensor,
        *,
        told: Callable[[int], Mapping[str, Any]] | None = None,
        conditions: Tensor | None = None,
        detach: bool = False,
    ) -> Iterator[OperatorOutput]:
        """`step` again and again, each on the last ``history`` states; without end, and differentiable.

        Parameters
        ----------
        told : callable
            What the routers are told at each step, by its number from 0; by default that of an evaluation. Fingerprints
            are those of the given states throughout: what moves a trajectory stays the same, and forecasts drift.
        conditions : Tensor [B, N], optional
            As `step`, the same at all steps.
        detach : bool
            Take each state as given by the step that follows it: no gradient goes back through it.
        """
        window = states[:, -self.history :]
        if told is None:
            given = router_arguments(self.experts, labels, look=partial(self.look, window, labels))
        for number in count():
            output = self.step(window, features, labels, given if told is None else told(number), conditions)
            yield output
            following = output.latent.unsqueeze(1)
            if detach:
                following = following.detach()
            if self.tokenizer is None:
                following = self.space.pad(following, features, labels)[0]
            window = torch.cat((window[:, 1:], following), 1)

    def rollout(
        self, states: Tensor, features: Tensor, labels: Tensor, steps: int, conditions: Tensor | None = None
    ) -> Tensor:
        """The ``steps`` states that follow, each predicted from the last ones: ``[B, steps, ...]``."""
        outputs = self.unroll(states, features, labels, conditions=conditions)
        return torch.stack([output.latent for output in islice(outputs, steps)], 1)

    def emit(self, state: Tensor, static: Tensor, regime: int) -> Tensor:
        """What the decoder network makes of states ``[B, ...]`` of one regime; without a tokenizer, the state."""
        if self.tokenizer is None:
            return state
        unit = self.tokenizer.units(self.space.domains, [regime], state.device)
        return self.tokenizer.emit(state, add_walls(static, self.space.domains[regime]), unit)

    def assemble(self, emitted: Tensor, regime: int, *, exact: bool = False) -> Tensor:
        """Fields ``[B, C, *grid]`` of what was emitted. Arguments and errors as `decode`."""
        if self.tokenizer is not None:
            return self.tokenizer.assemble(emitted, self.space.domains[regime], exact=exact)
        if exact:
            raise CheckpointError("exact is of velocities that are decoded from a potential; this operator has none")
        return emitted

    def potentials(self, emitted: Tensor, regime: int) -> dict[str, Potential]:
        """What the solenoidal fields of `assemble` are made of; nothing without a tokenizer."""
        if self.tokenizer is None:
            return {}
        return self.tokenizer.potentials(emitted, self.space.domains[regime])

    def decode(self, states: Tensor, static: Tensor, regime: int, *, exact: bool = False) -> Tensor:
        """States ``[B, T, ...]`` of one regime -> fields ``[B, T, C, *grid]``.

        Parameters
        ----------
        exact : bool
            Round potentials to a lattice, so that the stored divergence of solenoidal fields is bitwise zero.

        Raises
        ------
        CheckpointError
            ``exact`` is asked of a model without a tokenizer.
        """
        frames = (self.emit(state, static, regime) for state in states.unbind(1))
        return torch.stack([self.assemble(emitted, regime, exact=exact) for emitted in frames], 1)

    def predict(
        self,
        fields: Tensor,
        static: Tensor,
        regime: str,
        steps: int = 1,
        *,
        conditions: Mapping[str, Values] | None = None,
        exact: bool = False,
    ) -> Tensor:
        """The ``steps`` frames that follow ``fields [B, T, C, *grid]``, all in physical units.

        ``static [B, S, *grid]`` is as it is stored. What is given of fields where they do not exist is not read.
        ``conditions`` are physical, by name: `shodh.schema.conditions.condition_values`.
        """
        number = self.space.number(regime)
        scaled = self.space.static_to_model(static, regime)
        given = self.space.to_model(fields[:, -self.history :], regime, static)
        told = self.space.told(number, conditions, len(given)).to(given.device)
        encoded = self.encode(given, scaled, number)
        states = self.rollout(*encoded, self.labels(number, given), steps, told)
        return self.space.to_physical(self.decode(states, scaled, number, exact=exact), regime, static)
