"""From a model and a configuration to a DeepSpeed engine; unsafe settings are refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shodh.checkpoint.shares import shard_range
from shodh.config import TrainConfig
from shodh.core.distributed import gather
from shodh.core.errors import ConfigError
from shodh.core.presets import find_preset
from shodh.core.reading import read_json
from shodh.core.topology import Topology
from shodh.models.kernels import Kernels, adamw, describe_kernels
from shodh.moe.groups import is_routed_expert

log = logging.getLogger("shodh")


#: Settings a DeepSpeed JSON may leave out or give as here; with others gradients are rounded or weights get NaN.
FIXED: dict[tuple[str, ...], Any] = {
    ("communication_data_type",): "fp32",  # Gradients are summed over ranks in float32 ...
    ("data_types", "grad_accum_dtype"): "fp32",  # ... and over micro-batches.
    ("bf16", "check_grad_overflow"): True,
    ("bf16", "bf16_master_weights_and_grads"): False,
    ("bf16", "bf16_optimizer_states"): False,
    ("zero_optimization", "compute_grad_norm"): True,  # The norm is what shows a gradient that is not finite.
    ("fp16", "enabled"): False,
}


def _settle(config: dict[str, Any], place: tuple[str, ...], value: Any, reason: str) -> None:
    """Set one entry of a DeepSpeed configuration that may be absent, ``"auto"`` or ``value`` already."""
    section = config
    for depth, key in enumerate(place[:-1], 1):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{'.'.join(place[:depth])}: expected a mapping, got {section!r}")
    given = section.setdefault(place[-1], value)
    if given != "auto" and (given != value or isinstance(given, bool) != isinstance(value, bool)):
        raise ConfigError(f"{'.'.join(place)}={given!r} contradicts {value!r} {reason}; write 'auto'")
    section[place[-1]] = value


def load_deepspeed_config(path: Path, train: TrainConfig, topology: Topology) -> dict[str, Any]:
    """Read a DeepSpeed JSON and fill in what the run decides: batch sizes, clipping, precision, type of gradients.

    Raises
    ------
    ConfigError
        The file cannot be read, contradicts the run's configuration, rounds gradients or lets those that are not
        finite pass, or asks for ZeRO stage 0 (whose gradient norm is wrong with experts spread over ranks).
    """
    config = read_json(find_preset(path, "ds_configs"), "DeepSpeed configuration")
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object of settings, got {type(config).__name__}")
    of_run = {
        ("train_batch_size",): topology.global_batch,
        ("train_micro_batch_size_per_gpu",): topology.micro_batch,
        ("gradient_accumulation_steps",): topology.accumulation,
        ("gradient_clipping",): train.clip,
        ("bf16", "enabled"): train.precision == "bf16",
    }
    try:
        for place, value in of_run.items():
            _settle(config, place, value, f"of the run (precision {train.precision})")
        for place, value in FIXED.items():
            _settle(config, place, value, "that training needs")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    _refuse_unmovable(path, config["zero_optimization"])
    stage = config["zero_optimization"].get("stage", 0)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ConfigError(
            f"{path}: zero_optimization.stage={stage}; use 1, 2 or 3 (0 computes a wrong gradient norm with experts)"
        )
    return config


def _refuse_unmovable(path: Path, zero: dict[str, Any]) -> None:
    """Refuse settings with which the optimiser's numbers are not where `shodh.checkpoint.shares` finds them."""
    defaults = {"round_robin_gradients": False, "mics_shard_size": -1, "zero_hpz_partition_size": 1}
    wrong = [f"zero_optimization.{key}" for key, value in defaults.items() if zero.get(key, value) != value]
    nvme = [key for key in ("offload_optimizer", "offload_param") if (zero.get(key) or {}).get("device") == "nvme"]
    wrong += [f"zero_optimization.{key}.device=nvme" for key in nvme]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]} is not supported: checkpoints could not be read back; take it out")


def keep_float32(model: nn.Module) -> None:
    """Statistics and selection biases stay float32, whatever DeepSpeed casts the module to."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())


@torch.no_grad()
def _clear_padding(engine: Any) -> None:
    """Set to zero what pads the last shares of ZeRO 3: DeepSpeed leaves there whatever was in memory, NaN too."""
    zero = engine.optimizer
    for parameter in engine.module.parameters():
        if not hasattr(parameter, "ds_tensor"):
            continue
        _, own = shard_range(zero, parameter)
        parameter.ds_tensor.data[own:] = 0
        if parameter.requires_grad:
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            zero.fp32_partitioned_groups_flat[group].data[offset + own : offset + size] = 0


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


def _moments(engine: Any, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """AdamW's two moments beside `_master_fragment`; None where the optimiser does not have the parameter."""
    keys = ("exp_avg", "exp_avg_sq")
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_optimizer_state

        try:
            first, second = (safe_get_local_optimizer_state(parameter, key) for key in keys)
        except (KeyError, ValueError):
            return None
        return None if first is None or second is None else (first, second)
    # The mapping's own view of the optimiser's state is made before all groups have one.
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    place, storage = mapping.hp_fragment_address, mapping.hp_fragment.untyped_storage().data_ptr()
    for flat, state in engine.optimizer.optimizer.state.items():
        if flat.untyped_storage().data_ptr() == storage and all(key in state for key in keys):
            first, second = (state[key].flatten().narrow(0, place.start, place.numel) for key in keys)
            return first, second
    return None


def _describe_idle(names: list[str]) -> list[str]:
    """Parameters whose gradient was zero, with the reason that such parameters can have."""
    experts = [name for name in names if is_routed_expert(name)]
    others = [name for name in names if not is_routed_expert(name)]
    reasons = ((experts, "experts that got no token"), (others, "what they read, or act on, is zero"))
    return [f"{', '.join(found)} ({why})" for found, why in reasons if found]


