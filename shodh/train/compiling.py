"""Compile the element-wise parts of a model: norms, positions, padding, residuals, routers; and count the compilations.

Functions of modules are compiled, not the modules: parameters, their names in checkpoints, hooks and the experts' own
kernels stay as they are.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from shodh.core.devices import uses_cuda
from shodh.core.errors import ConfigError
from shodh.models.blocks import Block
from shodh.models.tokenizer import Decoder, ResidualBlock
from shodh.moe.routers.base import GateRouter
from shodh.train.operator_task import OperatorTask
from shodh.train.trainer import Task

log = logging.getLogger("shodh")

Mode = Literal["auto", "on", "off"]


def compiles(mode: Mode, zero_stage: int) -> bool:
    """Whether a run compiles: ``auto`` does so on a card.

    Raises
    ------
    ConfigError
        ``on`` with ZeRO 3, whose weights are empty until hooks of the modules gather them.
    """
    if zero_stage == 3 and mode == "on":
        raise ConfigError(
            "compile: on does not go with ZeRO 3, whose weights are gathered by hooks between the parts that would be "
            "compiled together; use compile: auto or off, or ZeRO stage 1 or 2"
        )
    if mode == "on" or mode == "off" or zero_stage == 3 or not uses_cuda():
        return mode == "on"
    from torch.utils._triton import has_triton

    if not has_triton():
        log.info("compile: auto found no Triton; nothing is compiled")
    return has_triton()


def _parts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules, and the name of the method of each that is compiled whole, without a graph break."""
    parts: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, Block) and module.mixing is None:  # A Fourier transform is no element-wise part.
            parts.append((module, "forward" if module.dense else "mix"))
        elif isinstance(module, GateRouter) and not module.traits.labelled:
            parts.append((module, "route"))
        elif isinstance(module, ResidualBlock):
            parts.append((module, "forward"))
        elif isinstance(module, Decoder):
            parts.append((module, "enter_head"))
    return parts


def compile_run(model: nn.Module, task: Task | None, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the parts of a model and the balance terms of its loss, in place; returns how many parts there are.

    They compile at their first call, blocks of one kind once for all of them.
    """
    build = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    # A graph each for training and validation, and for routers with and without noise; past the limit torch fails.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    parts = _parts(model)
    for module, name in parts:
        setattr(module, name, build(getattr(module, name)))  # Of this module alone; the class keeps its own.
    if isinstance(task, OperatorTask):
        task.balance.means, task.balance.terms = build(task.balance.means), build(task.balance.terms)
    return len(parts)


class CompileCount:
    """Graphs compiled in this process, and a warning where they go on growing."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._last = 0

    def read(self) -> dict[str, float]:
        """``perf/compiled_graphs`` and ``perf/graph_breaks``; nothing of a process that compiles nothing."""
        if "torch._dynamo" not in sys.modules:
            return {}
        from torch._dynamo.utils import counters

        graphs = int(counters["stats"].get("unique_graphs", 0))
        if not graphs:
            return {}
        if self._first is None:
            self._first = self._last = graphs
        elif graphs > self._last:
            log.warning("%d more graphs were compiled: the shape or the type of an input changed", graphs - self._last)
            self._last = graphs
        return {"perf/compiled_graphs": graphs, "perf/graph_breaks": sum(counters["graph_break"].values())}
