"""The models that are compared: ours from their configuration, the peers' from their own packages, published settings.

Every model is a module ``history [B, T, C, n, n] -> next frame [B, C, n, n]`` of normalised fields. What a published
setting ties to a width or a grid is scaled to the size of a run (`Size`): widths, and patches so that a field has
``tokens`` of them along an axis. Depths, ratios, heads, activations, norms and initial weights stay as published.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shodh
from shodh.config import OperatorConfig
from shodh.core.environment import installed_version
from shodh.models.field_space import FieldSpace
from shodh.models.init import initialise
from shodh.models.operator import LatentTransformer
from shodh.models.registry import build_field_operator
from shodh.models.unfolding import fold, unfold
from shodh.moe.balance import GlobalBalance
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.step import finish_step


@dataclass(frozen=True)
class Size:
    """Widths of the models, and tokens along an axis of those that have patches."""

    tokens: int
    window: int
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Shape:
    """What a model is built for: frames it sees, channels, cells along an axis, whether the box wraps around."""

    history: int
    channels: int
    grid: int
    periodic: bool


class Ours(nn.Module):
    """An operator of this project, its balance term, and what its routers do after a step.

    A latent transformer has no tokenizer here: the ``unfolded`` cells of a side are the channels of one latent cell.
    """

    def __init__(self, settings: Mapping[str, Any], shape: Shape, seed: int, unfolded: int = 1) -> None:
        super().__init__()
        common = {"experts": {"num_experts": 0}, "loss": "mse", "random_shifts": False}
        self.config = OperatorConfig.model_validate({**common, **settings})
        self.unfolded = unfolded
        self.operator = self._build(shape)
        initialise(self.operator, seed)
        self.balance = GlobalBalance()
        self.added: Tensor | None = None
        self.counts: Tensor | None = None

    def _build(self, shape: Shape) -> nn.Module:
        if self.config.kind != "latent_transformer":
            space = FieldSpace(shape.channels, 0, (shape.grid,) * 2, shape.history)
            return build_field_operator(self.config, space, ExpertLayerReference)
        side = shape.grid // self.unfolded
        return LatentTransformer(self.config, shape.channels * self.unfolded**2, 0, (side, side, 1), shape.history)

    def forward(self, history: Tensor) -> Tensor:
        latent = self.config.kind == "latent_transformer"
        given = unfold(history, self.unfolded) if latent else history
        output = self.operator(given, given.new_zeros(len(given), 0, *given.shape[3:]))
        if output.routing and self.training:
            self.balance.start_step()
            self.added = self.balance(output.routing).weighted(self.config.experts.balance)
            self.counts = torch.stack([layer.counts for layer in output.routing])
        return fold(output.latent, self.unfolded) if latent else output.latent

    def finish_step(self) -> None:
        """After an optimiser step: temperatures and biases of routers."""
        finish_step(self.operator, self.config.experts, lambda: self.counts)  # type: ignore[arg-type,return-value]


class Stacked(nn.Module):
    """A network on images, given the frames of the history as channels."""

    def __init__(self, network: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] = lambda net, x: net(x)) -> None:
        super().__init__()
        self.network, self._call = network, call

    def forward(self, history: Tensor) -> Tensor:
        return self._call(self.network, history.flatten(1, 2))


def _fno(size: Size, shape: Shape, seed: int) -> nn.Module:
    settings = {"kind": "fno", "dim": size.widths["fno"], "modes": 8, "depth": 4}
    return Ours(settings, shape, seed)


def _pot(kind: str, experts: Mapping[str, Any], size: Size, shape: Shape, seed: int) -> nn.Module:
    width = size.widths["dpot"]
    settings: dict[str, Any] = {
        "kind": kind,
        "dim": width,
        "depth": 4,
        "heads": 4,
        "patch": shape.grid // size.tokens,
        "field": {"mlp": width},
    }
    if experts:
        settings["experts"] = {**experts, "hidden": width}
    return Ours(settings, shape, seed)


def _latent(num_experts: int, size: Size, shape: Shape, seed: int) -> nn.Module:
    width = size.widths["latent"]
    experts = {
        "num_experts": num_experts,
        "top_k": 1,
        "hidden": 2 * width,
        "num_shared": 1,
        "router": {"kind": "token"},
    }
    settings = {"dim": width, "depth": 3, "heads": 4, "experts": experts}
    return Ours(settings, shape, seed, unfolded=shape.grid // size.tokens)


#: As in MoE-POT's public code, and launch/configs/moe_pot_tiny.yaml.
EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "top_k": 4,
    "form": "linear",
    "num_shared": 2,
    "shared_combine": "mean",
    "router": {
        "kind": "token",
        "score": "softmax",
        "gate": "conv",
        "normalise": "after",
        "granularity": "sample",
        "temperature_schedule": {"start": 2.0, "end": 0.5, "decay": 0.99},
    },
    "balance": {"switch": 0.0, "information": 0.0, "z_loss": 0.0, "cv2": 0.1},
}
DENSE = {**EXPERTS, "num_experts": 0}


def _package(name: str) -> types.ModuleType:
    """An empty package, imported."""
    sys.modules[name] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
    return sys.modules[name]


def load(module: str, *bare: str) -> types.ModuleType:
    """Import a module of a package without the ``__init__`` of the packages ``bare`` on its way.

    Those of the peers import trainers, trackers and renderers of whole frameworks, none of which a model needs.
    """
    for name in bare:
        if name not in sys.modules:
            parent, _, last = name.rpartition(".")
            found = importlib.util.find_spec(name) if not parent else None
            places = sys.modules[parent].__path__ if parent else found and found.submodule_search_locations
            if not places:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            _package(name).__path__ = [str(Path(place) / last) if parent else place for place in places]
    return importlib.import_module(module)


def _needs_drop_path() -> None:
    """Give peers ``timm``'s DropPath, all they take of it, which no model here has above 0: timm needs torchvision."""
    if "timm.models.layers" not in sys.modules:
        for name in ("timm", "timm.models", "timm.models.layers"):
            _package(name)
        sys.modules["timm.models.layers"].DropPath = nn.Identity  # type: ignore[attr-defined]


