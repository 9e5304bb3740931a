"""Checkpoints, and the signals after which one is saved and the run ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from shodh.checkpoint.folder import MANIFEST, read_manifest, tag_of, verify_checkpoint
from shodh.checkpoint.training import CheckpointWriter, SaveError, load_checkpoint
from shodh.config import TrainConfig
from shodh.core import signals
from shodh.core.distributed import SharedError, from_first, gather, rank, together
from shodh.core.errors import ShodhError
from shodh.train.callbacks.selection import reason_to_end
from shodh.train.engine import find_nonfinite
from shodh.train.events import record_event
from shodh.train.metrics import reduce_metrics
from shodh.train.run_folder import RunFolder, describe_environment
from shodh.train.trainer import Best, Callback, Trainer

log = logging.getLogger("shodh")

COUNTS = ("skipped", "skipped_in_row", "passed", "rollbacks")  # of the trainer, that a run goes on with


class StopSignal(Callback):
    """Stop at SIGTERM or SIGUSR1, which schedulers send before the end, to any rank; read at a step's edge.

    To ask all ranks waits for the device. So they meet not after every step, but after as many as take `SECONDS`, at
    least one and at most `STEPS`: a run stops at most so many steps after the signal. One rank alone stops at once.
    """

    SECONDS, STEPS = 1.0, 10

    def __init__(self, run: Path) -> None:
        self._run = run
        self._next = self._last = 0
        self._when = 0.0

    def start(self, trainer: Trainer) -> None:
        signals.hold(f"{self._run} {trainer.step}" if rank() == 0 else "")
        self._next, self._last, self._when = trainer.step + 1, trainer.step, time.perf_counter()

    def after_step(self, trainer: Trainer) -> None:
        asked = float(signals.asked())
        if trainer.topology.world_size > 1:
            trainer.meeting = trainer.step >= self._next
            if not trainer.meeting:
                return
            asked = self._meet(trainer, asked)
        trainer.stopping = asked > 0 and not trainer.finished

    def close(self) -> None:
        signals.release()

    def _meet(self, trainer: Trainer, asked: float) -> float:
        """Whether any rank was asked to stop; sets when the ranks meet again. Collective."""
        now, device = time.perf_counter(), trainer.engine.device
        seconds = (now - self._when) / (trainer.step - self._last)
        answer = reduce_metrics({"stop": (asked, "max"), "seconds": (seconds, "max")}, device)
        self._next = trainer.step + min(self.STEPS, max(1, int(self.SECONDS / answer["seconds"])))
        self._last, self._when = trainer.step, now
        return answer["stop"]


class Checkpoints(Callback):
    """Save every so many steps, after the best validation so far and the last step, and where the run is stopped.

    A save holds the training while this rank's share is copied to host memory; the rest is written beside the steps
    that follow. An error of it ends the run at the next one; or (``train.failed_save: continue``) is reported, and the
    run tries again at the next save. What is saved last must succeed.
    """

    def __init__(self, folder: RunFolder, train: TrainConfig) -> None:
        self._folder, self._every = folder, train.checkpoint_every
        self._writer = CheckpointWriter(folder.path, train.keep_checkpoints)
        self._lenient = train.failed_save == "continue"
        self._environment = describe_environment() if rank() == 0 else {}

    def after_step(self, trainer: Trainer) -> None:
        last = trainer.finished or trainer.stopping
        if trainer.due(self._every) or trainer.improved or last:
            trainer.call("flush")
            with self._failing(trainer, self._lenient):  # Of the save before.
                self._writer.join()
            with self._failing(trainer, self._lenient and not last):
                self.save(trainer)
        elif trainer.meeting:
            with self._failing(trainer, self._lenient):
                self._writer.advance()

    @contextmanager
    def _failing(self, trainer: Trainer, lenient: bool) -> Iterator[None]:
        """Report a save that failed; raises `SaveError`, with the checkpoint that there is, if that ends the run."""
        try:
            yield
        except SaveError as error:
            path = self.newest()
            line = f"{error}; " + ("no checkpoint yet" if path is None else f"the last good checkpoint is {path}")
            if rank() == 0:
                record_event(self._folder.path, "save failed", trainer.step, why=str(error), lenient=lenient)
            if not lenient:
                raise SaveError(line) from error
            log.warning("step %d: %s; the run goes on without this save (failed_save: continue)", trainer.step, line)

    def finish(self, trainer: Trainer) -> None:
        with self._failing(trainer, lenient=False):
            self._writer.join()
        if trainer.stopping:
            log.info("stopped at step %d by a signal; the same command with --resume auto goes on", trainer.step)

    def join(self) -> None:
        """Wait until what was saved is published. Collective; raises `SharedError` if it cannot be."""
        self._writer.join()

    def save(self, trainer: Trainer) -> None:
        """Save this step; raises `SharedError` if a weight is not finite. Collective."""
        averages = [] if trainer.average is None else trainer.average.tensors
        found = find_nonfinite(trainer.engine, [("average of the weights", tensor) for tensor in averages])
        wrong = sorted({name for part in gather(found) for name in part})
        if wrong:
            raise SharedError(
                f"no checkpoint of step {trainer.step} is written: {', '.join(wrong[:5])} not finite; {self.way_back()}"
            )
        record = {
            "state": _state(trainer),
            "topology": _layout(trainer),
            "precision": trainer.train.precision,
            "env": self._environment,
        }
        self._writer.save(trainer.engine, record, trainer.average)

    def newest(self) -> Path | None:
        """The newest checkpoint, once that at work is published, as rank 0 sees it. Collective."""
        with suppress(SaveError):
            self._writer.join()
        tag: str | None = gather(self._folder.latest() if rank() == 0 else None)[0]
        return None if tag is None else self._folder.checkpoints / tag

    def way_back(self) -> str:
        """What to do after a fault: from where the run can go on. Collective."""
        path = self.newest()
        if path is None:
            return "there is no checkpoint yet: look at the data, or lower train.lr, and start again"
        return f"the last good checkpoint is {path}: lower train.lr, and go on with --resume auto"


def go_back(trainer: Trainer, checkpoint: Path) -> None:
    """Take up a checkpoint of the same run again, after steps that could not be taken. Collective."""
    with together():
        verify_checkpoint(checkpoint, (rank(), trainer.topology.world_size))
    trainer.go_back(checkpoint, partial(resume, trainer, checkpoint))


def resume(trainer: Trainer, checkpoint: Path, checkpoints: Path | None = None) -> None:
    """Go on from a checkpoint folder of any layout; raises `CheckpointError` if it does not fit. Collective.

    ``checkpoints``: where the run's own lie, by default beside this one.
    """
    state = read_manifest(checkpoint)["state"]
    if state["seed"] != trainer.seed:
        raise ShodhError(f"{checkpoint} was trained with seed {state['seed']}, and this run has seed {trainer.seed}")
    written = load_checkpoint(trainer.engine, checkpoint, trainer.average)["topology"]
    trainer.step = int(state["step"])
    for count in COUNTS:
        setattr(trainer, count, int(state.get(count, 0)))
    if trainer.usual is not None:
        trainer.usual.load(state.get("usual"))
    log.info("resumed from %s at step %d of %d", checkpoint, trainer.step, trainer.train.steps)
    kept = state.get("ema") is not None
    if trainer.average is not None and not kept:
        log.info("train.ema=%g: the checkpoint has no average of the weights; it starts at these", trainer.train.ema)
    if trainer.average is None and kept:
        log.warning("train.ema=0: the average of the weights that %s holds is not kept on", checkpoint)
    _resume_selection(trainer, state, checkpoint.parent if checkpoints is None else checkpoints)
    before, now = (t["world_size"] * t["micro_batch"] for t in (written, _layout(trainer)))
    if before != now:
        log.warning(
            "%d samples are balanced over the experts at once (ranks x micro_batch), and there were %d until now; "
            "results differ by more than rounding: keep the product to go on as before",
            now,
            before,
        )


def _state(trainer: Trainer) -> dict[str, Any]:
    """What the loop goes on from."""
    state = {k: getattr(trainer, k) for k in ("step", "seed", *COUNTS)}
    if trainer.usual is not None:
        state["usual"] = trainer.usual.state()
    if trainer.average is not None:
        state["ema"] = {"decay": trainer.average.decay, "updates": trainer.average.updates}
    if trainer.train.best is not None:
        best = None if trainer.best is None else asdict(trainer.best)
        state |= {"best": best, "stale": trainer.stale, "ended": trainer.ended}
    return state


def _resume_selection(trainer: Trainer, state: dict[str, Any], checkpoints: Path) -> None:
    """The best validation so far; forgotten where its checkpoint is gone, or it was judged by another measure."""
    config, stored = trainer.train.best, state.get("best")
    if config is None:
        return
    trainer.stale = int(state.get("stale", 0))
    if stored is not None:
        try:
            best = Best(**stored)
        except TypeError as error:
            raise ShodhError(f"a {MANIFEST} in {checkpoints} is damaged: the best is {stored!r}") from error
        at_hand = from_first(lambda: (checkpoints / tag_of(best.step) / MANIFEST).is_file())
        if best.measure == config.measure and at_hand:
            trainer.best = best
        else:
            why = f"it was judged by {best.measure}" if at_hand else "its checkpoint is gone"
            log.warning("step %d, the best so far, does not count any more: %s", best.step, why)
            trainer.stale = 0
    trainer.ended = reason_to_end(trainer, config)
    if trainer.ended is not None:
        log.warning("this run has ended: %s; raise it to train on", trainer.ended)


def _layout(trainer: Trainer) -> dict[str, int]:
    """The layout of ranks that the manifest names."""
    topology = trainer.topology
    return {
        "world_size": topology.world_size,
        "ep_size": topology.ep_size,
        "micro_batch": topology.micro_batch,
        "zero_stage": int(trainer.engine.zero_optimization_stage()),
    }