class MovementCheck:
    """Proof after the first step that every parameter moved; silently frozen experts are a known failure.

    Compared are the optimiser's float32 values (a small step is invisible in a bf16 weight), on every rank the part it
    keeps. A parameter whose gradient was exactly zero everywhere (of an expert that got no token, or of what reads
    walls where there are none) may stand still, and is named in the log only; so may one whose step float32 rounds
    away, after heavy clipping or at a tiny learning rate.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
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

    def restarted(self) -> MovementCheck:
        """The same check of the next step, after one that was skipped."""
        self._gradient.clear()
        return self

    def _could_move(self, name: str, learning_rate: float) -> bool:
        """Whether AdamW's first step changes a value of this rank's part by more than float32 rounds away.

        Half of the step is asked for, because the optimiser may round otherwise; weight decay is left out.
        """
        moments = _moments(self._engine, self._parameters[name])
        if moments is None:
            return True
        group = self._engine.optimizer.optimizer.param_groups[0]
        (first, second), (beta1, beta2), before = moments, group["betas"], self._before[name]
        step = learning_rate * (first / (1 - beta1)) / ((second / (1 - beta2)).sqrt() + group["eps"])
        return not torch.equal(before - 0.5 * step.view_as(before), before)

    def finish(self, learning_rate: float) -> list[str]:
        """Names of parameters that should have moved and did not, the same on every rank. Collective."""
        local = {}
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self._parameters.items():
            now = _master_fragment(parameter)
            moved = now is not None and not torch.equal(now, self._before[name])
            could = now is not None and not moved and self._could_move(name, learning_rate)
            reached = name in self._gradient
            local[name] = (reached, reached and bool(self._gradient[name] != 0), moved, could)
        parts = gather(local)
        idle, still = [], []
        for name in sorted({name for part in parts for name in part}):
            reached, pushed, moved, could = (any(part[name][i] for part in parts if name in part) for i in range(4))
            if reached and not pushed:
                idle.append(name)
            elif not moved and (could or not reached):
                still.append(name)
        for line in _describe_idle(idle):
            log.info("without gradient in the first step: %s", line)
        return still


def find_nonfinite(engine: Any, more: Iterable[tuple[str, torch.Tensor]] = ()) -> list[str]:
    """Names of weights, buffers, optimiser states and ``more`` of this rank that hold a value that is not finite."""
    tensors: list[tuple[str, torch.Tensor]] = [*engine.module.named_buffers(), *more]
    for name, parameter in engine.module.named_parameters():
        tensors.append((_unique_name(name, parameter), getattr(parameter, "ds_tensor", parameter)))
    for master, state in engine.optimizer.optimizer.state.items():
        tensors += [
            (f"optimiser state {key}", value) for key, value in state.items() if isinstance(value, torch.Tensor)
        ]
        tensors.append(("master weights", master))
    floats = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return []
    finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in floats]).tolist()
    return sorted({name for (name, _), fine in zip(floats, finite, strict=True) if not fine})


def refuse_steps(engine: Any, refuses: Callable[[float], bool]) -> None:
    """Let the optimiser skip each step of whose gradient norm, before clipping, ``refuses`` says yes.

    It must say the same on all ranks, may be collective, and is not asked where a gradient is not finite. DeepSpeed
    skips a step whose norm is infinite: ZeRO 1 and 2 ask `scaled_global_norm` for it, ZeRO 3 the norms of its groups.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    zero = engine.optimizer

    def judged(norm: Any) -> bool:
        value = float(norm) / float(zero.loss_scale)
        return math.isfinite(value) and value >= 0 and refuses(value)

    if engine.zero_optimization_stage() == 3:
        groups_of = zero._get_norm_groups

        def norm_groups() -> list[Any]:
            groups = groups_of()
            infinite = [torch.full_like(torch.as_tensor(groups[0]), math.inf)]
            return infinite if judged(combine_grad_norm_groups(groups)) else groups

        zero._get_norm_groups = norm_groups
    else:
        norm_of = zero.scaled_global_norm

        def norm(*arguments: Any, **options: Any) -> Any:
            found = norm_of(*arguments, **options)
            return torch.full_like(torch.as_tensor(found), math.inf) if judged(found) else found

        zero.scaled_global_norm = norm


@contextmanager
def _mended(groups: list[dict[str, Any]]) -> Iterator[None]:
    """DeepSpeed, while it builds an engine, without two of its limits.

    ZeRO 1 and 2 insist on a group of experts in the optimiser; where all are frozen they are to find none. And ZeRO 1
    in bf16 with gradients in float32 would get another optimiser, with checkpoints of its own, though its own class
    can do that. The first step asks whether the optimiser is Muon, whose module compiles functions at its import: that
    brings torch's compiler, some seconds a rank, to runs that compile nothing.
    """
    from deepspeed.runtime import compiler
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    configure, check = Zero._configure_moe_settings, DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda self, optimizer: ZERO_OPTIMIZATION  # type: ignore[method-assign]
    if not any(group.get("moe") for group in groups):
        Zero._configure_moe_settings = lambda self: setattr(  # type: ignore[method-assign]
            self, "is_moe_param_group", [False] * len(self.optimizer.param_groups)
        )
    decorator, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

        yield
    finally:
        compiler.compile = decorator
        Zero._configure_moe_settings = configure  # type: ignore[method-assign]
        DeepSpeedEngine._do_optimizer_sanity_check = check  # type: ignore[method-assign]


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
    with _mended(groups):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(deepspeed_config))
    keep_float32(engine.module)
    _clear_padding(engine)
    return engine
