"""A whole model in physical units from a run, a checkpoint, a converted folder or the hub.

Needs neither DeepSpeed nor the compiled extension. Only safetensors and JSON are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from shodh.checkpoint.arrays import Array, like, to_float32
from shodh.checkpoint.description import (
    CONFIG,
    Kind,
    ModelDescription,
    build_described,
    find_pretrained,
    read_pretrained,
    write_pretrained,
)
from shodh.core.errors import CheckpointError, DataError
from shodh.core.precision import ieee_float32
from shodh.core.weights import DTYPES, StoredTensor, load_into, persistent_buffers, target_dtypes
from shodh.data.checks import require_mask
from shodh.data.source import average_to_faces
from shodh.models.forecaster import Forecaster
from shodh.models.operator import LatentTransformer
from shodh.models.registry import FieldOperator
from shodh.models.tokenizer import Tokenizer
from shodh.schema.conditions import Values
from shodh.schema.domain import Domain
from shodh.schema.fields import AXES, Field, Placement, field_slices, mask_names


class ShodhModel(nn.Module, ModelHubMixin, library_name="shodh"):  # type: ignore[misc]
    """The networks of a run, from physical fields to physical fields.

    Fields are in the units of the training data, channels in the order of the fields of ``space``, a vector taking one
    channel an axis. Scalars live at cell centres, component i of a vector on the upper face of its cell along axis i;
    vectors at cell centres are averaged onto the faces where ``placement="center"`` says so, or by `to_faces`, as the
    training averaged those of its files. What comes back lives on the faces. All methods run without gradients;
    ``forecaster`` has the same steps in model units, with them.

    Arrays are NumPy or torch, of any floating type, strides and device; masks may be integers or booleans too. What
    comes back is of the kind, and on the device, of the fields: float64 if they are, else float32 (of float16 and
    bfloat16 too), which is what is computed in, also under autocast. Channels of fields that the regime lacks are not
    read, nor are masked scalars where they do not exist; they come back as `shodh.schema.fields.OUTSIDE` there.
    ``static`` may be left out where the regime has no static fields, ``regime`` where the model knows one alone.

    Examples
    --------
    >>> import torch, shodh
    >>> model = shodh.from_pretrained(folder)
    >>> fields = torch.zeros(1, model.history, model.num_channels, *model.grid)
    >>> static = torch.zeros(1, model.num_static, *model.grid)
    >>> model.predict(fields, static, regime=model.regimes[0]).shape[:1]
    torch.Size([1])
    >>> model.rollout(fields, static, regime=model.regimes[0], steps=3).shape[:2]
    torch.Size([1, 3])
    """

    def __init__(self, description: ModelDescription) -> None:
        super().__init__()
        self.description = description
        self.config, self.space = description.config, description.space
        parts = build_described(description)
        if self.config.has_tokenizer and "tokenizer" not in parts:
            raise CheckpointError("a model needs its tokenizer; this folder holds the operator alone")
        self.tokenizer: Tokenizer | None = parts["tokenizer"] if "tokenizer" in parts else None  # type: ignore[assignment]
        self.operator: LatentTransformer | FieldOperator | None = None
        if "operator" in parts:
            self.operator = parts["operator"]  # type: ignore[assignment]

    @property
    def forecaster(self) -> Forecaster:
        """The same model in model units."""
        return Forecaster.of(self.config, self.space, self.operator, self.tokenizer)

    @property
    def regimes(self) -> tuple[str, ...]:
        """Names of the regimes the model was trained on."""
        return self.space.names

    @property
    def history(self) -> int:
        """Past frames that one step needs."""
        return self.config.data.history

    @property
    def grid(self) -> tuple[int, ...]:
        """Cells of each axis."""
        return self.config.cells

    @property
    def num_channels(self) -> int:
        """Channels of the fields that change in time."""
        return self.space.num_channels

    @property
    def num_static(self) -> int:
        """Channels of the static fields."""
        return self.space.num_static

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the model is told beside the fields, by name; `shodh.schema.space.Space` has the ranges."""
        return self.space.condition_names

    def domain(self, regime: str) -> Domain:
        """Boundary and lengths of a regime's box; raises `DataError` for one that is not known."""
        return self.space.domains[self.space.number(regime)]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def _known(self, regime: str | None) -> str:
        """A regime by its name, or the only one; raises `DataError` for others."""
        if regime is None and len(self.regimes) > 1:
            raise DataError(f"regime must be given: one of {', '.join(self.regimes)}")
        return self.regimes[0 if regime is None else self.space.number(regime)]

    def _take(
        self, values: Tensor | np.ndarray, what: str, leading: tuple[str, ...], sizes: tuple[int, ...], integers: bool
    ) -> Tensor:
        """What a user gives, of the shape ``[*leading, *sizes]``, as float32 on the model's device."""
        shape, names = tuple(getattr(values, "shape", ())), (*leading, "channels", *AXES[: len(sizes) - 1])
        expected = f"{what} must be [{', '.join([*leading, *map(str, sizes)])}], got"
        if not hasattr(values, "shape"):
            raise DataError(f"{expected} {type(values).__name__}")
        if len(shape) != len(names):
            raise DataError(f"{expected} {list(shape)}: {len(shape)} axes, not the {len(names)} {', '.join(names)}")
        wanted = (*[None] * len(leading), *sizes)
        wrong = [
            f"{name} {got}" + ("" if want is None else f", not {want}")
            for name, got, want in zip(names, shape, wanted, strict=True)
            if (got == 0 if want is None else got != want)
        ]
        if wrong:
            raise DataError(f"{expected} {list(shape)}: {'; '.join(wrong)}")
        return to_float32(values, what, self.device, integers=integers)

    def _take_all(
        self,
        fields: Tensor | np.ndarray,
        static: Tensor | np.ndarray | None,
        regime: str,
        frames: int,
        placement: Placement,
    ) -> tuple[Tensor, Tensor]:
        """Physical fields ``[B, T, C, *grid]`` of at least ``frames`` frames, and static ones as `_take_static`.

        Channels of absent fields are zero; vectors at centres are moved to faces.
        """
        if placement not in get_args(Placement):
            raise DataError(f"placement={placement!r}; expected one of {', '.join(get_args(Placement))}")
        given = self._take(fields, "fields", ("batch", "time"), (self.num_channels, *self.grid), False)
        if given.shape[1] < frames:
            raise DataError(f"fields must hold {frames} frames, oldest first, got {list(given.shape)}")
        masks = self._take_static(static, regime, len(given))
        self._same_number(given, "fields", masks)
        given = torch.where(self._existing(regime, given, static=False), given, 0.0)
        if placement == "center":
            self._to_faces(given, self.space.dynamic, regime)
            self._to_faces(masks, self.space.static, regime)
        if not bool(self.space.to_model(given, regime, masks).isfinite().all()):
            raise DataError("fields hold NaN or infinity, or numbers that float32 cannot hold")
        return given, masks

    def _take_static(self, static: Tensor | np.ndarray | None, regime: str, samples: int) -> Tensor:
        """Static fields ``[B, S, *grid]`` as stored; channels of absent fields are zero.

        Raises
        ------
        DataError
            The shape is not the model's, values are not finite, or a mask is not 0 or 1; or None is given of a regime
            that has static fields.
        """
        absent, sizes = self.domain(regime).absent, (self.num_static, *self.grid)
        names = [f.name for f in self.space.static if f.name not in absent]
        if static is None:
            if names:
                shape = ", ".join(["batch", *map(str, sizes)])
                raise DataError(f"static must be [{shape}], got None; regime {regime!r} has {', '.join(names)}")
            return torch.zeros(samples, *sizes, device=self.device)
        given = self._take(static, "static", ("batch",), sizes, True)
        given = torch.where(self._existing(regime, given, static=True), given, 0.0)
        if not bool(given.isfinite().all()):
            raise DataError("static holds NaN or infinity")
        for name, channels in field_slices(self.space.static, self.space.ndim).items():
            if name in mask_names(self.space.fields):
                for sample in given[:, channels]:
                    require_mask(sample.cpu().numpy(), name, "static")
        return given

    def _to_faces(self, values: Tensor, fields: Sequence[Field], regime: str) -> None:
        """Average the vectors of ``values [..., C, *grid]`` at centres onto the faces, in place."""
        ndim = self.space.ndim
        for field, channels in zip(fields, field_slices(fields, ndim).values(), strict=True):
            if field.placement == "face":
                part = values.narrow(-1 - ndim, channels.start, ndim)
                moved = part.cpu().numpy()
                average_to_faces(moved, self.domain(regime).boundary[:ndim])
                part.copy_(torch.from_numpy(moved))

    def to_faces(self, fields: Array, regime: str | None = None) -> Array:
        """Fields ``[B, T, C, *grid]`` whose vectors live at cell centres -> with the vectors on the upper faces.

        The mean of two neighbours, as the training reads such files; a wall's face gets zero. What was free of
        divergence at the centres is so on the faces to second order alone. Errors as `rollout`.
        """
        known = self._known(regime)
        with self._computing():
            moved = self._take(fields, "fields", ("batch", "time"), (self.num_channels, *self.grid), False).clone()
            self._to_faces(moved, self.space.dynamic, known)
            return like(moved, fields)

    def _existing(self, regime: str, values: Tensor, *, static: bool) -> Tensor:
        """Which channels of ``values [..., C, *grid]`` the regime has, in a shape that broadcasts with them."""
        label = torch.tensor([self.space.number(regime)], device=values.device)
        return self.space.exists(label, static=static)[0].view(-1, *(1,) * self.space.ndim)

    @staticmethod
    def _same_number(values: Tensor, what: str, static: Tensor) -> None:
        if len(values) != len(static):
            raise DataError(f"{what} are {len(values)} samples, and static {len(static)}; give both the same number")

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Computation in the precision of the weights, whatever surrounds it."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), ieee_float32():
            yield

    def encode(
        self,
        fields: Array,
        static: Tensor | np.ndarray | None = None,
        regime: str | None = None,
        *,
        placement: Placement = "face",
    ) -> Array:
        """Physical fields ``[B, T, C, *grid]``, static ones ``[B, S, *grid]`` -> states ``[B, T, ...]``: latents.

        Arguments and errors as `rollout`.
        """
        known = self._known(regime)
        with self._computing():
            given, masks = self._take_all(fields, static, known, 1, placement)
            scaled = self.space.static_to_model(masks, known)
            normal = self.space.to_model(given, known, masks)
            return like(self.forecaster.encode(normal, scaled, self.space.number(known)).states, fields)

    def decode(
        self,
        latents: Array,
        static: Tensor | np.ndarray | None = None,
        regime: str | None = None,
        *,
        exact: bool = False,
    ) -> Array:
        """States ``[B, T, ...]`` -> physical fields ``[B, T, C, *grid]``.

        Parameters
        ----------
        exact : bool
            Round potentials to a lattice, so that the stored divergence of solenoidal fields is bitwise zero.
        """
        sizes = (self.num_channels, *self.grid)
        if self.tokenizer is not None:
            sizes = (self.config.tokenizer.latent_channels, *self.config.latent_grid)
        known = self._known(regime)
        with self._computing():
            given = self._take(latents, "latents", ("batch", "time"), sizes, False)
            masks = self._take_static(static, known, len(given))
            self._same_number(given, "latents", masks)
            scaled = self.space.static_to_model(masks, known)
            normal = self.forecaster.decode(given, scaled, self.space.number(known), exact=exact)
            return like(self.space.to_physical(normal, known, masks), latents)

    def rollout(
        self,
        fields: Array,
        static: Tensor | np.ndarray | None = None,
        regime: str | None = None,
        steps: int = 1,
        *,
        conditions: Mapping[str, Values] | None = None,
        exact: bool = False,
        placement: Placement = "face",
    ) -> Array:
        """The ``steps`` frames that follow, each predicted from the last ones: ``[B, steps, C, *grid]``.

        Parameters
        ----------
        fields : Tensor or ndarray [B, T, C, *grid]
            At least `history` frames, oldest first; the last ones are used.
        static : Tensor or ndarray [B, S, *grid], optional
            Needed where the regime has static fields.
        regime : str, optional
            Whose normalisation and domain are meant; no network sees the name, but an oracle router its number. Needed
            where the model knows several.
        conditions : mapping, optional
            Of a model with `conditions`, in physical units by name, a number or one a sample; None: not known. Needed
            are those that vary in the training data of the regime. ``time_step`` is that of the given frames, and of
            the predicted ones.
        exact : bool
            As `decode`.
        placement : {"face", "center"}
            Where the given vectors live; those at centres are averaged onto the faces (`to_faces`).

        Raises
        ------
        DataError
            The regime or a condition is unknown or missing, or an array is not of the model's shape, not finite, or of
            a type that is not taken.
        CheckpointError
            There is a tokenizer alone, or ``exact`` is asked of an operator on fields.
        """
        if self.operator is None:
            raise CheckpointError("this folder holds a tokenizer alone; use a run of launch/pretrain.py")
        if steps < 1:
            raise DataError(f"steps={steps}; must be at least 1")
        known = self._known(regime)
        with self._computing():
            given, masks = self._take_all(fields, static, known, self.history, placement)
            ahead = self.forecaster.predict(given, masks, known, steps, conditions=conditions, exact=exact)
            return like(ahead, fields)

    def predict(
        self,
        fields: Array,
        static: Tensor | np.ndarray | None = None,
        regime: str | None = None,
        *,
        conditions: Mapping[str, Values] | None = None,
        exact: bool = False,
        placement: Placement = "face",
    ) -> Array:
        """The frame that follows ``fields [B, T, C, *grid]`` (oldest first): ``[B, C, *grid]``. As `rollout`."""
        ahead = self.rollout(fields, static, regime, conditions=conditions, exact=exact, placement=placement)
        return ahead[:, 0]

    forward = predict

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path_or_hub_id: str | Path,
        *,
        device: torch.device | str = "cpu",
        checkpoint: str | None = None,
        weights: Kind | None = None,
        **download: Any,
    ) -> Self:
        """Load a run (its newest checkpoint), a checkpoint, a converted folder, or a model of the hub (``owner/name``).

        Files are compared with their manifest; weights become float32.

        Parameters
        ----------
        checkpoint : str, optional
            Of a run: ``"best"``, or the name of a checkpoint.
        weights : {"ema", "raw"}, optional
            Of a checkpoint whose run averaged them: the average, which is the default, or those of its last step.
        download
            For the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like.

        Raises
        ------
        CheckpointError
            Names the file that is missing or damaged, or the tensor that does not fit or is not finite.
        """
        if weights not in (None, *get_args(Kind)):
            raise CheckpointError(f"weights={weights!r}; expected one of {', '.join(get_args(Kind))}, or None")
        path = _local_folder(path_or_hub_id, checkpoint, **download)
        description, tensors = read_pretrained(path, weights)
        model = cls(description)
        load_into(model, {name: stored.read() for name, stored in tensors.items()}, path)
        return model.eval().requires_grad_(False).to(device)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Config, weights and card; what `save_pretrained` and `push_to_hub` of the hub's mixin call."""
        buffers = dict(persistent_buffers(self))
        weights = dict(self.named_parameters())
        found, names = {p.dtype for p in weights.values()}, {dtype: name for name, dtype in DTYPES.items()}
        if len(found) != 1 or found - names.keys():
            raise CheckpointError(f"weights of {sorted(map(str, found))} cannot be saved; use one of {list(DTYPES)}")
        state = {**weights, **buffers}
        tensors = {name: StoredTensor.of(tensor.cpu(), save_directory) for name, tensor in state.items()}
        description = self.description.model_copy(update={"dtype": names[found.pop()], "weights": None})
        write_pretrained(save_directory, description, tensors, target_dtypes(tensors, None))


