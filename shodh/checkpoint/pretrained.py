"""A whole model in physical units from one folder or the hub: tokenizer and operator, or an operator on fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shodh.checkpoint.arrays import Array, like
from shodh.checkpoint.description import ModelDescription, build_parts, read_description
from shodh.checkpoint.pretrained_base import PretrainedModel, local_folder
from shodh.core.errors import CheckpointError, DataError
from shodh.core.precision import ieee_float32
from shodh.models.field_space import channel_mask, existing_cells, pad_absent
from shodh.models.operator import LatentTransformer, OperatorOutput
from shodh.models.registry import FieldOperator
from shodh.models.tokenizer import Tokenizer
from shodh.moe.step import regime_arguments
from shodh.schema.domain import add_walls, static_features


class ShodhModel(PretrainedModel):
    """Tokenizer and operator of a run, from physical fields to physical fields.

    As `PretrainedModel`; scalars live at cell centres, component i of a vector on the upper face of its cell along axis
    i.

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
    def encode(self, fields: Array, static: Tensor | np.ndarray, regime: str) -> Array:
        """Physical fields ``[B, T, C, X, Y, Z]``, static ones ``[B, S, X, Y, Z]`` -> latents ``[B, T, L, x, y, z]``.

        Errors as `rollout`.
        """
        with self._computing():
            masks = self._take_static(static, regime)
            return like(
                self._encode(self._take_fields(fields, masks, regime, 1), self._geometry(masks, regime)), fields
            )

    def _encode(self, normal: Tensor, geometry: Tensor) -> Tensor:
        return torch.stack([self.tokenizer.encode(frame, geometry) for frame in normal.unbind(1)], 1)

    @torch.no_grad()
    def decode(self, latents: Array, static: Tensor | np.ndarray, regime: str, *, exact: bool = False) -> Array:
        """Latents ``[B, T, L, x, y, z]`` -> physical fields ``[B, T, C, X, Y, Z]``.

        Parameters
        ----------
        exact : bool
            Round potentials to a lattice, so that the stored divergence of solenoidal fields is bitwise zero.
        """
        sizes = (self.config.tokenizer.latent_channels, *self.config.latent_grid)
        with self._computing():
            masks = self._take_static(static, regime)
            given = self._take(latents, "latents", ("batch", "time"), sizes, False)
            if len(given) != len(masks):
                raise DataError(f"latents are {len(given)} samples, and static {len(masks)}; give both the same number")
            normal = self._decode(given, self._geometry(masks, regime), regime, exact)
            return like(self.normalizer.denormalize(normal, regime, masks), latents)

    def _decode(self, latents: Tensor, geometry: Tensor, regime: str, exact: bool) -> Tensor:
        """Normalised fields."""
        emitted = (self.tokenizer.emit(latent, geometry) for latent in latents.unbind(1))
        return torch.stack([self.tokenizer.assemble(e, self.domain(regime), exact=exact) for e in emitted], 1)

    def _require(self, exact: bool) -> None:
        if self.operator is None:
            raise CheckpointError("this folder holds a tokenizer alone; convert a run of launch/pretrain.py")

    def _rollout(self, window: Tensor, static: Tensor, regime: str, steps: int, exact: bool) -> Tensor:
        assert self.operator is not None
        geometry = self._geometry(static, regime)
        window, features = self._encode(window, geometry), static_features(geometry)
        told = regime_arguments(self.config.operator.experts, self.regimes.index(regime), window)
        frames = []
        for _ in range(steps):
            following = self.operator(window, features, **told).latent
            frames.append(following)
            window = torch.cat((window[:, 1:], following.unsqueeze(1)), 1)
        return self._decode(torch.stack(frames, 1), geometry, regime, exact)


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

    def _exists(self, regime: str, values: Tensor, *, static: bool) -> Tensor:
        """Which channels exist, for as many samples as ``values`` has: ``[B, C]``."""
        mask = channel_mask(self._fields(static=static), self.domain(regime), len(self.grid))
        return mask.to(values.device).expand(len(values), -1)

    def cells(self, static: Tensor, regime: str) -> Tensor | None:
        """In which cells each channel exists, ``[B, S, *grid] -> [B, C, *grid]``; None: in all."""
        exists = self._exists(regime, static, static=True)
        return existing_cells(static, exists, self.normalizer.masked, self.num_channels)

    @ieee_float32()
    def step(self, window: Tensor, static: Tensor, regime: str) -> OperatorOutput:
        """The next frame of *normalised* fields, and how it was routed; differentiable, in weights and inputs.

        What it says of cells where a field does not exist means nothing, and is not read from the window.

        Parameters
        ----------
        window : Tensor [B, history, C, *grid]
        static : Tensor [B, S, *grid]
        """
        exists, cells = self._exists(regime, window, static=False), self.cells(static, regime)
        if cells is not None:
            window = torch.where(cells.unsqueeze(1), window, 0.0)
        padded = torch.stack([pad_absent(frame, exists) for frame in window.unbind(1)], 1)
        given = pad_absent(static, self._exists(regime, static, static=True))
        told = regime_arguments(self.config.operator.experts, self.regimes.index(regime), window)
        output: OperatorOutput = self.operator(padded, given, **told)
        return output

    def _require(self, exact: bool) -> None:
        if exact:
            raise CheckpointError("exact is of velocities that are decoded from a potential; this operator has none")

    def _rollout(self, window: Tensor, static: Tensor, regime: str, steps: int, exact: bool) -> Tensor:
        given = self._normalize_static(static, regime)
        frames = []
        for _ in range(steps):
            frames.append(self.step(window, given, regime).latent)
            window = torch.cat((window[:, 1:], frames[-1].unsqueeze(1)), 1)
        return torch.stack(frames, 1)


def from_pretrained(
    path_or_hub_id: str | Path, *, device: torch.device | str = "cpu", **download: Any
) -> ShodhModel | FieldModel:
    """Load a model from a folder or the hub; see `PretrainedModel.from_pretrained`."""
    folder = local_folder(path_or_hub_id, **download)
    kind = FieldModel if read_description(folder).config.operator.in_field_space else ShodhModel
    return kind.load(folder, device)
