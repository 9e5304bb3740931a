"""Batches of a mixture, loaded by worker processes: the same ones for any number of workers, from any step on."""

from __future__ import annotations

import math
import signal
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from shodh.data.mixture import MixtureSampler, Sample
from shodh.data.ring import Filled, SharedRing
from shodh.core.errors import DataError, ShodhError
from shodh.core.signals import STOPS

Batch = dict[str, torch.Tensor]


class SampleDataset(Protocol):
    """What a mixture is made of: `WindowDataset` or `LatentWindowDataset`."""

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class MixtureLoader:
    """Micro-batches of one rank, in order.

    Parameters
    ----------
    datasets : sequence
        One a regime, in the order of the sampler, with items of equal shape.
    sampler : MixtureSampler
    rank, world : int
        Data-parallel rank and number of ranks.
    num_micro : int
        Micro-batches (gradient accumulation steps) in a step.
    num_workers : int
        Worker processes; 0 loads in this one. They live as long as the loader.
    prefetch : int
        Micro-batches each worker holds ready.
    pin_memory : bool
        Whether batches lie in pinned memory.
    timeout : float
        Seconds after which a worker that gives nothing counts as stuck; 0 waits for ever.
    multiprocessing_context : str, optional
        "fork", "spawn" or "forkserver"; the platform's default if omitted.

    Raises
    ------
    DataError
        If the datasets do not fit the sampler or each other. While iterating: if a sample cannot be read (with the
        message of the reader, whichever process it ran in), or if a worker was killed or is stuck.
    TopologyError
        If the global batch does not divide among ranks and micro-batches.
    """

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        sampler: MixtureSampler,
        *,
        rank: int = 0,
        world: int = 1,
        num_micro: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        timeout: float = 600.0,
        multiprocessing_context: str | None = None,
    ) -> None:
        _check_fit(datasets, sampler)
        sampler.local_batch(0, rank, world, 0, num_micro)
        self._plan = _Plan(sampler, rank, world, num_micro)
        self._dataset = _Mixture(datasets)
        self._options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers > 0:
            self._options |= {
                "persistent_workers": True,
                "prefetch_factor": prefetch,
                "timeout": timeout,
                "multiprocessing_context": multiprocessing_context,
                "worker_init_fn": _ignore_stops,
            }
        self._loader: DataLoader[Any] | None = None

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Micro-batches of the steps ``start`` .. ``stop - 1``: tensors stacked along a new first axis.

        Only one iteration can be under way; a new one ends the former.
        """
        if self._loader is None:
            self._dataset.ring = self._plan.ring = self._make_ring()
            self._loader = DataLoader(self._dataset, batch_sampler=self._plan, collate_fn=_keep, **self._options)
        self._plan.start, self._plan.stop = start, stop
        batches = iter(self._loader)
        while (batch := _next(batches)) is not None:
            if isinstance(batch, _Failure):
                del batches  # the error's traceback must not keep the workers alive
                self.close()
                raise DataError(batch.message)
            yield batch
            del batch  # so that its memory can take the next one

    def close(self) -> None:
        """End the workers; another `iterate` starts new ones."""
        self._loader = self._dataset.ring = self._plan.ring = None

    def _make_ring(self) -> SharedRing | None:
        """Memory for the batches that workers hold ready, the one that is being used, and the one before it."""
        shapes = self._dataset.tensor_shapes()
        if not self._options["num_workers"] or shapes is None:
            return None
        batch = self._plan.batch_size
        slots = self._options["num_workers"] * self._options["prefetch_factor"] + 2
        return SharedRing({name: (batch, *shape) for name, shape in shapes.items()}, slots)


@dataclass
class _Failure:
    """An error on its way from a worker: an exception would arrive with a traceback for a message."""

    message: str


class _Order(list[Sample]):
    """The samples of a batch, and the slot of the ring to put them into, if one is free."""

    slot: int | None = None


@dataclass
class _Plan:
    """Batch sampler of the DataLoader; runs in the main process."""

    sampler: MixtureSampler
    rank: int
    world: int
    num_micro: int
    start: int = 0
    stop: int = 0
    ring: SharedRing | None = None

    @property
    def batch_size(self) -> int:
        """Samples in a micro-batch of a rank."""
        return self.sampler.global_batch // (self.world * self.num_micro)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.num_micro

    def __iter__(self) -> Iterator[_Order]:
        if self.ring is not None:
            self.ring.reset()  # the DataLoader has waited for the workers to end the former iteration
        for step in range(self.start, self.stop):
            for micro in range(self.num_micro):
                order = _Order(self.sampler.local_batch(step, self.rank, self.world, micro, self.num_micro))
                order.slot = self.ring.lend() if self.ring is not None else None
                yield order


class _Mixture(Dataset[dict[str, Any] | _Failure]):
    def __init__(self, datasets: Sequence[SampleDataset]) -> None:
        self.datasets = list(datasets)
        self._buffers = _Buffers()
        self.ring: SharedRing | None = None

    def __getitem__(self, sample: Sample) -> dict[str, Any] | _Failure:
        regime, index = sample
        try:
            return self.datasets[regime][index]
        except ShodhError as error:
            return _Failure(str(error))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the tensors of a sample; None if the datasets cannot write into given ones, or differ."""
        shapes = [getattr(dataset, "tensor_shapes", None) for dataset in self.datasets]
        return shapes[0] if all(s == shapes[0] for s in shapes) else None

    def __getitems__(self, order: _Order) -> Batch | Filled | _Failure:
        """A batch; datasets that can write into its tensors do so, and nothing is copied."""
        shapes = self.tensor_shapes()
        if shapes is None:
            return _collate([self[sample] for sample in order])
        if order.slot is not None and self.ring is not None:
            batch = self.ring.tensors(order.slot)
        else:
            batch = {name: self._buffers.take((len(order), *shape)) for name, shape in shapes.items()}
        rest: list[dict[str, Any]] = []
        for row, (regime, index) in enumerate(order):
            target = {name: tensor[row] for name, tensor in batch.items()}
            try:
                item = self.datasets[regime].read_into(index, target)  # type: ignore[attr-defined]
            except ShodhError as error:
                return _Failure(str(error))
            rest.append({k: v for k, v in item.items() if k not in batch})
        if order.slot is not None and self.ring is not None:
            return self.ring.filled(order.slot, rest)
        return batch | torch.utils.data.default_collate(rest)


