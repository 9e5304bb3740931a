"""What ranks run in these tests: the real training jobs, with a look at the engine before it is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode


def probe_fields(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same three samples everywhere, of fields."""
    from shodh.models.field_space import FieldSpace

    space, draw = FieldSpace.of(config), torch.Generator().manual_seed(11)
    history = torch.randn(3, space.history, space.channels, *space.grid, generator=draw)
    return history, torch.randn(3, space.static, *space.grid, generator=draw)


def probe_input(history: int, latent_channels: int, static_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same three samples everywhere, on the 2^3 latent grid of the tiny data."""
    draw = torch.Generator().manual_seed(11)
    latents = torch.randn(3, history, latent_channels, 2, 2, 2, generator=draw)
    return latents, torch.randn(3, static_channels, 2, 2, 2, generator=draw)


def describe_engine(engine: Any, config: Any) -> dict[str, Any]:
    """Outputs for the probe, and the dtype of every parameter and buffer."""
    from shodh.moe.fingerprint import fingerprint
    from shodh.moe.step import router_arguments
    from shodh.schema.domain import num_static_features

    static = num_static_features(sum(f.static for f in config.data.fields), len(config.data.optional))
    if not config.has_tokenizer:
        inputs = probe_fields(config)
    else:
        inputs = probe_input(config.data.history, config.tokenizer.latent_channels, static)
    engine.eval()
    labels, wrapped = torch.zeros(len(inputs[0]), dtype=torch.long), torch.ones(len(inputs[0]), 3, dtype=torch.bool)
    with torch.no_grad():
        told = router_arguments(config.operator.experts, labels, look=lambda: fingerprint(inputs[0], wrapped))
        if names := config.operator.conditions:
            told["conditions"] = torch.linspace(-1, 1, 3 * len(names)).view(3, -1)
        output = engine(*inputs, **told)
    return {
        "latent": output.latent,
        "selected": [routing.selected for routing in output.routing],
        "buffers": {name: b.clone() for name, b in engine.module.named_buffers()},
        "parameter_dtypes": {p.dtype for p in engine.module.parameters()},
    }


def pretrain(config_path: Path, overrides: list[str], resume: str | None = None, profile: int = 0) -> dict[str, Any]:
    """`shodh.train.jobs.pretrain`, with `describe_engine` after the last step."""
    from shodh.config import load_config
    from shodh.train import jobs
    from shodh.train.callbacks import experts
    from shodh.train.throughput import Throughput
    from shodh.train.trainer import Trainer

    # Drawing takes longer than a tiny step; a unit test looks at the picture.
    experts.share_picture = lambda table, regimes: np.zeros((1, 1, 3), dtype=np.uint8)
    if not profile:  # Rehearsing a step takes as long as training ten; the tests of a profile look at the figure.
        Throughput.flops = 0  # type: ignore[assignment]
    config = load_config(config_path, overrides)
    seen: dict[str, Any] = {}
    fit = Trainer.fit

    def fit_and_look(trainer: Trainer) -> bool:
        done = fit(trainer)
        seen.update(describe_engine(trainer.engine, config))
        return done

    Trainer.fit = fit_and_look  # type: ignore[method-assign]
    seen["finished"] = jobs.pretrain(config, resume, profile=profile)
    return seen


def pretrain_in_dirty_memory(config_path: Path, overrides: list[str]) -> dict[str, Any]:
    """As `pretrain`; what torch allocates without writing to it is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and bool(torch.empty(3).isnan().all())
    return pretrain(config_path, overrides)


def pretrain_until_signal(config_path: Path, overrides: list[str], step: int) -> dict[str, Any]:
    """As `pretrain`, with ranks that meet after every step; at the end of ``step`` the last one alone gets SIGTERM."""
    from shodh.train.callbacks import Experts, StopSignal
    from shodh.train.trainer import Trainer

    finish = Experts.after_step

    def finish_and_signal(experts: Experts, trainer: Trainer) -> None:
        finish(experts, trainer)
        if trainer.step == step + 1 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    StopSignal.STEPS = 1
    Experts.after_step = finish_and_signal  # type: ignore[method-assign]
    return pretrain(config_path, overrides)


def pretrain_with_failing_save(config_path: Path, overrides: list[str], save: int, how: str) -> dict[str, Any]:
    """As `pretrain`; during checkpoint number ``save`` (from 1) rank 0 is killed, or its disk is full.

    ``how``: ``kill``, or what is at work when the disk is full: ``write`` or ``publish``.
    """
    from shodh.checkpoint import training
    from shodh.checkpoint.snapshot import Snapshot

    calls = [0]

    def failing(original: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == save and int(os.environ["RANK"]) == 0:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device", str(arguments[1]))
        return original(*arguments)

    if how == "publish":
        training.publish = partial(failing, training.publish)
    else:
        write = Snapshot.write
        Snapshot.write = lambda *arguments: failing(write, *arguments)  # type: ignore[assignment]
    return pretrain(config_path, overrides)


def pretrain_on_another_disk(config_path: Path, overrides: list[str], save: int, loses: str) -> dict[str, Any]:
    """As `pretrain`; of checkpoint ``save`` (from 1) nobody sees what the last rank wrote: its ``file``, or its
    ``ranges`` of the shared one."""
    from shodh.checkpoint import complete, training
    from shodh.checkpoint.snapshot import Snapshot

    complete.PATIENCE = 0.5
    calls, write, last = [0], Snapshot.write, int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    describe = training.describe_file

    def elsewhere(snapshot: Snapshot, weights: Path, fragments: Path) -> Any:
        calls[0] += 1
        if not last or calls[0] != save:
            return write(snapshot, weights, fragments)
        own = weights.with_name("node1") if loses == "ranges" else weights
        written = write(snapshot, own, fragments)
        written = {weights.name: written[own.name]}
        if loses == "ranges":
            own.unlink()
        return written

    def describe_and_lose(path: Path) -> dict[str, Any]:
        found = describe(path)
        if last and calls[0] == save and loses == "file":
            path.unlink()
        return found

    Snapshot.write, training.describe_file = elsewhere, describe_and_lose  # type: ignore[method-assign]
    return pretrain(config_path, overrides)


def pretrain_on_a_node_without(
    config_path: Path, overrides: list[str], checkpoint: Path, resume: str
) -> dict[str, Any]:
    """As `pretrain`; the last rank sees nothing of a checkpoint's files."""
    from shodh.checkpoint.folder import verify_checkpoint
    from shodh.core.errors import CheckpointError
    from shodh.train import start

    def verify(path: Path, share: tuple[int, int]) -> dict[str, Any]:
        if path == checkpoint and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            raise CheckpointError(f"checkpoint file {path} is missing")
        return verify_checkpoint(path, share)

    start.verify_checkpoint = verify
    return pretrain(config_path, overrides, resume)


def pretrain_with_slow_writing(config_path: Path, overrides: list[str], save: int, until: int) -> dict[str, Any]:
    """As `pretrain`; the last rank writes checkpoint number ``save`` (from 1) when ``until`` steps are done.

    ``seen["latest"]`` is what the run's file of that name holds at that moment, or None.
    """
    from shodh.checkpoint.snapshot import Snapshot
    from shodh.config import load_config
    from shodh.train.callbacks import StopSignal
    from shodh.train.trainer import Trainer

    original, step, calls, reached = Snapshot.write, StopSignal.after_step, [0], threading.Event()
    last, seen = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1, {}
    latest = load_config(config_path, overrides).run_dir / "latest"

    def write(snapshot: Snapshot, weights: Path, fragments: Path) -> Any:
        calls[0] += 1
        if calls[0] == save and last:
            assert reached.wait(60), "the training waits for what is written"
        return original(snapshot, weights, fragments)

    def after_step(callback: StopSignal, trainer: Trainer) -> None:
        step(callback, trainer)
        if trainer.step == until:
            seen["latest"] = latest.read_text() if latest.exists() else None
            reached.set()

    Snapshot.write, StopSignal.after_step = write, after_step  # type: ignore[method-assign]
    return {**pretrain(config_path, overrides), **seen}


def pretrain_with_lost_update(config_path: Path, overrides: list[str]) -> dict[str, Any]:
    """As `pretrain`; before the first checkpoint one number of the last rank's optimiser is not the model's."""
    from shodh.checkpoint.shares import flat_tensors
    from shodh.train.callbacks import Checkpoints
    from shodh.train.trainer import Trainer

    save = Checkpoints.save

    def lose_and_save(checkpoints: Checkpoints, trainer: Trainer) -> None:
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            flat_tensors(trainer.engine)[0].data[3] += 1e-3
        save(checkpoints, trainer)

    Checkpoints.save = lose_and_save  # type: ignore[method-assign]
    return pretrain(config_path, overrides)


def _forget(engine: Any, what: str) -> None:
    """Lose a part of what a checkpoint holds."""
    state = engine.optimizer.optimizer.state
    for flat in list(state):
        if what == "step":
            state[flat]["step"].zero_()
        if what == "moments":
            state[flat]["exp_avg"].zero_()
            state[flat]["exp_avg_sq"].zero_()
    for name, buffer in engine.module.named_buffers():
        if what == "selection_bias" and name.endswith(what):
            buffer.zero_()


def save_now(trainer: Any) -> None:
    """Save, and wait until it is published."""
    from shodh.train.callbacks import Checkpoints

    (checkpoints,) = (c for c in trainer.callbacks if isinstance(c, Checkpoints))
    checkpoints.save(trainer)
    checkpoints.join()


def resume_many(
    config_path: Path, overrides: list[str], moves: list[tuple[Path, str | None]], rewritten: Path
) -> list[dict[str, Any]]:
    """Resume the same engine from one checkpoint after the other, and train each time to the last step.

    ``moves`` are checkpoints, and what is to be lost of each after it was loaded. What the engine writes at once is
    moved to ``rewritten/<number>``. Returned are the metrics of the steps, and the settings of the optimiser.
    """
    from shodh.config import load_config
    from shodh.core.distributed import rank
    from shodh.train import jobs
    from shodh.train.callbacks import experts
    from shodh.train.callbacks.checkpoints import resume
    from shodh.train.metrics import read_metrics
    from shodh.train.trainer import Trainer

    experts.share_picture = lambda table, regimes: np.zeros((1, 1, 3), dtype=np.uint8)
    config = load_config(config_path, overrides)
    answers: list[dict[str, Any]] = []
    fit, run = Trainer.fit, config.run_dir

    def fit_many(trainer: Trainer) -> bool:
        for number, (checkpoint, lost) in enumerate(moves):
            resume(trainer, checkpoint)
            start = trainer.step
            if lost is not None:
                _forget(trainer.engine, lost)
            save_now(trainer)
            if rank() == 0:
                rewritten.mkdir(exist_ok=True)
                (run / "checkpoints" / checkpoint.name).rename(rewritten / str(number))
            fit(trainer)
            lines = read_metrics(run / "metrics.jsonl")
            groups = trainer.engine.optimizer.param_groups
            settings = {(group["weight_decay"], tuple(group["betas"])) for group in groups}
            answers.append({"lines": [line for line in lines if line["step"] >= start], "settings": settings})
        return True

    Trainer.fit = fit_many  # type: ignore[method-assign]
    jobs.pretrain(config)
    return answers


def save_with_deepspeed(config_path: Path, overrides: list[str], folder: Path) -> None:
    """Resume a finished run, and let DeepSpeed alone write a checkpoint folder of its last step."""
    from shodh.config import load_config
    from shodh.train import jobs
    from shodh.train.trainer import Trainer

    resume = jobs.resume_from

    def resume_and_save(trainer: Trainer, checkpoint: Path, *more: Any) -> None:
        resume(trainer, checkpoint, *more)
        trainer.engine.save_checkpoint(str(folder), tag=f"global_step{trainer.step}")

    jobs.resume_from = resume_and_save
    jobs.pretrain(load_config(config_path, overrides), "auto")


def train_tokenizer(config_path: Path, overrides: list[str], resume: str | None = None) -> bool:
    from shodh.config import load_config
    from shodh.train import jobs

    return jobs.train_tokenizer(load_config(config_path, overrides), resume)


def pretrain_with_frozen_experts(config_path: Path, overrides: list[str]) -> dict[str, Any]:
    """As `pretrain`, with an optimiser that leaves the experts of the last rank alone: a known, silent failure."""
    from shodh.train import engine

    adamw = engine.adamw

    def freezing(groups: list[dict[str, Any]], *arguments: Any) -> Any:
        optimizer = adamw(groups, *arguments)
        step = optimizer.step

        def frozen_step(*args: Any, **kwargs: Any) -> Any:
            experts = [p for g in optimizer.param_groups if g.get("moe") for p in g["params"]]
            before = [p.detach().clone() for p in experts]
            result = step(*args, **kwargs)
            if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                for parameter, old in zip(experts, before, strict=True):
                    parameter.data.copy_(old)
            return result

        optimizer.step = frozen_step
        return optimizer

    engine.adamw = freezing
    return pretrain(config_path, overrides)


def pretrain_with_idle_experts(config_path: Path, overrides: list[str]) -> dict[str, Any]:
    """As `pretrain`; no token goes to the experts of the last rank."""
    from shodh.moe.routers import Router

    reset = Router.__init__

    def biased(router: Router, *arguments: Any) -> None:
        reset(router, *arguments)
        router.selection_bias[router.num_experts // 2 :] = -9.0

    Router.__init__ = biased  # type: ignore[method-assign]
    return pretrain(config_path, overrides)


def start_from(config_path: Path, overrides: list[str], weights: Path) -> dict[str, Any]:
    """Start a run from weights and stop before the first step: the engine's masters and outputs."""

    from shodh.config import load_config
    from shodh.train import jobs
    from shodh.train.trainer import Trainer

    config = load_config(config_path, overrides)
    seen: dict[str, Any] = {}

    def look(trainer: Trainer) -> bool:
        seen.update(describe_engine(trainer.engine, config))
        save_now(trainer)
        seen["state"] = load_file(config.run_dir / "checkpoints" / "step_00000000" / "model.safetensors")
        return True

    Trainer.fit = look  # type: ignore[method-assign]
    jobs.pretrain(config, None, weights)
    return seen


def products_of_every_entry(config_path: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Float32 products as the networks meet them and as they are left behind, by entry; the user has allowed TF32."""
    import shodh
    from shodh.checkpoint.convert import convert
    from shodh.config import load_config
    from shodh.core.precision import float32_products
    from shodh.evaluate.evaluation import evaluate, open_run
    from shodh.models.tokenizer import Tokenizer
    from shodh.moe.routers import Router
    from shodh.train import jobs

    torch.backends.cuda.matmul.fp32_precision = "tf32"
    config, seen = load_config(config_path, overrides), {"user": [float32_products()]}

    def note(cls: type, name: str) -> None:
        original = getattr(cls, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            seen[entry].append(float32_products())
            return original(*args, **kwargs)

        setattr(cls, name, noting)

    note(Tokenizer, "emit")
    note(Tokenizer, "encode")
    note(Router, "forward")

    def predict() -> None:
        model = shodh.from_pretrained(folder)
        fields = torch.zeros(1, model.history, model.num_channels, *model.grid)
        model.predict(fields, torch.zeros(1, model.num_static, *model.grid), model.regimes[0])

    entries = {
        "train_tokenizer": lambda: jobs.train_tokenizer(config),
        "pretrain": lambda: jobs.pretrain(config),
        "evaluate": lambda: evaluate(open_run(config.run_dir, None, torch.device("cpu")), "test").metrics,
        "convert": lambda: convert(config.run_dir, folder) and None,
        "from_pretrained": predict,
    }
    metrics: dict[str, Any] = {}
    for entry, call in entries.items():
        seen[entry] = []
        result = call()
        metrics = result if isinstance(result, dict) else metrics
        seen[f"after {entry}"] = [float32_products()]
    return {"seen": seen, "metrics": metrics}


def held_by_engine(engine: Any) -> dict[str, torch.Tensor]:
    """A copy of this rank's weights, buffers, masters and optimiser states."""
    held = {n: getattr(p, "ds_tensor", p).detach().clone() for n, p in engine.module.named_parameters()}
    # DeepSpeed counts tokens for itself, in a buffer that is read by nobody.
    held |= {n: b.clone() for n, b in engine.module.named_buffers() if not n.endswith("tokens_per_expert")}
    for number, (master, state) in enumerate(engine.optimizer.optimizer.state.items()):
        held[f"master {number}"] = master.detach().clone()
        held |= {f"{k} {number}": v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    return held


def pretrain_with_a_rank_that_stops(config_path: Path, overrides: list[str], step: int) -> dict[str, Any]:
    """As `pretrain`; the last rank is stopped by the system after ``step``."""
    from shodh.train.callbacks import StopSignal
    from shodh.train.trainer import Trainer

    after_step = StopSignal.after_step

    def stop(callback: StopSignal, trainer: Trainer) -> None:
        after_step(callback, trainer)
        if trainer.step == step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    StopSignal.after_step = stop  # type: ignore[method-assign]
    return pretrain(config_path, overrides)


def pretrain_with_bad_steps(
    config_path: Path,
    overrides: list[str],
    steps: list[int],
    where: str,
    value: float,
    resume: str | None = None,
    once: bool = False,
) -> dict[str, Any]:
    """As `pretrain`; in some steps the last rank alone has ``value`` in the gradient of a parameter, or as its loss.

    Parameters
    ----------
    where : str
        End of the parameter's name, or ``loss``, or ``target`` for the data of the first sample.
    once : bool
        Not in a step that the run goes back to.
    """
    from shodh.train.operator_task import OperatorTask
    from shodh.train.trainer import Trainer

    bad = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    take_step, loss_of = Trainer._take_step, OperatorTask.loss
    changed: dict[int, list[str]] = {}
    rates: list[float] = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    def step_and_look(trainer: Trainer, *arguments: Any) -> None:
        named = dict(trainer.engine.module.named_parameters())
        chosen = [p for name, p in named.items() if name.endswith(where)][:1]
        now = trainer.step
        if once and trainer.rollbacks:
            steps.clear()
        hooks = [p.register_hook(poison) for p in chosen if bad and now in steps]
        before = held_by_engine(trainer.engine)
        take_step(trainer, *arguments)
        after = held_by_engine(trainer.engine)
        changed[now] = [name for name in before if not torch.equal(before[name], after[name])]
        rates.append(trainer.engine.optimizer.param_groups[0]["lr"])
        for hook in hooks:
            hook.remove()

    def bad_loss(task: OperatorTask, engine: Any, batch: Any, step: int) -> Any:
        if where == "target" and bad and step in steps:
            batch = {**batch, "latents": batch["latents"].clone()}
            batch["latents"][0, -1] = value
        outcome = loss_of(task, engine, batch, step)
        # A number added to the loss has no gradient: only the loss shows it.
        return replace(outcome, loss=outcome.loss + value) if where == "loss" and bad and step in steps else outcome

    Trainer._take_step, OperatorTask.loss = step_and_look, bad_loss  # type: ignore[method-assign]
    seen = pretrain(config_path, overrides, resume)
    return {**seen, "changed": changed, "rates": rates}


def pretrain_with_broken_weights(config_path: Path, overrides: list[str], step: int) -> dict[str, Any]:
    """As `pretrain`; from ``step`` on an expert of the last rank has an infinite weight at the end of a step."""
    from shodh.train.callbacks import Experts
    from shodh.train.trainer import Trainer

    finish = Experts.after_step

    def finish_and_break(experts: Experts, trainer: Trainer) -> None:
        finish(experts, trainer)
        if trainer.step > step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            weight = next(p for n, p in trainer.engine.module.named_parameters() if n.endswith("experts.w2"))
            (weight.ds_tensor if hasattr(weight, "ds_tensor") else weight).data.view(-1)[-1] = torch.inf

    Experts.after_step = finish_and_break  # type: ignore[method-assign]
    return pretrain(config_path, [*overrides, "operator.train.max_skipped_steps=100"])


class HostReads(TorchFunctionMode):
    """Notes what reads values of tensors on the host: ``(file, function)`` of each read."""

    NAMES = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__float__", "__int__", "__index__"}

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "torch/" not in frame.filename]
            self.places.append((frames[-1].filename, frames[-1].name))
        return func(*args, **(kwargs or {}))


def pretrain_counting_reads(config_path: Path, overrides: list[str], step: int) -> dict[str, Any]:
    """As `pretrain`; ``seen["reads"]`` is what `HostReads` notes in one step and in all that happens after it."""
    from shodh.train.callbacks import StopSignal
    from shodh.train.trainer import Trainer

    StopSignal.SECONDS = 3600.0  # However slow the machine, ranks do not meet at every step.
    take, call, reads = Trainer._take_step, Trainer.call, HostReads()

    def take_step(trainer: Trainer, batches: Any) -> None:
        with reads if trainer.step == step else nullcontext():
            take(trainer, batches)

    def after_step(trainer: Trainer, event: str, *arguments: Any) -> None:
        with reads if event == "after_step" and trainer.step == step + 1 else nullcontext():
            call(trainer, event, *arguments)

    Trainer._take_step, Trainer.call = take_step, after_step  # type: ignore[method-assign]
    return {**pretrain(config_path, overrides), "reads": reads.places}


def pretrain_compiled(config_path: Path, overrides: list[str]) -> dict[str, Any]:
    """As `pretrain` with ``compile: on``, by a backend that translates as much and needs no compiler of kernels."""
    from shodh.train import compiling, jobs

    jobs.compile_run = partial(compiling.compile_run, backend="aot_eager")  # type: ignore[assignment]
    return pretrain(config_path, [*overrides, "compile=on"])


def evaluate_run(folder: Path, batch: int) -> dict[str, Any]:
    """The metrics of an evaluation on all ranks, with so many windows a batch."""
    from shodh.evaluate.evaluation import evaluate, open_run
    from shodh.train.runtime import start_distributed

    evaluator = open_run(folder, None, start_distributed())
    settings = evaluator.config.evaluation.model_copy(update={"batch": batch})
    config = evaluator.config.model_copy(update={"evaluation": settings})
    return evaluate(replace(evaluator, config=config), "test").metrics


def ask_who_is_lost(run: Path) -> str | None:
    """Of rank 1 nothing is heard, rank 3 is at work; the others ask, rank 2 a little later."""
    from shodh.core.distributed import rank
    from shodh.train.runtime import start_distributed
    from shodh.train.watchdog import Watchdog

    start_distributed()
    dog = Watchdog(run, 100.0, 0.05, lambda: 7)
    dog.start()
    if rank() in (1, 3):
        if rank() == 1:
            dog.stop()
        time.sleep(6.0)
        dog.stop()
        return None
    time.sleep(0.5 * rank())
    return dog.name_lost()
