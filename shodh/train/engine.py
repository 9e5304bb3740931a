"""From a model and a configuration to a DeepSpeed engine, with the traps of facts closed at the door."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shodh.config import TrainConfig
from shodh.errors import ConfigError
from shodh.models.kernels import Kernels, adamw, describe_kernels
from shodh.topology import Topology

log = logging.getLogger("shodh")


def load_deepspeed_config(path: Path, train: TrainConfig, topology: Topology) -> dict[str, Any]:
    """Read a DeepSpeed JSON and fill in every ``"auto"``: batch sizes, clipping, precision.

    Raises
    ------
    ConfigError
        The file cannot be read, contradicts the run's configuration, or asks for ZeRO stage 0 (whose gradient norm is
        wrong with experts spread over ranks).
    """
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read DeepSpeed configuration {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    values = {
        "train_batch_size": topology.global_batch,
        "train_micro_batch_size_per_gpu": topology.micro_batch,
        "gradient_accumulation_steps": topology.accumulation,
        "gradient_clipping": train.clip,
    }
    for key, value in values.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ConfigError(f"{path}: {key}={config[key]} contradicts {value} of the run; write 'auto'")
        config[key] = value
    bf16 = config.setdefault("bf16", {})
    if bf16.get("enabled", "auto") == "auto":
        bf16["enabled"] = train.precision == "bf16"
    if bf16["enabled"] != (train.precision == "bf16"):
        raise ConfigError(
            f"{path}: bf16.enabled={bf16['enabled']} contradicts precision {train.precision}; write 'auto'"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"{path}: zero_optimization.stage={stage}; use 1, 2 or 3 (0 computes a wrong gradient norm with experts)"
        )
    return config


def keep_float32(model: nn.Module) -> None:
    """Statistics and selection biases stay float32, whatever DeepSpeed casts the module to."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())


def check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Prove that every trainable parameter is in exactly one optimiser group."""
    seen: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    wrong = [name for name, p in model.named_parameters() if seen.get(id(p), 0) != int(p.requires_grad)]
    assert not wrong, f"parameters not in exactly one optimiser group: {wrong}"


def _master_fragment(parameter: torch.Tensor) -> torch.Tensor | None:
    """The float32 values of a parameter that this rank's optimiser keeps; None if other ranks keep them all."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param

        local: torch.Tensor = safe_get_local_fp32_param(parameter)
        return local
    mapping = getattr(parameter, "_hp_mapping", None)
    return None if mapping is None else mapping.hp_fragment


def _unique_name(name: str, parameter: torch.Tensor) -> str:
    """Experts of different ranks share a name and are not the same parameter."""
    if getattr(parameter, "allreduce", True):
        return name
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
    return f"{name} of expert rank {dist.get_rank(group)}"


def _too_small(step: float, values: torch.Tensor) -> bool:
    """Whether every float32 value stays as it is when ``step`` is added."""
    return values.numel() > 0 and step <= 2**-24 * float(values.abs().min())


class MovementCheck:
    """Proof after the first step that every parameter moved; silently frozen experts are a known failure.

    Compared are the optimiser's float32 values (a small step is invisible in a bf16 weight), on every rank the part it
    keeps. A parameter whose gradient was exactly zero everywhere (an expert that got no token) may stand still, and is
    named in the log only.
    """

    def __init__(self, engine: Any) -> None:
        self._parameters = {_unique_name(n, p): p for n, p in engine.module.named_parameters() if p.requires_grad}
        self._before: dict[str, torch.Tensor] = {}
        self._gradient: dict[str, torch.Tensor] = {}
        self._hooks = []
        for name, parameter in self._parameters.items():
            if (fragment := _master_fragment(parameter)) is not None:
                self._before[name] = fragment.detach().clone()
            self._hooks.append(parameter.register_hook(partial(self._record, name)))

    def _record(self, name: str, gradient: torch.Tensor) -> None:
        self._gradient[name] = self._gradient.get(name, gradient.new_zeros(())) + gradient.abs().max()

    def finish(self, learning_rate: float) -> list[str]:
        """Names of parameters that should have moved and did not, the same on every rank. Collective.

        A step of ``learning_rate`` that float32 rounds away everywhere (a norm's ones, at the start of one cycle) says
        nothing.
        """
        local = {}
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self._parameters.items():
            now = _master_fragment(parameter)
            moved = now is not None and (
                not torch.equal(now, self._before[name]) or _too_small(learning_rate, self._before[name])
            )
            reached = name in self._gradient
            local[name] = (reached, reached and bool(self._gradient[name] != 0), moved)
        parts = [local]
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, local)
        idle, still = [], []
        for name in sorted({name for part in parts for name in part}):
            reached, pushed, moved = (any(part[name][i] for part in parts if name in part) for i in range(3))
            if reached and not pushed:
                idle.append(name)
            elif not moved:
                still.append(name)
        if idle:
            log.info("without gradient in the first step (experts that got no token): %s", ", ".join(idle))
        return still


@contextmanager
def _experts_may_be_frozen(groups: list[dict[str, Any]]) -> Iterator[None]:
    """ZeRO 1 and 2 insist on a group of experts in the optimiser; where all are frozen they are to find none."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    configure = Zero._configure_moe_settings
    if not any(group.get("moe") for group in groups):
        Zero._configure_moe_settings = lambda self: setattr(  # type: ignore[method-assign]
            self, "is_moe_param_group", [False] * len(self.optimizer.param_groups)
        )
    try:
        yield
    finally:
        Zero._configure_moe_settings = configure  # type: ignore[method-assign]


def build_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    train: TrainConfig,
    deepspeed_config: dict[str, Any],
    kernels: Kernels,
) -> Any:
    """A DeepSpeed engine around a model that has been moved to its device."""
    import deepspeed

    check_groups(model, groups)
    optimizer = adamw(groups, train.lr, train.betas, kernels)
    log.info("kernels: %s", describe_kernels(kernels))
    with _experts_may_be_frozen(groups):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(deepspeed_config))
    keep_float32(engine.module)
    return engine
