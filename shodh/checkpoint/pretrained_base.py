"""What loaded models have in common: their description, checks of what they are given, loading and saving.

Needs neither DeepSpeed nor the compiled extension. Only safetensors and JSON are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from shodh.checkpoint.arrays import Array, like, to_float32
from shodh.checkpoint.description import ModelDescription, read_pretrained, write_pretrained
from shodh.core.errors import CheckpointError, DataError
from shodh.core.precision import ieee_float32
from shodh.core.weights import DTYPES, StoredTensor, load_into, persistent_buffers, target_dtypes
from shodh.data.checks import channel_ranges, require_mask
from shodh.models.field_space import channel_mask
from shodh.schema.domain import Domain
from shodh.schema.fields import Field, mask_names


class PretrainedModel(nn.Module, ModelHubMixin, library_name="shodh"):  # type: ignore[misc]
    """A model of a run, from physical fields to physical fields; subclasses hold the networks.

    Fields are in the units of the training data, channels in the order of the fields of ``description``, a vector
    taking one channel an axis. All methods run without gradients.

    Arrays are NumPy or torch, of any floating type, strides and device; masks may be integers or booleans too. What
    comes back is of the kind, and on the device, of the fields: float64 if they are, else float32, which is what is
    computed in, also under autocast. Channels of fields that the regime lacks are not read, nor are masked scalars
    where they do not exist; they come back as `shodh.schema.fields.OUTSIDE` there.
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

    def _fields(self, *, static: bool) -> list[Field]:
        return [f for f in (f.build() for f in self.config.data.fields) if f.static == static]

    def _count(self, static: bool) -> int:
        return sum(f.num_components(len(self.grid)) for f in self._fields(static=static))

    def domain(self, regime: str) -> Domain:
        """Boundary and lengths of a regime's box."""
        if regime not in self.domains:
            raise DataError(f"no regime {regime!r}; this model knows {list(self.regimes)}")
        return self.domains[regime]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def _take(
        self, values: Tensor | np.ndarray, what: str, leading: tuple[str, ...], sizes: tuple[int, ...], integers: bool
    ) -> Tensor:
        """What a user gives, of the shape ``[*leading, *sizes]``, as float32 on the model's device."""
        shape = tuple(getattr(values, "shape", ()))
        if len(shape) != len(leading) + len(sizes) or shape[len(leading) :] != sizes or 0 in shape[: len(leading)]:
            got = list(shape) if shape or hasattr(values, "shape") else type(values).__name__
            raise DataError(f"{what} must be [{', '.join([*leading, *map(str, sizes)])}], got {got}")
        return to_float32(values, what, self.device, integers=integers)

    def _take_fields(self, fields: Tensor | np.ndarray, static: Tensor, regime: str, frames: int) -> Tensor:
        """Normalised fields ``[B, T, C, *grid]`` of at least ``frames`` frames; channels of absent fields are zero."""
        given = self._take(fields, "fields", ("batch", "time"), (self.num_channels, *self.grid), False)
        if given.shape[1] < frames:
            raise DataError(f"fields must hold {frames} frames, oldest first, got {list(given.shape)}")
        if len(given) != len(static):
            raise DataError(f"fields are {len(given)} samples, and static {len(static)}; give both the same number")
        given = torch.where(self._existing(regime, given, static=False), given, 0.0)
        normal = self.normalizer.normalize(given, regime, static)
        if not bool(normal.isfinite().all()):
            raise DataError("fields hold NaN or infinity, or numbers that float32 cannot hold")
        return normal

    def _take_static(self, static: Tensor | np.ndarray, regime: str) -> Tensor:
        """Static fields ``[B, S, *grid]`` as stored; channels of absent fields are zero.

        Raises
        ------
        DataError
            The regime is unknown, the shape is not the model's, values are not finite, or a mask is not 0 or 1.
        """
        self.domain(regime)
        given = self._take(static, "static", ("batch",), (self.num_static, *self.grid), True)
        given = torch.where(self._existing(regime, given, static=True), given, 0.0)
        if not bool(given.isfinite().all()):
            raise DataError("static holds NaN or infinity")
        for name, channels in channel_ranges(self._fields(static=True), len(self.grid)).items():
            if name in mask_names(f.build() for f in self.config.data.fields):
                for sample in given[:, channels]:
                    require_mask(sample.cpu().numpy(), name, "static")
        return given

    def _normalize_static(self, static: Tensor, regime: str) -> Tensor:
        """Static fields of `_take_static` as the networks are given them."""
        return torch.stack([self.normalizer.normalize_static_(s.clone(), regime) for s in static])

    def _existing(self, regime: str, values: Tensor, *, static: bool) -> Tensor:
        """Which channels of ``values [..., C, *grid]`` the regime has, in a shape that broadcasts with them."""
        there = channel_mask(self._fields(static=static), self.domain(regime), len(self.grid))
        return there.to(values.device).view(-1, *(1,) * len(self.grid))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Computation in the precision of the weights, whatever surrounds it."""
        with torch.autocast(self.device.type, enabled=False), ieee_float32():
            yield

    @torch.no_grad()
    def rollout(
        self, fields: Array, static: Tensor | np.ndarray, regime: str, steps: int, *, exact: bool = False
    ) -> Array:
        """The ``steps`` frames that follow, each predicted from the last ones: ``[B, steps, C, *grid]``.

        Parameters
        ----------
        fields : Tensor or ndarray [B, T, C, *grid]
            At least `history` frames, oldest first; the last ones are used.
        static : Tensor or ndarray [B, S, *grid]
        regime : str
            Whose normalisation and domain are meant; no network sees the name, but an oracle router its number.

        Raises
        ------
        DataError
            The regime is unknown, or an array is not of the model's shape, not finite, or of a type that is not taken.
        """
        self._require(exact)
        if steps < 1:
            raise DataError(f"steps={steps}; must be at least 1")
        with self._computing():
            masks = self._take_static(static, regime)
            window = self._take_fields(fields, masks, regime, self.history)[:, -self.history :]
            normal = self._rollout(window, masks, regime, steps, exact)
            return like(self.normalizer.denormalize(normal, regime, masks), fields)

    def _require(self, exact: bool) -> None:
        """Raise CheckpointError where the model cannot step, or not exactly."""
        raise NotImplementedError

    def _rollout(self, window: Tensor, static: Tensor, regime: str, steps: int, exact: bool) -> Tensor:
        """`rollout` of normalised fields ``[B, history, C, *grid]`` with static ones as stored."""
        raise NotImplementedError

    def predict(self, fields: Array, static: Tensor | np.ndarray, regime: str, *, exact: bool = False) -> Array:
        """The frame that follows ``fields [B, T, C, *grid]`` (oldest first): ``[B, C, *grid]``. As `rollout`."""
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
