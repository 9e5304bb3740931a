"""Save and restore a run in training; every rank writes and reads its own share, at any layout of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from shodh.checkpoint.average import WeightAverage
from shodh.checkpoint.complete import check_there, describe_shared, wait_for
from shodh.checkpoint.folder import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    describe_file,
    make_room,
    partial_folder,
    prune,
    publish,
    read_manifest,
    share_of,
    tag_of,
)
from shodh.checkpoint.optimizer_state import Fragments, check_weights_fit, load_training_state
from shodh.checkpoint.run_files import link_description
from shodh.checkpoint.shares import check_cover, check_masters
from shodh.checkpoint.snapshot import Ranges, Snapshot
from shodh.core.distributed import SharedError, gather, rank, together
from shodh.core.errors import CheckpointError
from shodh.core.files import PARTIAL_SUFFIX, naming, sync_to_disk
from shodh.core.weights import AVERAGED, WEIGHTS, open_file

POLL = 5.0  # seconds after which a rank that waits for a disk meets the others: no collective waits longer


class SaveError(SharedError):
    """A checkpoint could not be written or published; those before it are as they were."""


class CheckpointWriter:
    """Saves a run step by step: copied at once, written by a thread, published when all ranks have written.

    At work is one save at most; the thread never talks to other ranks. What it has done is looked at, and agreed on by
    all ranks, where the training calls `advance`, `save` or `join`, all of which are collective.

    Parameters
    ----------
    run : Path
        The run folder.
    keep : int
        Checkpoints that are left; older ones are dropped.

    Raises
    ------
    SaveError
        From each of the three: a disk is full, a file cannot be written, or rank 0 does not see what another rank
        wrote. What was written is removed; the run's other checkpoints are as they were.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self._run, self._keep = run, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._work: Future[Any] | None = None  # what it gives: `Written`, then nothing
        self._described: list[str] = []  # files that make the folder a whole model, beside the weights
        self._record: dict[str, Any] | None = None  # None: it is being published already

    def save(self, engine: Any, record: dict[str, Any], average: WeightAverage | None = None) -> None:
        """Check and copy this rank's share, once the save before is done; the rest is the thread's.

        Parameters
        ----------
        record : dict
            What the manifest says beside the files: ``state`` of the loop with its ``step``, ``topology`` that wrote,
            and more that JSON can hold.

        Raises
        ------
        SharedError
            Also: the optimiser's weights are not the model's.
        """
        self.join()
        folder = partial_folder(self._run, _tag(record))
        with together():
            check_masters(engine)
        check_cover(engine)
        with self._saving():
            if rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                (folder / OPTIMIZER).mkdir(parents=True)
                self._described = link_description(self._run, folder)
        with self._saving():
            snapshot = Snapshot.take(engine, average)
            if rank() == 0:
                make_room(self._run, snapshot.size)
            wait_for(folder / OPTIMIZER)
        self._record = record
        self._work = self._thread.submit(_write, snapshot, folder)

    def advance(self) -> None:
        """Publish what all ranks have written; fail, on all, where one could not."""
        if self._work is None:
            return
        with self._saving():
            done = self._work.done()
            written = self._work.result() if done else None
        parts = gather((done, written))
        if not all(ready for ready, _ in parts):
            return
        record, self._record = self._record, None
        if record is None:
            self._work = None
            return
        publishing = partial(self._publish, record, [part for _, part in parts]) if rank() == 0 else dict
        self._work = self._thread.submit(publishing)

    def join(self) -> None:
        """Wait until the last save is published."""
        while self._work is not None:
            wait([self._work], POLL)
            self.advance()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """`together`; after an error nothing is left of what was being written."""
        try:
            with together():
                yield
        except SharedError as error:
            work, self._work = self._work, None
            while not all(gather(work is None or work.done())):  # Others may be writing still.
                wait([work] if work is not None else [], POLL)
            if rank() == 0:
                for leftover in (self._run / "checkpoints").glob(f".step_*{PARTIAL_SUFFIX}"):
                    shutil.rmtree(leftover, ignore_errors=True)
            raise SaveError(str(error)) from error

    def _publish(self, record: dict[str, Any], parts: list[Written]) -> None:
        """Nothing is published unless this machine sees all that every rank wrote."""
        folder, tag = partial_folder(self._run, _tag(record)), _tag(record)
        files = {name: entry for part in parts for name, entry in part.own.items()}
        check_there(folder, files)
        for name in parts[0].shared:
            ranges = [r for part in parts for r in part.shared[name]]
            files[name] = describe_shared(folder / name, parts[0].size, ranges)
        files |= {name: describe_file(folder / name) for name in self._described}
        sync_to_disk(folder / OPTIMIZER)
        publish(folder, self._run, tag, {"format": FORMAT, "tag": tag, "files": files, **record})
        prune(self._run, tag, self._keep)


def _tag(record: dict[str, Any]) -> str:
    return tag_of(record["state"]["step"])


class Written(NamedTuple):
    """What a rank wrote: its own file as the manifest says it, and its ranges of the shared ones, of ``size`` bytes."""

    own: dict[str, Any]
    shared: dict[str, Ranges]
    size: int


def _write(snapshot: Snapshot, folder: Path) -> Written:
    own = folder / share_of(rank())
    with naming(folder):
        shared = snapshot.write(folder / WEIGHTS, own)
        return Written({share_of(rank()): describe_file(own)}, shared, snapshot.layout.size)


def load_checkpoint(engine: Any, checkpoint: Path, average: WeightAverage | None = None) -> dict[str, Any]:
    """Restore weights, optimiser and buffers of a fresh engine, whatever layout wrote them; returns the manifest.

    An ``average`` that the checkpoint does not hold starts at the weights that were loaded. Collective. The files were
    compared with the manifest before (`shodh.checkpoint.folder.verify_checkpoint`).

    Raises
    ------
    SharedError
        The checkpoint has no optimiser state, or is of another model.
    """
    with together():
        manifest = read_manifest(checkpoint)
        names = sorted(name for name in manifest["files"] if name.startswith(f"{OPTIMIZER}/"))
        if not names:
            raise CheckpointError(
                f"{checkpoint} holds no state of an optimiser that can be read here (an older version wrote it?); "
                f"start a new run from its weights with --init-from {checkpoint}"
            )
        check_masters(engine)
        fragments = Fragments(checkpoint / name for name in names)
        load_training_state(engine, open_file(checkpoint / WEIGHTS), fragments, checkpoint)
        if average is not None and AVERAGED in manifest["files"]:
            averages = open_file(checkpoint / AVERAGED)
            check_weights_fit(engine, averages, checkpoint)
            average.load(averages, _updates(manifest, checkpoint))
        elif average is not None:
            average.restart()
        engine.global_steps = int(manifest["state"]["step"])
        engine.global_samples = engine.global_steps * engine.train_batch_size()
    return manifest


def _updates(manifest: dict[str, Any], checkpoint: Path) -> int:
    """Steps that are in the average of a checkpoint."""
    try:
        return int(manifest["state"]["ema"]["updates"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: it does not count what is averaged") from error
