"""Typed run configuration: YAML in, unknown keys refused with the nearest match, a resolved copy with every run.

One file describes a whole run: the data, the tokenizer and the operator, so that both training stages, the
evaluation and every tool read the same text. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from shodh.errors import ConfigError
from shodh.fields import Boundary, Placement, StaticScale
from shodh.fields import Field as PhysicalField

# Names of fields and regimes go into those of files, weights and metrics.
FieldName = typing.Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
RegimeName = typing.Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]
Fraction = typing.Annotated[float, Field(ge=0.0, le=1.0)]
Weight = typing.Annotated[float, Field(ge=0.0)]
Count = typing.Annotated[int, Field(ge=0)]
FileFormat = Literal["auto", "well", "pdebench", "dpot", "fno", "jhtdb", "rock"]
Grid = typing.Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=3)]
#: Layers along z of a field that has two space dimensions: one latent cell.
FLAT_LAYERS = 8


class Section(BaseModel):
    """A strict group of settings: unknown keys are an error, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FieldConfig(Section):
    """A physical field the model learns (or, if ``static``, is given)."""

    name: FieldName
    kind: Literal["scalar", "vector"] = "scalar"
    solenoidal: bool = False
    static: bool = False
    masked_by: str | None = Field(None, description="static field that is 1 where this scalar does not exist (is zero)")
    positive: bool = Field(False, description="a scalar that is never negative; decoding keeps it so")
    static_scale: StaticScale = Field("none", description="how a static scalar reaches the models; log: over decades")
    optional: bool = Field(False, description="some regimes do not have it; the models see which")

    def build(self) -> PhysicalField:
        """The field; raises `ConfigError` for settings that do not go together."""
        placement: Placement = "face" if self.kind == "vector" else "center"
        return PhysicalField(
            self.name,
            self.kind,
            "1",
            placement,
            self.solenoidal,
            self.static,
            self.masked_by,
            self.positive,
            self.static_scale,
            self.optional,
        )


class RegimeConfig(Section):
    """One physical regime: a folder of The Well files with train, valid and test splits, or files of other formats."""

    name: RegimeName
    path: Path
    share: PositiveFloat = Field(1.0, description="share of every global batch, relative to the other regimes")
    fields: dict[str, str | None] = Field(
        default_factory=dict, description="our field name -> name in the file; null: absent, a static field of zeros"
    )
    only: tuple[str, ...] | None = Field(
        None, description="fields that this regime has, by our names; the others are absent; null: all of data.fields"
    )
    placement: Placement | None = Field(
        None, description="where vectors live in the files; null: read the file's attribute, 'center' without one"
    )
    format: FileFormat = Field("auto", description="format of the files; auto: from their names and content")
    split: tuple[Weight, Weight, Weight] = Field(
        (0.8, 0.1, 0.1), description="shares of train, valid, test for files that are not split into folders"
    )
    boundary: tuple[Boundary, ...] | None = Field(None, description="by axis, where the format does not say")
    lengths: tuple[PositiveFloat, ...] | None = Field(None, description="box, where the format does not say")
    time_step: PositiveFloat | None = Field(None, description="from frame to frame, where the format does not say")
    channels: tuple[str, ...] | None = Field(
        None, description="names of an array's channels, where it has none; a repeated name is a vector"
    )
    axes: str | None = Field(None, description="letters of an array's axes: n(umber), t, x, y, z, c(hannel); nxytc")

    @model_validator(mode="after")
    def _check(self) -> RegimeConfig:
        if not self.split[0] > 0:
            raise ValueError(f"split {list(self.split)}: the share of the training trajectories must be positive")
        return self