def _local_folder(path_or_hub_id: str | Path, checkpoint: str | None = None, **download: Any) -> Path:
    """A folder of weights, or a model of the hub after its download; raises `CheckpointError` for neither.

    A name that cannot be one of the hub, or that lies in a folder that there is, is not asked for on the hub.
    """
    path = Path(path_or_hub_id)
    if path.exists():
        found = find_pretrained(path, checkpoint)
        if found.is_dir() and not (found / CONFIG).is_file():
            raise CheckpointError(
                f"{found} does not describe its model (no {CONFIG}): a checkpoint of an older version, of a tokenizer "
                "in training, or of other software; convert it first: tools/convert_checkpoint.py"
            )
        return found
    name = str(path_or_hub_id)
    if checkpoint is not None:
        raise CheckpointError(f"{name} is no run folder, and has no checkpoint {checkpoint!r}")
    if (
        name.startswith((".", "/", "~", "runs/"))
        or name.count("/") > 1
        or (path.parent != Path() and path.parent.is_dir())
    ):
        raise CheckpointError(
            f"no such folder: {name}; expected a run, a checkpoint, a converted folder, or owner/name"
        )
    try:
        folder = snapshot_download(str(path_or_hub_id), allow_patterns=["*.safetensors", "*.json"], **download)
    except Exception as error:  # the hub's errors have no common base
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path_or_hub_id} is no folder, and no model of the hub: {reason}") from error
    return Path(folder)


def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    checkpoint: str | None = None,
    weights: Kind | None = None,
    **download: Any,
) -> ShodhModel:
    """Load a model; see `ShodhModel.from_pretrained`."""
    return ShodhModel.from_pretrained(path_or_hub_id, device=device, checkpoint=checkpoint, weights=weights, **download)
