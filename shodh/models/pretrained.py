"""A whole model in physical units from one folder or the hub: tokenizer and operator, or an operator on fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh.errors import CheckpointError
from shodh.models.description import ModelDescription, build_parts, read_description
from shodh.models.domain import add_walls, static_features
from shodh.models.field_space import channel_mask, pad_absent
from shodh.models.operator import LatentTransformer, OperatorOutput
from shodh.models.pretrained_base import PretrainedModel, local_folder
from shodh.models.registry import FieldOperator
from shodh.models.tokenizer import Tokenizer
from shodh.moe.step import regime_arguments
from shodh.precision import ieee_float32


class ShodhModel(PretrainedModel):
    """Tokenizer and operator of a run, from physical fields to physical fields.

    Fields are float32 in the units of the training data, channels in the order of the fields of ``description``, a
    vector taking one channel an axis; scalars live at cell centres, component i of a vector on the upper face of its
    cell along axis i. All methods run without gradients.

    Examples
    --------
    >>> import torch, shodh
    >>> model = shodh.from_pretrained(folder)
    >>> fields = torch.zeros(1, model.history, model.num_channels, *model.grid)
    >>> static = torch.zeros(1, model.num_static, *model.grid)
    >>> model.rollout(fields, static, regime=model.regimes[0], steps=3).shape[:2]
    torch.Size([1, 3])
    """

    def __init__(self, description: ModelDescription) -> None:
        super().__init__(description)
        parts = build_parts(self.config, description.parts)
        if "tokenizer" not in parts:
            raise CheckpointError("a model needs its tokenizer; this folder holds the operator alone")
        self.tokenizer: Tokenizer = parts["tokenizer"]  # type: ignore[assignment]
        self.operator: LatentTransformer | None = None
        if "operator" in parts:
            self.operator = parts["operator"]  # type: ignore[assignment]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells of the three axes."""
        x, y, z = (8 * n for n in self.config.latent_grid)
        return x, y, z

    def _geometry(self, static: Tensor, regime: str) -> Tensor:
        """What the networks see of a domain, ``[B, G, X, Y, Z]``."""
        return add_walls(self._normalize_static(static, regime), self.domain(regime))

    @torch.no_grad()
    @ieee_float32()
    def encode(self, fields: Tensor, static: Tensor, regime: str) -> Tensor:
        """Physical fields ``[B, T, C, X, Y, Z]``, static ones ``[B, S, X, Y, Z]`` -> latents ``[B, T, L, x, y, z]``.

        Raises
        ------
        DataError
            The regime is unknown, or a shape is not the model's.
        """
        self._check(fields, "fields", ("batch", "time"), self.num_channels)
        geometry = self._geometry(static, regime)
        frames = [
            self.tokenizer.encode(self.normalizer.normalize(fields[:, t].float(), regime), geometry)
            for t in range(fields.shape[1])
        ]
        return torch.stack(frames, 1)

    @torch.no_grad()
    @ieee_float32()
    def decode(self, latents: Tensor, static: Tensor, regime: str, *, exact: bool = False) -> Tensor:
        """Latents ``[B, T, L, x, y, z]`` -> physical fields ``[B, T, C, X, Y, Z]``.

        Parameters
        ----------
        exact : bool
            Round potentials to a lattice, so that the stored divergence of solenoidal fields is bitwise zero.
        """
        geometry, domain = self._geometry(static, regime), self.domain(regime)
        frames = [
            self.tokenizer.assemble(self.tokenizer.emit(latents[:, t], geometry), domain, exact=exact)
            for t in range(latents.shape[1])
        ]
        return self.normalizer.denormalize(torch.stack(frames, 1), regime)

    @torch.no_grad()
    @ieee_float32()
    def rollout(self, fields: Tensor, static: Tensor, regime: str, steps: int, *, exact: bool = False) -> Tensor:
        """The ``steps`` frames that follow, each predicted from the last ones in latent space: ``[B, steps, C, ...]``.

        Arguments as `PretrainedModel.rollout`, ``exact`` as `decode`.
        """
        if self.operator is None:
            raise CheckpointError("this folder holds a tokenizer alone; convert a run of launch/pretrain.py")
        self._check_history(fields)
        window = self.encode(fields[:, -self.history :], static, regime)
        features = static_features(self._geometry(static, regime))
        told = regime_arguments(self.config.operator.experts, self.regimes.index(regime), window)
        frames = []
        for _ in range(steps):
            following = self.operator(window, features, **told).latent
            frames.append(following)
            window = torch.cat((window[:, 1:], following.unsqueeze(1)), 1)
        return self.decode(torch.stack(frames, 1), static, regime, exact=exact)