class DataConfig(Section):
    """What is learned, and from where."""

    grid: Grid = (32, 32, 32)
    fields: tuple[FieldConfig, ...] = (
        FieldConfig(name="velocity", kind="vector", solenoidal=True),
        FieldConfig(name="tracer", masked_by="solid"),
        FieldConfig(name="solid", static=True),
    )
    regimes: tuple[RegimeConfig, ...] = Field(min_length=1)
    history: PositiveInt = Field(2, description="past frames the operator sees")
    stride: PositiveInt = Field(1, description="frames between two model steps")
    workers: Count = Field(0, description="loader processes per rank")
    mixture_temperature: PositiveFloat | None = Field(
        None, description="shares times windows^(1/temperature): 1 in proportion to size, large equal; null: shares"
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for what, names in (("regimes", [r.name for r in self.regimes]), ("fields", [f.name for f in self.fields])):
            repeated = sorted({n for n in names if names.count(n) > 1})
            if repeated:
                raise ValueError(f"data.{what} has repeated names {repeated}")
        known = [f.name for f in self.fields]
        for regime in self.regimes:
            named = [("maps", name) for name in regime.fields] + [("has only", name) for name in regime.only or ()]
            for verb, name in named:
                if name not in known:
                    raise ValueError(f"regime {regime.name!r} {verb} {name!r}, which is not in data.fields {known}")
            absent = [name for name in regime.fields if name not in self.present(regime)]
            if absent:
                raise ValueError(f"regime {regime.name!r} maps {absent}, and has only {list(self.present(regime))}")
            lacking = [f.name for f in self.fields if not f.optional and f.name not in self.present(regime)]
            if lacking:
                raise ValueError(f"regime {regime.name!r} lacks {lacking}; mark them 'optional: true' in data.fields")
            if all(f.static for f in self.fields if f.name in self.present(regime)):
                raise ValueError(f"regime {regime.name!r} needs at least one field that changes in time")
        static = [f.name for f in self.fields if f.static and f.kind == "scalar"]
        for f in self.fields:
            if f.masked_by is not None and f.masked_by not in static:
                raise ValueError(f"field {f.name!r} is masked_by {f.masked_by!r}, not a static scalar field {static}")
        if all(f.static for f in self.fields):
            raise ValueError("data.fields needs at least one field that changes in time")
        for f in self.fields:
            try:
                f.build()
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    def present(self, regime: RegimeConfig) -> tuple[str, ...]:
        """Names of the fields a regime has, in the order of ``fields``."""
        return tuple(f.name for f in self.fields if regime.only is None or f.name in regime.only)

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of the fields that a regime may lack: those that change in time, then the static ones."""
        return tuple(f.name for f in sorted(self.fields, key=lambda f: f.static) if f.optional)

    @property
    def cells(self) -> tuple[int, int, int]:
        """Cells of the three axes that the models see: a field in two dimensions is eight equal layers."""
        x, y, z = (*self.grid, FLAT_LAYERS)[:3]
        return x, y, z


class TrainConfig(Section):
    """One training stage."""

    steps: PositiveInt
    global_batch: PositiveInt = Field(16, description="samples of one optimiser step, over all ranks")
    micro_batch: PositiveInt | None = Field(None, description="samples a rank holds at once; null: no accumulation")
    lr: PositiveFloat = 1e-3
    min_lr: Fraction = Field(0.05, description="last learning rate over the highest")
    schedule: Literal["cosine", "one_cycle"] = Field(
        "cosine", description="linear warm-up then cosine; or the one-cycle policy, cosine up and cosine down"
    )
    warmup: Count = Field(50, description="steps until the highest learning rate")
    weight_decay: Weight = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip: PositiveFloat = Field(1.0, description="largest global gradient norm")
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: PositiveInt = 10
    valid_every: Count = Field(0, description="steps between validations; 0: only at the end")
    valid_batches: PositiveInt = 4
    checkpoint_every: Count = Field(0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints that are kept")


class TokenizerLoss(Section):
    """Weights of the reconstruction loss terms, each relative to the target's own size."""

    relative_l2: Weight = 1.0
    gradient: Weight = 0.2
    spectral: Weight = 0.0


class TokenizerConfig(Section):
    """Convolutional autoencoder, 8x per axis, with a divergence-free velocity decoder."""

    run: Path | None = Field(None, description="run folder of the tokenizer; null: runs/<name>-tokenizer")
    latent_channels: PositiveInt = 32
    strides: tuple[PositiveInt, ...] = Field((2, 2, 2), description="downsampling of each stage; their product is 8")
    widths: tuple[PositiveInt, ...] = Field((32, 64, 128), description="channels of each stage, after its downsampling")
    depth: PositiveInt = Field(1, description="residual blocks of each stage")
    head_channels: PositiveInt = Field(12, description="channels at full resolution, before the last convolution")
    loss: TokenizerLoss = TokenizerLoss()
    train: TrainConfig = TrainConfig(steps=300)

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        if math.prod(self.strides) != 8:
            raise ValueError(f"strides {list(self.strides)} multiply to {math.prod(self.strides)}, and must to 8")
        if len(self.widths) != len(self.strides):
            raise ValueError(f"{len(self.widths)} widths for {len(self.strides)} strides; one for each")
        return self


class TemperatureSchedule(Section):
    """Temperature that divides the router's logits: ``max(end, start * decay^steps)`` after so many optimiser steps."""

    start: PositiveFloat = 2.0
    end: PositiveFloat = 0.5
    decay: PositiveFloat = Field(0.99, le=1.0, description="factor of one optimiser step")

    @model_validator(mode="after")
    def _check(self) -> TemperatureSchedule:
        if self.end > self.start:
            raise ValueError(f"end={self.end} is above start={self.start}; the temperature falls")
        return self


class RouterConfig(Section):
    """How a token finds its experts."""

    kind: Literal["token", "context", "two_level", "noisy_topk", "hash", "frozen", "oracle"] = Field(
        "token", description="hash, frozen and oracle are controls: by position, random and untrained, by regime label"
    )
    score: Literal["cosine", "softmax"] = "cosine"
    gate: Literal["linear", "conv"] = Field("linear", description="conv: MoE-POT's gate network; needs score softmax")
    normalise: Literal["before", "after"] = Field(
        "before", description="softmax over all experts before the top-k, or over the chosen ones after it"
    )
    temperature_schedule: TemperatureSchedule | None = Field(None, description="null: logits are not divided")
    granularity: Literal["token", "sample"] = "token"
    semantic_dim: PositiveInt = Field(16, description="width of the space in which tokens meet expert prototypes")
    temperature: PositiveFloat = Field(8.0, description="initial inverse temperature of cosine scores, learned")
    context_weight: Weight = Field(4.0, description="kind context: weight of the sample mean beside the token")
    groups: PositiveInt = Field(
        2, description="expert groups: two_level chooses one by the sample mean; oracle has one for each regime"
    )

    @property
    def grouped(self) -> bool:
        """Whether a token meets the experts of one group alone."""
        return self.kind in ("two_level", "oracle")

    @model_validator(mode="after")
    def _check(self) -> RouterConfig:
        if self.gate == "conv" and self.score != "softmax":
            raise ValueError(f"gate conv gives logits; use score softmax with it, not {self.score}")
        if self.kind == "noisy_topk" and (self.score, self.normalise) != ("softmax", "after"):
            raise ValueError(
                "kind noisy_topk is a linear gate and a softmax over the top k: use score softmax, normalise after"
            )
        if self.kind == "hash" and self.granularity == "sample":
            raise ValueError("kind hash goes by the token's position, so it needs granularity token; use kind frozen")
        return self


class BalanceConfig(Section):
    """Terms that keep experts alive and decided; counts and means are over the global batch."""

    switch: Weight = Field(0.01, description="Switch load balance (grouped experts: within the chosen group)")
    information: Weight = Field(0.05, description="H(mean p) - mean H(p), maximised (two_level: of the groups)")
    z_loss: Weight = 1e-4
    bias_rate: Weight = Field(0.0, description="loss-free selection bias, change per step")
    cv2: Weight = Field(0.0, description="CV(importance)^2, summed over layers as MoE-POT publishes it (0.1)")
    importance: Weight = Field(0.0, description="Shazeer's importance loss: CV(importance)^2, mean over layers")
    load: Weight = Field(0.0, description="Shazeer's load loss, CV(smooth load)^2; needs router.kind noisy_topk")
    orthogonality: Weight = Field(0.0, description="mean squared cosine between the router's rows of two experts")


class ExpertsConfig(Section):
    """The feed-forward part of every block: shared experts, and routed ones."""

    num_experts: Count = Field(4, description="routed experts; 0: a dense feed-forward of equal active size")
    top_k: PositiveInt = 1
    form: Literal["gated", "linear"] = Field(
        "gated", description="two layers with an activation between; or one affine map and GELU, as MoE-POT's code"
    )
    hidden: PositiveInt = Field(256, description="hidden width of one expert; form linear: its output width")
    num_shared: Count = 1
    shared_combine: Literal["sum", "mean"] = Field("sum", description="of the shared experts' outputs")
    activation: Literal["swiglu", "bilinear", "gelu"] = Field(
        "swiglu", description="form gated: swiglu and bilinear have a gate, gelu has none"
    )
    router: RouterConfig = RouterConfig()
    balance: BalanceConfig = BalanceConfig()

    @model_validator(mode="after")
    def _check(self) -> ExpertsConfig:
        halved = self.form == "linear" or self.activation == "gelu"
        if halved and self.hidden % 16:
            raise ValueError(f"hidden={self.hidden} must be a multiple of 16: its rows are kept in two halves")
        if self.num_experts == 0:
            return self
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        if self.balance.load and self.router.kind != "noisy_topk":
            raise ValueError(f"balance.load is defined by the noise of router.kind noisy_topk, not {self.router.kind}")
        groups = self.router.groups
        if self.router.grouped and self.num_experts % groups:
            raise ValueError(f"num_experts={self.num_experts} is not divisible by router.groups={groups}")
        if self.router.grouped and self.top_k > self.num_experts // groups:
            raise ValueError(
                f"top_k={self.top_k} is more than the {self.num_experts // groups} experts of a group; "
                "use fewer router.groups"
            )
        return self


#: What a configuration of MoE-POT need not say: the expert layer of its public code (arXiv 2510.25803).
MOE_POT_EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "top_k": 4,
    "form": "linear",
    "num_shared": 2,
    "shared_combine": "mean",
    "router": {
        "score": "softmax",
        "gate": "conv",
        "normalise": "after",
        "granularity": "sample",
        "temperature_schedule": {"start": 2.0, "end": 0.5, "decay": 0.99},
    },
    "balance": {"switch": 0.0, "information": 0.0, "z_loss": 0.0, "cv2": 0.1},
}


