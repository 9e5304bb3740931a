"""A whole model in physical units: tokenizer, operator, normalisation and domains, loaded from one folder or the hub.

Needs neither DeepSpeed nor the compiled extension. Only safetensors and JSON are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from shodh.errors import CheckpointError, DataError
from shodh.models.description import (
    ModelDescription,
    build_parts,
    read_pretrained,
    write_pretrained,
)
from shodh.models.domain import Domain, add_walls, static_features
from shodh.models.operator import LatentTransformer
from shodh.models.tokenizer import Tokenizer
from shodh.moe.step import regime_arguments
from shodh.weights import DTYPES, StoredTensor, load_into, persistent_buffers, target_dtypes


class ShodhModel(nn.Module, ModelHubMixin, library_name="shodh", license="apache-2.0"):  # type: ignore[misc]
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
        super().__init__()
        self.description = description
        self.config = description.config
        parts = build_parts(self.config, description.parts)
        if "tokenizer" not in parts:
            raise CheckpointError("a model needs its tokenizer; this folder holds the operator alone")
        self.tokenizer: Tokenizer = parts["tokenizer"]  # type: ignore[assignment]
        self.operator: LatentTransformer | None = None
        if "operator" in parts:
            self.operator = parts["operator"]  # type: ignore[assignment]
        self.normalizer = description.build_normalizer()
        self.domains = description.build_domains()

    @property
    def regimes(self) -> tuple[str, ...]:
        """Names of the regimes the model was trained on."""
        return self.description.regimes

    @property
    def history(self) -> int:
        """Past frames that one step needs."""
        return self.config.data.history

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells of the three axes."""
        x, y, z = (8 * n for n in self.config.latent_grid)
        return x, y, z

    @property
    def num_channels(self) -> int:
        """Channels of the fields that change in time."""
        return self.tokenizer.num_channels

    @property
    def num_static(self) -> int:
        """Channels of the static fields."""
        return sum(f.build().num_components(3) for f in self.config.data.fields if f.static)

    def domain(self, regime: str) -> Domain:
        """Boundary and lengths of a regime's box."""
        if regime not in self.domains:
            raise DataError(f"no regime {regime!r}; this model knows {list(self.regimes)}")
        return self.domains[regime]

    def _check(self, values: Tensor, what: str, leading: tuple[str, ...], channels: int) -> None:
        """Shape ``[*leading, channels, *grid]``."""
        expected = (channels, *self.grid)
        if values.ndim != len(leading) + 4 or tuple(values.shape[len(leading) :]) != expected:
            text = ", ".join([*leading, *map(str, expected)])
            raise DataError(f"{what} must be [{text}], got {list(values.shape)}")

    def _geometry(self, static: Tensor, regime: str) -> Tensor:
        """What the networks see of a domain, ``[B, G, X, Y, Z]``."""
        self._check(static, "static", ("batch",), self.num_static)
        scaled = torch.stack([self.normalizer.normalize_static_(s.clone(), regime) for s in static.float()])
        return add_walls(scaled, self.domain(regime))

    @torch.no_grad()
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

    def predict(self, fields: Tensor, static: Tensor, regime: str, *, exact: bool = False) -> Tensor:
        """The frame that follows ``fields [B, T, C, X, Y, Z]`` (oldest first): ``[B, C, X, Y, Z]``."""
        return self.rollout(fields, static, regime, steps=1, exact=exact)[:, 0]

    @torch.no_grad()
    def rollout(self, fields: Tensor, static: Tensor, regime: str, steps: int, *, exact: bool = False) -> Tensor:
        """The ``steps`` frames that follow, each predicted from the last ones in latent space: ``[B, steps, C, ...]``.

        Parameters
        ----------
        fields : Tensor [B, T, C, X, Y, Z]
            At least `history` frames, oldest first; the last ones are used.
        static : Tensor [B, S, X, Y, Z]
        regime : str
            Whose normalisation and domain are meant; no network sees the name, but an oracle router its number.
        """
        if self.operator is None:
            raise CheckpointError("this folder holds a tokenizer alone; convert a run of launch/pretrain.py")
        if fields.ndim != 6 or fields.shape[1] < self.history:
            raise DataError(f"fields must hold {self.history} frames, oldest first, got {list(fields.shape)}")
        window = self.encode(fields[:, -self.history :], static, regime)
        features = static_features(self._geometry(static, regime))
        told = regime_arguments(self.config.operator.experts, self.regimes.index(regime), window)
        frames = []
        for _ in range(steps):
            following = self.operator(window, features, **told).latent
            frames.append(following)
            window = torch.cat((window[:, 1:], following.unsqueeze(1)), 1)
        return self.decode(torch.stack(frames, 1), static, regime, exact=exact)

    forward = predict

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> ShodhModel:
        """Read a folder that was converted or saved; weights become float32.

        Raises
        ------
        CheckpointError
            Names the file that is missing or damaged, or the tensor that does not fit.
        """
        description, tensors = read_pretrained(path)
        model = cls(description)
        load_into(model, {name: stored.read() for name, stored in tensors.items()}, path)
        return model.eval().requires_grad_(False).to(device)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path_or_hub_id: str | Path, *, device: torch.device | str = "cpu", **download: Any
    ) -> ShodhModel:
        """Load a converted folder, or a model of the hub (``owner/name``).

        Parameters
        ----------
        download
            For the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like.
        """
        path = Path(path_or_hub_id)
        if path.exists():
            return cls.load(path, device)
        try:
            folder = snapshot_download(str(path_or_hub_id), allow_patterns=["*.safetensors", "*.json"], **download)
        except Exception as error:  # the hub's errors have no common base
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path_or_hub_id} is no folder, and no model of the hub: {reason}") from error
        return cls.load(Path(folder), device)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Config, weights and card; what `save_pretrained` and `push_to_hub` of the hub's mixin call."""
        buffers = dict(persistent_buffers(self))
        weights = dict(self.named_parameters())
        found, names = {p.dtype for p in weights.values()}, {dtype: name for name, dtype in DTYPES.items()}
        if len(found) != 1 or found - names.keys():
            raise CheckpointError(f"weights of {sorted(map(str, found))} cannot be saved; use one of {list(DTYPES)}")
        state = {**weights, **buffers}
        tensors = {name: StoredTensor.of(tensor.cpu(), save_directory) for name, tensor in state.items()}
        description = self.description.model_copy(update={"dtype": names[found.pop()]})
        write_pretrained(save_directory, description, tensors, target_dtypes(tensors, None))


def from_pretrained(path_or_hub_id: str | Path, *, device: torch.device | str = "cpu", **download: Any) -> ShodhModel:
    """Load a model from a folder or the hub; see `ShodhModel.from_pretrained`."""
    return ShodhModel.from_pretrained(path_or_hub_id, device=device, **download)