class _Buffers:
    """Batch tensors without the cost of fresh memory: an array is taken again once nobody holds a tensor of it.

    In a worker, where they serve if the ring has no free slot, they lie in fresh shared memory: it cannot know when the
    receiving process is done with it.
    """

    KEPT = 4

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], list[tuple[np.ndarray, weakref.ref[np.ndarray]]]] = {}

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised float32 tensor."""
        if torch.utils.data.get_worker_info() is not None:
            return torch.empty(0).set_(torch.UntypedStorage._new_shared(4 * math.prod(shape))).view(shape)  # type: ignore[call-overload]
        kept = self._kept.setdefault(shape, [])
        number = next((n for n, (_, view) in enumerate(kept) if view() is None), len(kept))
        array = kept[number][0] if number < len(kept) else np.empty(shape, dtype=np.float32)
        view = array[...]  # the tensor's storage holds the view, whose death says that the array is free
        if number < self.KEPT:
            kept[number : number + 1] = [(array, weakref.ref(view))]
        return torch.from_numpy(view)


def _collate(items: list[dict[str, Any] | _Failure]) -> Batch | _Failure:
    batch: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, _Failure):
            return item
        batch.append(item)
    return torch.utils.data.default_collate(batch)


def _keep(batch: Any) -> Any:
    """Batches leave the dataset complete; a function of the module, so that workers can be spawned."""
    return batch


def _ignore_stops(_: int) -> None:
    """Schedulers send SIGTERM and SIGUSR1 to all processes of a job; the last step still needs its batches."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _check_fit(datasets: Sequence[SampleDataset], sampler: MixtureSampler) -> None:
    sizes = tuple(len(d) for d in datasets)
    if sizes != sampler.sizes:
        raise DataError(f"the datasets have {list(sizes)} samples, the sampler was made for {list(sampler.sizes)}")
    shapes = [d.sample_shape for d in datasets]
    if len(set(shapes)) > 1:
        raise DataError(
            f"samples of the regimes have different shapes {shapes}; a mixture needs one grid and one list of fields"
        )


def _next(batches: Iterator[Batch | _Failure]) -> Batch | _Failure | None:
    """The next batch; the death of a worker becomes a `_Failure`, the end of the iteration None."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # raised by code within a worker: a bug, which keeps its traceback
            raise
        reason = str(error).strip().splitlines()[0]
    return _Failure(
        f"a data worker was killed or is stuck (out of memory or of /dev/shm, slow disk?); use fewer workers: {reason}"
    )
