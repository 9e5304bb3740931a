"""What loaded models have in common: their description, checks of what they are given, loading and saving.

Needs neither DeepSpeed nor the compiled extension. Only safetensors and JSON are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from shodh.errors import CheckpointError, DataError
from shodh.models.description import ModelDescription, read_pretrained, write_pretrained
from shodh.models.domain import Domain
from shodh.weights import DTYPES, StoredTensor, load_into, persistent_buffers, target_dtypes


class PretrainedModel(nn.Module, ModelHubMixin, library_name="shodh"):  # type: ignore[misc]
    """A model of a run, from physical fields to physical fields; subclasses hold the networks.

    Fields are float32 in the units of the training data, channels in the order of the fields of ``description``, a
    vector taking one channel an axis. All methods run without gradients.
    """

    def __init__(self, description: ModelDescription) -> None:
        super().__init__()
        self.description = description
        self.config = description.config
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
    def grid(self) -> tuple[int, ...]:
        """Cells of each axis."""
        raise NotImplementedError

    @property
    def num_channels(self) -> int:
        """Channels of the fields that change in time."""
        return self._count(static=False)

    @property
    def num_static(self) -> int:
        """Channels of the static fields."""
        return self._count(static=True)

    def _count(self, static: bool) -> int:
        fields = (f.build() for f in self.config.data.fields)
        return sum(f.num_components(len(self.grid)) for f in fields if f.static == static)

    def domain(self, regime: str) -> Domain:
        """Boundary and lengths of a regime's box."""
        if regime not in self.domains:
            raise DataError(f"no regime {regime!r}; this model knows {list(self.regimes)}")
        return self.domains[regime]

    def _check(self, values: Tensor, what: str, leading: tuple[str, ...], channels: int) -> None:
        """Shape ``[*leading, channels, *grid]``."""
        expected = (channels, *self.grid)
        if values.ndim != len(leading) + len(expected) or tuple(values.shape[len(leading) :]) != expected:
            text = ", ".join([*leading, *map(str, expected)])
            raise DataError(f"{what} must be [{text}], got {list(values.shape)}")

    def _check_history(self, fields: Tensor) -> None:
        if fields.ndim != 3 + len(self.grid) or fields.shape[1] < self.history:
            raise DataError(f"fields must hold {self.history} frames, oldest first, got {list(fields.shape)}")

    def _normalize_static(self, static: Tensor, regime: str) -> Tensor:
        """Static fields ``[B, S, *grid]`` as the networks are given them."""
        self._check(static, "static", ("batch",), self.num_static)
        return torch.stack([self.normalizer.normalize_static_(s.clone(), regime) for s in static.float()])

    def rollout(self, fields: Tensor, static: Tensor, regime: str, steps: int, *, exact: bool = False) -> Tensor:
        """The ``steps`` frames that follow, each predicted from the last ones: ``[B, steps, C, *grid]``.

        Parameters
        ----------
        fields : Tensor [B, T, C, *grid]
            At least `history` frames, oldest first; the last ones are used.
        static : Tensor [B, S, *grid]
        regime : str
            Whose normalisation and domain are meant; no network sees the name, but an oracle router its number.
        """
        raise NotImplementedError

    def predict(self, fields: Tensor, static: Tensor, regime: str, *, exact: bool = False) -> Tensor:
        """The frame that follows ``fields [B, T, C, *grid]`` (oldest first): ``[B, C, *grid]``."""
        return self.rollout(fields, static, regime, steps=1, exact=exact)[:, 0]

    forward = predict

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Self:
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
    ) -> Self:
        """Load a converted folder, or a model of the hub (``owner/name``).

        Parameters
        ----------
        download
            For the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like.
        """
        return cls.load(local_folder(path_or_hub_id, **download), device)

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


def local_folder(path_or_hub_id: str | Path, **download: Any) -> Path:
    """A folder as it is, or a model of the hub after its download; raises `CheckpointError` for neither."""
    path = Path(path_or_hub_id)
    if path.exists():
        return path
    try:
        folder = snapshot_download(str(path_or_hub_id), allow_patterns=["*.safetensors", "*.json"], **download)
    except Exception as error:  # the hub's errors have no common base
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path_or_hub_id} is no folder, and no model of the hub: {reason}") from error
    return Path(folder)
