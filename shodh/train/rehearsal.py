"""One training step on the meta device, which has shapes and no values: what it keeps, what it needs at most, its work.

Nothing is estimated: the task, the model and its backward pass run as in training, and every tensor that they make is
counted by its storage, every product by its size; so recomputed blocks are counted as often as they run. What is not
there is the engine: weights, their gradients and the optimiser are `shodh.train.plan`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from shodh.config import RunConfig
from shodh.models.factory import build_operator, build_tokenizer, operator_space
from shodh.models.init import initialise
from shodh.models.tokenizer import Tokenizer
from shodh.moe.grouped import product_flops
from shodh.moe.groups import freeze_others
from shodh.schema.conditions import Condition
from shodh.schema.domain import Domain
from shodh.schema.space import RegimeSpace, Space
from shodh.train.datasets import Regimes
from shodh.train.engine import keep_float32
from shodh.train.field_task import operator_task
from shodh.train.operator_task import CONDITIONS
from shodh.train.tokenizer_task import TokenizerTask
from shodh.train.trainer import SAMPLE_KEY, Batch, Task, to_device

aten = torch.ops.aten
#: Attention that keeps no matrix of scores, as every device has it; on the meta device torch would take another.
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu


#: Work of an operation by its arguments and ``out_val``.
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._grouped_mm: lambda left, right, *_, **__: product_flops(left.shape, right.shape),
    ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)
    ),
}


@dataclass(frozen=True)
class Rehearsal:
    """Of one micro-batch of one rank.

    Attributes
    ----------
    saved : int
        Bytes that the forward pass keeps for the backward one, without the weights.
    peak : int
        Bytes at most, the batch and all that is made from it; a gradient of a weight only until the engine takes it.
    flops : int
        Floating-point operations of products, forward and backward, with what is computed again.
    """

    saved: int
    peak: int
    flops: int


class Storages(TorchDispatchMode):
    """Bytes of the storages that are made inside and live, and of them at most, and the work of products.

    ``given`` tensors are not counted. (torch's own counter of work keeps tensors alive that a step lets go.)
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0  # of the bytes that live: those that died since the last look are in it
        self.peak = self.flops = 0

    def now(self) -> int:
        """Bytes that live."""
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self._bound = sum(size for _, size in self._live.values())
        return self._bound

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _grouped if func is aten._grouped_mm.default and args[0].is_meta else func
        out = run(*args, **(kwargs or {}))
        if (work := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += work(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._given:
                # Another storage may have died at this address; then it counts twice until the next look.
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._bound += storage.nbytes()
        if self._bound > self.peak:
            self.peak = max(self.peak, self.now())
        return out


def _grouped(left: Tensor, right: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """What ``_grouped_mm`` returns; on the meta device it knows bfloat16 alone."""
    of_weights = (len(offs),) if left.ndim == right.ndim == 2 else ()
    return left.new_empty(*of_weights, left.shape[0], right.shape[-1])


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Attention on the meta device as `ATTENTION`, in the recomputation of a backward pass too."""
    original = F.scaled_dot_product_attention
    setattr(F, original.__name__, lambda q, k, v: ATTENTION(q, k, v)[0])
    try:
        yield
    finally:
        setattr(F, original.__name__, original)


def counted_step(model: nn.Module, task: Task, batch: Batch, device: torch.device) -> Rehearsal:
    """Forward and backward pass of a task on a model and a batch of the host, counted."""
    handles = [p.register_post_accumulate_grad_hook(_take_gradient) for p in model.parameters() if p.requires_grad]
    attention = _flash_attention() if device.type == "meta" else nullcontext()
    try:
        with Storages([*model.parameters(), *model.buffers()]) as storages, attention:
            task.start_step()
            moved = to_device(batch, device)
            outcome = task.loss(model, moved, 0)
            kept = storages.now() - sum(t.untyped_storage().nbytes() for t in moved.values())
            outcome.loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return Rehearsal(kept, storages.peak, storages.flops)


def _take_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _imagined_regimes(config: RunConfig) -> Regimes:
    """The regimes of a run, of which only the fields matter here."""
    ndim = 3 if config.has_tokenizer else len(config.data.grid)
    fields = tuple(f.build() for f in config.data.fields)
    spaces = []
    for regime in config.data.regimes:
        present = config.data.present(regime)
        domain = Domain(
            ("periodic",) * ndim,  # type: ignore[arg-type]
            (1.0,) * ndim,  # type: ignore[arg-type]
            presence=tuple((name, name in present) for name in config.data.optional),
            flat=len(config.data.grid) == 2 and config.has_tokenizer,
        )
        constants = {f.name: (0.0, 1.0) for f in fields if f.name in present and not f.static}
        spaces.append(RegimeSpace.of(regime.name, domain, constants))
    conditions = tuple(Condition(name, False, 0.0, 1.0) for name in config.operator.conditions)
    return Regimes([], Space(fields, ndim, tuple(spaces), conditions))


def rehearse_operator(config: RunConfig, micro_batch: int, device: str = "meta") -> Rehearsal:
    """A micro-batch of an operator's training; what a block adds is found from models of two and three blocks.

    Where the decoder is passed in some steps alone, work is the mean of all, and memory that of the largest.
    """
    operator = config.operator
    if operator.depth > 3 and operator.kind != "unet" and device == "meta":  # Levels of a U-Net differ.
        depths = (operator.model_copy(update={"depth": depth}) for depth in (2, 3))
        two, three = (rehearse_operator(config.model_copy(update={"operator": o}), micro_batch) for o in depths)
        pairs = zip(astuple(two), astuple(three), strict=True)
        return Rehearsal(*(b + (operator.depth - 3) * (b - a) for a, b in pairs))
    if operator.metric == "decoded" and operator.decoded_every > 1:
        settings = ({"metric": "variance"}, {"decoded_every": 1})
        changed = (config.model_copy(update={"operator": operator.model_copy(update=s)}) for s in settings)
        plain, decoded = (rehearse_operator(c, micro_batch, device) for c in changed)
        flops = plain.flops + (decoded.flops - plain.flops) // operator.decoded_every
        return Rehearsal(max(plain.saved, decoded.saved), max(plain.peak, decoded.peak), flops)
    space = operator_space(config)
    frames = space.history + operator.unroll.steps
    states = {"latents" if config.has_tokenizer else "fields": (frames, space.channels, *space.grid)}
    relative = config.operator.loss == "over_persistence"  # To the data, which are not here.
    judged = config.operator.model_copy(update={"loss": "mse"}) if relative else config.operator
    task = operator_task(
        config.model_copy(update={"operator": judged}),
        _imagined_regimes(config),
        [],
        _imagined_tokenizer(config, device) if config.has_tokenizer else None,
        lambda samples: torch.zeros(len(samples), _static_channels(config), *config.cells, device=device),
    )
    shapes = {**states, "static": (space.static, *space.grid)}
    if operator.conditions:
        shapes[CONDITIONS] = (len(operator.conditions),)
    return _rehearse(build_operator, task, config, config.operator.train.precision, micro_batch, shapes, device)


def _imagined_tokenizer(config: RunConfig, device: str) -> Tokenizer:
    """The frozen tokenizer of an operator's run, with weights of no meaning."""
    with torch.device(device):
        tokenizer = build_tokenizer(config)
    initialise(tokenizer, config.seed)
    return tokenizer.requires_grad_(False)


def _static_channels(config: RunConfig) -> int:
    return sum(f.build().num_components(3) for f in config.data.fields if f.static)


def rehearse_tokenizer(config: RunConfig, micro_batch: int, device: str = "meta") -> Rehearsal:
    """A micro-batch of a tokenizer's training."""
    channels = sum(f.build().num_components(3) for f in config.data.fields if not f.static)
    shapes = {"fields": (1, channels, *config.cells), "static": (_static_channels(config), *config.cells)}
    task = TokenizerTask(config, _imagined_regimes(config))
    return _rehearse(build_tokenizer, task, config, config.tokenizer.train.precision, micro_batch, shapes, device)


def _rehearse(
    build: Callable[[RunConfig], nn.Module],
    task: Task,
    config: RunConfig,
    precision: str,
    size: int,
    shapes: Mapping[str, tuple[int, ...]],
    device: str,
) -> Rehearsal:
    with torch.device(device):
        model = build(config)
    initialise(model, config.seed)
    if config.finetune is not None:
        freeze_others(model, config.finetune)
    if precision == "bf16":
        model.to(torch.bfloat16)
        keep_float32(model)
    batch = {name: torch.randn(size, *shape, device=device) for name, shape in shapes.items()}
    keys = {name: torch.arange(size) for name in SAMPLE_KEY}
    keys["regime"] %= len(config.data.regimes)
    return counted_step(model.train(), task, batch | keys, torch.device(device))