def _with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` completed from ``defaults``, nested mappings key by key."""
    merged = dict(given)
    for key, value in defaults.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, Mapping) and isinstance(merged[key], Mapping):
            merged[key] = _with_defaults(merged[key], value)
    return merged


class FieldSpaceConfig(Section):
    """Operators that work on the fields themselves, without a tokenizer."""

    mlp: PositiveInt = Field(
        512, description="dpot: hidden width of the feed-forward; moe_pot: width of the features that experts share"
    )
    decoder: PositiveInt = Field(32, description="dpot, moe_pot: channels at full resolution")
    classes: Count = Field(
        0, description="dpot, moe_pot: outputs of the published classification head, which no loss uses; 0: none"
    )
    residual: bool = Field(False, description="predict the change since the last frame; published models do not")


class OperatorConfig(Section):
    """What predicts the next frame: of latents (latent_transformer), or of the fields themselves (all other kinds)."""

    kind: Literal["latent_transformer", "dpot", "moe_pot", "fno", "unet"] = "latent_transformer"
    dim: PositiveInt = Field(128, description="width; unet: of the finest level")
    depth: PositiveInt = Field(3, description="blocks; unet: levels")
    heads: PositiveInt = Field(4, description="heads of attention, or of the Fourier mixing")
    patch: PositiveInt = Field(1, description="latent cells (dpot, moe_pot: cells) per token and axis")
    position: Literal["rotary", "learned"] = "rotary"
    mixer: Literal["attention", "fourier"] = Field("attention", description="latent_transformer: what mixes tokens")
    modes: PositiveInt | None = Field(None, description="Fourier modes kept along an axis; null: all")
    field: FieldSpaceConfig = FieldSpaceConfig()
    experts: ExpertsConfig = ExpertsConfig()
    loss: Literal["mse", "over_persistence", "relative_l2"] = Field(
        "mse",
        description="error of a sample as it is, over the mean change of its regime in one step, or its norm over that "
        "of the target, by channel (of fields alone, and their default)",
    )
    input_noise: Weight = Field(
        0.0, description="standard deviation added to the normalised history; of fields: times each channel's rms"
    )
    random_shifts: bool = Field(True, description="shift training samples by whole latent cells along periodic axes")
    activation_checkpointing: bool = False
    train: TrainConfig = TrainConfig(steps=400)

    @property
    def in_field_space(self) -> bool:
        """Whether it works on the fields themselves, without a tokenizer."""
        return self.kind != "latent_transformer"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("kind", "latent_transformer") == "latent_transformer":
            return given
        defaults: dict[str, Any] = {"loss": "relative_l2", "random_shifts": False}
        if given["kind"] == "moe_pot":
            defaults["experts"] = {**MOE_POT_EXPERTS, "hidden": given.get("dim", 128)}
        else:
            defaults["experts"] = {"num_experts": 0}
        return _with_defaults(given, defaults)

    @model_validator(mode="after")
    def _check(self) -> OperatorConfig:
        if self.in_field_space:
            self._check_field_space()
        elif self.loss == "relative_l2":
            raise ValueError("loss relative_l2 is of fields; a latent transformer has mse or over_persistence")
        if self.kind not in ("fno", "unet") and self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}")
        rotary = self.position == "rotary" and self.kind == "latent_transformer" and self.mixer == "attention"
        if rotary and (self.dim // self.heads) % 2:
            raise ValueError(f"rotary positions need an even head size, not dim/heads={self.dim // self.heads}")
        for name, value in (("dim", self.dim), ("experts.hidden", self.experts.hidden)):
            if value % 8:
                raise ValueError(f"{name}={value} must be a multiple of 8: the grouped GEMM wants 16-byte rows")
        return self

    def _check_field_space(self) -> None:
        experts = self.experts
        if self.kind != "moe_pot" and experts.num_experts:
            raise ValueError(f"kind {self.kind} is dense: use experts.num_experts 0, or kind moe_pot")
        if self.kind == "moe_pot" and experts.form == "linear" and experts.hidden != self.dim:
            raise ValueError(
                f"experts.hidden={experts.hidden}: linear experts give features of the operator's dim={self.dim}"
            )
        if self.kind == "moe_pot" and self.field.mlp % 16:
            raise ValueError(f"field.mlp={self.field.mlp} must be a multiple of 16")
        if self.random_shifts:
            raise ValueError("random_shifts are of latents: a force fixed in space would not move with the fields")
        if self.loss == "over_persistence":
            raise ValueError("loss over_persistence is of latents; fields have mse or relative_l2")
        if self.kind == "fno" and self.modes is None:
            raise ValueError("kind fno needs modes, for example 12")


class ParallelConfig(Section):
    """How ranks are used."""

    ep_size: PositiveInt = Field(1, description="ranks that share one set of experts")
    nodes: PositiveInt = Field(1, description="planned nodes: --dry-run plans for these; the launcher decides")
    gpus_per_node: PositiveInt = Field(1, description="planned GPUs of a node")


class EvaluationConfig(Section):
    """What ``launch/evaluate.py`` measures."""

    split: Literal["valid", "test"] = "test"
    rollout: Count = Field(4, description="autoregressive steps; 0: none")
    batch: PositiveInt = 8


class FamilyConfig(Section):
    """A family of flows with continuous parameters, and the place of a run in it; what merging experts reads."""

    name: str = Field(min_length=1)
    parameters: dict[str, float | tuple[float, float]] = Field(
        min_length=1, description="physical parameter -> value; of an anchor, which learns all of the family, its range"
    )

    @model_validator(mode="after")
    def _check(self) -> FamilyConfig:
        for name, value in self.parameters.items():
            low, high = value if isinstance(value, tuple) else (value, math.inf)
            if not math.isfinite(low) or low >= high or (isinstance(value, tuple) and not math.isfinite(high)):
                raise ValueError(f"parameter {name}={value}: expected a finite number, or [low, high] with low < high")
        return self


class RunConfig(Section):
    """Everything about one run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Count = 0
    out: Path = Field(Path("runs"), description="folder of the run folders")
    deepspeed: Path = Field(Path("ds_configs/cpu.json"), description="DeepSpeed JSON; 'auto' values come from here")
    kernels: Literal["auto", "torch", "apex"] = Field("auto", description="fused norm and optimiser")
    routing_trace: Count = Field(20000, description="lines of routing trace a rank may write; long runs are thinned")
    routing_samples: Count = Field(64, description="validation samples, of all ranks, traced token by token; 0: none")
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    operator: OperatorConfig = OperatorConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    family: FamilyConfig | None = Field(None, description="for tools/merge_experts.py; null: no family")

    @model_validator(mode="after")
    def _check_oracle(self) -> RunConfig:
        router, regimes = self.operator.experts.router, len(self.data.regimes)
        if self.operator.experts.num_experts and router.kind == "oracle" and router.groups != regimes:
            raise ValueError(
                f"operator.experts.router: an oracle has one group a regime, and there are {regimes}, not {router.groups}; "
                f"use groups={regimes}"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.operator.in_field_space:
            self._check_field_grid()
            return self
        side = 8 * self.operator.patch
        bad = [n for n in self.data.grid if n % 8]
        if len(self.data.grid) == 2 and self.operator.patch > 1:
            raise ValueError(f"operator.patch={self.operator.patch}: two dimensions have one latent layer; use patch 1")
        if bad:
            raise ValueError(f"data.grid {list(self.data.grid)}: the tokenizer divides axes by 8, and {bad} do not fit")
        bad = [n for n in self.data.grid if n % side]
        if bad:
            raise ValueError(
                f"data.grid {list(self.data.grid)}: latents of 1/8 the size in patches of {self.operator.patch} need "
                f"multiples of {side}, and {bad} are not"
            )
        return self

    def _check_field_grid(self) -> None:
        """Patches, levels and modes of an operator on fields go with the grid."""
        operator, grid = self.operator, self.data.grid
        side = {"dpot": operator.patch, "moe_pot": operator.patch, "unet": 2 ** (operator.depth - 1)}.get(
            operator.kind, 1
        )
        bad = [n for n in grid if n % side]
        if bad:
            what = f"levels of operator.depth={operator.depth}" if operator.kind == "unet" else "patches"
            raise ValueError(f"data.grid {list(grid)}: {what} need multiples of {side}, and {bad} are not")
        if operator.kind == "fno" and operator.modes is not None and 2 * operator.modes > min(grid):
            raise ValueError(
                f"operator.modes={operator.modes}: a grid of {list(grid)} has {min(grid) // 2} along its shortest "
                "axis; use fewer"
            )

    @property
    def run_dir(self) -> Path:
        """Folder of the operator's run."""
        return self.out / self.name

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer's run."""
        return self.tokenizer.run or self.out / f"{self.name}-tokenizer"

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """Cells of a latent along each axis."""
        x, y, z = self.data.cells
        return x // 8, y // 8, z // 8

    @property
    def operator_grid(self) -> Grid:
        """Cells of what the operator is given: of a latent, or of the fields, which have two or three axes."""
        return self.data.grid if self.operator.in_field_space else self.latent_grid


def _suggest(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"


def _section_of(annotation: Any) -> type[Section] | None:
    """The settings class behind an annotation (through Optional and tuples), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        for argument in typing.get_args(annotation):
            if (found := _section_of(argument)) is not None:
                return found
    return None


def _section_at(location: tuple[int | str, ...]) -> type[Section]:
    section: type[Section] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        found = _section_of(section.model_fields[part].annotation)
        if found is None:
            break
        section = found
    return section


def _explain(error: ValidationError, source: str) -> ConfigError:
    messages = []
    for problem in error.errors():
        location = problem["loc"]
        where = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            known = _section_at(location[:-1]).model_fields
            messages.append(f"unknown key {where!r}: {_suggest(str(location[-1]), known)}")
        elif problem["type"] == "missing":
            messages.append(f"missing key {where!r}")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], Mapping) else f" (given {problem['input']!r})"
            messages.append(f"{where}: {text}{given}" if where else text)
    return ConfigError(f"{source}: {'; '.join(messages)}")


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set ``a.b=value`` pairs in a nested dict; values are read as YAML, list items are addressed by index.

    Raises
    ------
    ConfigError
        For an item without ``=``, a value that is not YAML, or a path through something that has no keys.
    """
    tree = json.loads(json.dumps(tree, default=str))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {item!r}: expected key=value, for example --set operator.train.steps=100")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: the value is not valid YAML") from error
        node: Any = tree
        *parents, last = path.split(".")
        try:
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
            if isinstance(node, list):
                node[int(last)] = value
            else:
                node[last] = value
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"--set {item!r}: there is no such place in the configuration") from error
    return tree


def config_from_dict(tree: Any, source: str = "configuration") -> RunConfig:
    """Validate a plain dict; raises `ConfigError` that names every bad key, with the nearest known one."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of settings at the top, got {type(tree).__name__}")
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, source) from error


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``--set`` overrides and validate.

    Raises
    ------
    ConfigError
        The file cannot be read, is not YAML, or has unknown, missing or impossible settings.
    """
    path = Path(path)
    tree = _read_yaml(path)
    if isinstance(tree, dict):
        tree = apply_overrides(tree, overrides)
    return config_from_dict(tree, str(path))


def to_dict(config: Section) -> dict[str, Any]:
    """Plain JSON-able values of a configuration, every default written out."""
    return config.model_dump(mode="json")


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal object."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