def _seeded(build: Callable[[Size, Shape], nn.Module], size: Size, shape: Shape, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(size, shape)


def _neuralop(name: str, size: Size, shape: Shape) -> nn.Module:
    kind = getattr(load("neuralop.models"), name)
    inputs = shape.history * shape.channels
    width = size.widths[f"neuralop_{name.lower()}"]
    return Stacked(kind(n_modes=(16, 16), in_channels=inputs, out_channels=shape.channels, hidden_channels=width))


def _well(name: str, settings: Mapping[str, int], size: Size, shape: Shape) -> nn.Module:
    _needs_drop_path()
    module = {"UNetClassic": "unet_classic", "UNetConvNext": "unet_convnext"}[name]
    folder = "the_well.benchmark.models"
    kind = getattr(load(f"{folder}.{module}", "the_well", "the_well.benchmark", folder), name)
    inputs, grid = shape.history * shape.channels, (shape.grid,) * 2
    return Stacked(kind(inputs, shape.channels, 2, grid, init_features=size.widths[module], **settings))


def _pde_transformer(size: Size, shape: Shape) -> nn.Module:
    _needs_drop_path()
    folder = "pdetransformer.core.mixed_channels"
    module = load(f"{folder}.pde_transformer", "pdetransformer", "pdetransformer.core", folder)
    network = module.PDEImpl(
        in_channels=shape.history * shape.channels,
        out_channels=shape.channels,
        window_size=size.window,
        patch_size=max(1, shape.grid // size.tokens),
        hidden_size=size.widths["pde_transformer"],
        num_heads=4,
        depth=[2, 5, 8, 5, 2],
        mlp_ratio=4,
        periodic=shape.periodic,
    )
    return Stacked(network, lambda net, x: net(x, None, None))


@dataclass(frozen=True)
class Entry:
    """One model: how it is built, and how its authors train it.

    Attributes
    ----------
    package : str
        What the code is from; ``shodh`` for ours.
    modules : tuple of str
        That must be found for it to run.
    rate, decay, betas
        Published settings of Adam.
    published, scaled : str
        The setting that was taken, and what is changed.
    predicts_change : bool
        Whether it adds to the last frame what it computes.
    """

    label: str
    package: str
    build: Callable[[Size, Shape, int], nn.Module]
    rate: float
    decay: float
    published: str
    scaled: str
    betas: tuple[float, float] = (0.9, 0.999)
    modules: tuple[str, ...] = field(default=())
    predicts_change: bool = False

    @property
    def ours(self) -> bool:
        return self.package == "shodh"

    @property
    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]

    @property
    def version(self) -> str:
        return shodh.__version__ if self.ours else installed_version(self.package)


_LATENT = {
    "package": "shodh",
    "rate": 2e-3,
    "decay": 0.01,
    "betas": (0.9, 0.95),
    "scaled": "unfolded fields, no tokenizer",
    "predicts_change": True,
}
_POT = {"package": "shodh", "rate": 1e-3, "decay": 1e-6, "betas": (0.9, 0.9), "scaled": "width, patch"}
_WELL = {"package": "the-well", "rate": 1e-3, "decay": 1e-5, "scaled": "width", "modules": ("the_well", "einops")}
_NEURALOP = {"package": "neuraloperator", "rate": 3e-4, "decay": 1e-4, "modules": ("neuralop",)}

#: By name, in the order of tables.
MODELS: dict[str, Entry] = {
    "fno": Entry("FNO", "shodh", _fno, 1e-3, 1e-4, "FNO (2010.08895), 4 layers; 8 modes a sign", "width"),
    "dpot": Entry("DPOT", build=partial(_pot, "dpot", {}), published="DPOT Tiny, 4 layers, 4 heads, all modes", **_POT),
    "moe_pot_dense": Entry(
        "MoE-POT, dense of equal active size",
        build=partial(_pot, "moe_pot", DENSE),
        published="MoE-POT Tiny without routing",
        **_POT,
    ),
    "moe_pot": Entry(
        "MoE-POT",
        build=partial(_pot, "moe_pot", EXPERTS),
        published="MoE-POT Tiny, 16 experts, top-4, 2 shared",
        **_POT,
    ),
    "latent_dense": Entry(
        "latent transformer, dense of equal active size",
        build=partial(_latent, 0),
        published="launch/configs/demo.yaml without routing",
        **_LATENT,
    ),
    "latent_moe": Entry(
        "latent MoE",
        build=partial(_latent, 2),
        published="launch/configs/demo.yaml: 3 layers, 2 experts, top-1, 1 shared",
        **_LATENT,
    ),
    "neuralop_fno": Entry(
        "neuraloperator FNO",
        build=partial(_seeded, partial(_neuralop, "FNO")),
        published="FNO_Small2d: 16 modes, width 24, 4 layers",
        scaled="nothing on two cores",
        **_NEURALOP,
    ),
    "neuralop_tfno": Entry(
        "neuraloperator TFNO",
        build=partial(_seeded, partial(_neuralop, "TFNO")),
        published="Tucker, rank .1, else as FNO",
        scaled="width",
        **_NEURALOP,
    ),
    "unet_classic": Entry(
        "The Well U-Net",
        build=partial(_seeded, partial(_well, "UNetClassic", {})),
        published="benchmark/configs: init_features 48",
        **_WELL,
    ),
    "unet_convnext": Entry(
        "The Well CNextU-Net",
        build=partial(_seeded, partial(_well, "UNetConvNext", {"blocks_per_stage": 2})),
        published="benchmark/configs: init_features 42, 2 blocks a stage",
        **_WELL,
    ),
    "pde_transformer": Entry(
        "PDE-Transformer S",
        "pdetransformer",
        partial(_seeded, _pde_transformer),
        4e-5,
        1e-15,
        "pde-mc-s-mse: width 96, depths 2-5-8-5-2, 4 heads",
        "width, patch, window",
        modules=("pdetransformer", "diffusers", "einops"),
    ),
}