class FieldModel(PretrainedModel):
    """An operator on fields, in two or three dimensions, from physical fields to physical fields.

    As `ShodhModel`, without latents: a vector has one channel an axis of the grid. Channels of fields that a regime
    lacks are not read, and mean nothing where they are given back.
    """

    def __init__(self, description: ModelDescription) -> None:
        super().__init__(description)
        self.operator: FieldOperator = build_parts(self.config, description.parts)["operator"]  # type: ignore[assignment]

    @property
    def grid(self) -> tuple[int, ...]:
        """Cells of each axis."""
        return self.config.data.grid

    def _exists(self, regime: str, like: Tensor, *, static: bool) -> Tensor:
        """Which channels exist, for as many samples as ``like`` has: ``[B, C]``."""
        fields = [f for f in (f.build() for f in self.config.data.fields) if f.static == static]
        return channel_mask(fields, self.domain(regime), len(self.grid)).to(like.device).expand(len(like), -1)

    @ieee_float32()
    def step(self, window: Tensor, static: Tensor, regime: str) -> OperatorOutput:
        """The next frame of *normalised* fields, and how it was routed; differentiable, in weights and inputs.

        Parameters
        ----------
        window : Tensor [B, history, C, *grid]
        static : Tensor [B, S, *grid]
        """
        exists = self._exists(regime, window, static=False)
        padded = torch.stack([pad_absent(frame, exists) for frame in window.unbind(1)], 1)
        given = pad_absent(static, self._exists(regime, static, static=True))
        told = regime_arguments(self.config.operator.experts, self.regimes.index(regime), window)
        output: OperatorOutput = self.operator(padded, given, **told)
        return output

    @torch.no_grad()
    @ieee_float32()
    def rollout(self, fields: Tensor, static: Tensor, regime: str, steps: int, *, exact: bool = False) -> Tensor:
        """The ``steps`` frames that follow, each predicted from the last ones: ``[B, steps, C, *grid]``.

        Arguments as `PretrainedModel.rollout`.

        Raises
        ------
        CheckpointError
            ``exact`` is asked for: nothing here is decoded from a potential.
        """
        if exact:
            raise CheckpointError("exact is of velocities that are decoded from a potential; this operator has none")
        self._check(fields, "fields", ("batch", "time"), self.num_channels)
        self._check_history(fields)
        window = self.normalizer.normalize(fields[:, -self.history :].float(), regime)
        given = self._normalize_static(static, regime)
        frames = []
        for _ in range(steps):
            frames.append(self.step(window, given, regime).latent)
            window = torch.cat((window[:, 1:], frames[-1].unsqueeze(1)), 1)
        return self.normalizer.denormalize(torch.stack(frames, 1), regime)


def from_pretrained(
    path_or_hub_id: str | Path, *, device: torch.device | str = "cpu", **download: Any
) -> ShodhModel | FieldModel:
    """Load a model from a folder or the hub; see `PretrainedModel.from_pretrained`."""
    folder = local_folder(path_or_hub_id, **download)
    kind = FieldModel if read_description(folder).config.operator.in_field_space else ShodhModel
    return kind.load(folder, device)
