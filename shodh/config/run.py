"""All settings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from shodh.config.base import Batch, Count, Grid, RunName, Section, Seed, Width
from shodh.config.data import DataConfig
from shodh.config.operator import OperatorConfig
from shodh.config.tokenizer import TokenizerConfig
from shodh.config.trackers import TrackersConfig


class ParallelConfig(Section):
    """How ranks are used."""

    ep_size: Width = Field(1, description="ranks that share one set of experts")
    nodes: Width = Field(1, description="planned nodes: --dry-run plans for these; the launcher decides")
    gpus_per_node: Width = Field(1, description="planned GPUs of a node")


class WatchdogConfig(Section):
    """When a job that stands still is ended."""

    steps: PositiveFloat = Field(10.0, description="median steps without a sign of work from any rank")
    least: PositiveFloat = Field(120.0, description="seconds, if that is more; a step has several signs")
    startup: PositiveFloat = Field(
        1800.0, description="seconds in the first steps and the first validation, and for collectives before these"
    )


class EvaluationConfig(Section):
    """What ``launch/evaluate.py`` measures."""

    split: Literal["valid", "test"] = "test"
    rollout: Count = Field(4, description="autoregressive steps; 0: none")
    starts: Count = Field(4, description="windows of each trajectory, spread evenly; 0: all")
    batch: Batch = 8


class FamilyConfig(Section):
    """A family of flows with continuous parameters, and the place of a run in it; what merging experts reads."""

    name: str = Field(min_length=1)
    parameters: dict[str, float | tuple[float, float]] = Field(
        min_length=1, description="physical parameter -> value; of an anchor, which learns all of the family, its range"
    )

    @model_validator(mode="after")
    def _check(self) -> FamilyConfig:
        for name, value in self.parameters.items():
            if isinstance(value, tuple) and value[0] >= value[1]:
                raise ValueError(f"parameter {name}={value}: expected a number, or [low, high] with low < high")
        return self


class FinetuneConfig(Section):
    """Which weights of a run are trained; the others stay bitwise as they are given."""

    train: Literal["all", "experts", "new_expert"] = Field(
        "all", description="all weights; the routed experts alone; or the experts of operator.experts.num_added alone"
    )
    router: bool = Field(False, description="train experts: the router too")


class RunConfig(Section):
    """Everything about one run."""

    name: RunName
    seed: Seed = 0
    out: Path = Field(Path("runs"), description="folder of the run folders")
    deepspeed: Path = Field(Path("ds_configs/cpu.json"), description="DeepSpeed JSON; 'auto' values come from here")
    kernels: Literal["auto", "torch", "apex"] = Field("auto", description="fused norm and optimiser")
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compile norms, rotary positions, residuals, routers and balance terms of a latent transformer, "
        "and the tokenizer's residual blocks; "
        "auto: on a card, where ZeRO is below 3",
    )
    routing_trace: Count = Field(20000, description="lines of routing trace a rank may write; long runs are thinned")
    routing_samples: Count = Field(64, description="validation samples, of all ranks, traced token by token; 0: none")
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    operator: OperatorConfig = OperatorConfig()
    parallel: ParallelConfig = ParallelConfig()
    watchdog: WatchdogConfig | None = Field(
        WatchdogConfig(), description="end a job that stands still, so that it can be started again; null: never"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    trackers: TrackersConfig = TrackersConfig()
    family: FamilyConfig | None = Field(None, description="for tools/merge_experts.py; null: no family")
    finetune: FinetuneConfig | None = Field(None, description="train some weights alone; null: all of them")

    @field_validator("compile", mode="before")
    @classmethod
    def _read_switch(cls, value: object) -> object:
        """YAML reads ``on`` and ``off`` as true and false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_finetune(self) -> RunConfig:
        experts, tuned = self.operator.experts, self.finetune
        if tuned is None or tuned.train == "all":
            return self
        if experts.num_experts == 0:
            raise ValueError(
                f"finetune.train={tuned.train}: the model is dense, without routed experts (num_experts=0); train all"
            )
        if tuned.train == "new_expert" and experts.num_added == 0:
            raise ValueError("finetune.train=new_expert needs operator.experts.num_added of at least 1")
        if tuned.router and tuned.train != "experts":
            raise ValueError(f"finetune.router is of train=experts; train={tuned.train} trains its own")
        return self

    @model_validator(mode="after")
    def _check_router(self) -> RunConfig:
        experts, regimes = self.operator.experts, len(self.data.regimes)
        router = experts.router
        if experts.num_experts and router.traits.observes and self.data.history < 2:
            raise ValueError(
                f"data.history={self.data.history}: operator.experts.router.kind {router.kind} goes by what changes "
                "from frame to frame; use data.history of at least 2"
            )
        if experts.num_experts and router.traits.labelled and experts.groups != regimes:
            raise ValueError(
                f"operator.experts.router: kind {router.kind} has one group a regime, and there are {regimes}, not "
                f"{experts.groups}; use groups={regimes}"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if not self.has_tokenizer:
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
    def has_tokenizer(self) -> bool:
        """Whether the operator works on latents; others work on the fields themselves."""
        return self.operator.kind == "latent_transformer"

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
    def cells(self) -> Grid:
        """Cells of a sample: a tokenizer reads two space dimensions as equal layers of three."""
        return self.data.cells if self.has_tokenizer else self.data.grid
