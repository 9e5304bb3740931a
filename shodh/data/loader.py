"""Batches of a mixture, loaded by worker processes: the same ones for any number of workers, from any step on."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from shodh.data.mixture import MixtureSampler, Sample
from shodh.data.ring import Filled, SharedRing
from shodh.core.errors import DataError, ShodhError
from shodh.core.files import SHARED, naming
from shodh.core.signals import heed_parent_alone

Batch = dict[str, torch.Tensor]
#: Of one whose workers could not start there is nothing to shut down, and torch would show a traceback.
_MultiProcessingDataLoaderIter._shutdown = True


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
    workers_of : MixtureLoader, optional
        A loader, not yet iterated, whose workers load these batches too; then its options hold.

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
        workers_of: MixtureLoader | None = None,
    ) -> None:
        _check_fit(datasets, sampler)
        sampler.local_batch(0, rank, world, 0, num_micro)
        self._sampler, self._place, self._num_micro = sampler, (rank, world), num_micro
        options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers > 0:
            options |= {
                "persistent_workers": True,
                "prefetch_factor": prefetch,
                "timeout": timeout,
                "multiprocessing_context": multiprocessing_context,
                "worker_init_fn": _heed_parent_alone,
            }
        self._workers: _Workers = _Workers(options) if workers_of is None else workers_of._workers
        self._stream = self._workers.add(datasets, sampler.global_batch // (world * num_micro))

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Micro-batches of the steps ``start`` .. ``stop - 1``: tensors stacked along a new first axis.

        Of one loader only one iteration can be under way; a new one ends the former. Loaders with the same workers
        take turns: the batches of the last one that began are made first.
        """
        request = self._workers.begin(self._stream, self._orders(start, stop), (stop - start) * self._num_micro)
        try:
            while (batch := self._workers.receive(request)) is not None:
                if isinstance(batch, _Failure):
                    self.close()
                    raise DataError(batch.message)
                yield batch
                del batch  # so that its memory can take the next one
        finally:
            request.drop()

    def close(self) -> None:
        """End the workers, of all loaders that have them; another `iterate` starts new ones."""
        self._workers.close()

    def _orders(self, start: int, stop: int) -> Iterator[_Order]:
        for step in range(start, stop):
            for micro in range(self._num_micro):
                yield _Order(self._sampler.local_batch(step, *self._place, micro, self._num_micro), self._stream)


@dataclass
class _Failure:
    """An error on its way from a worker: an exception would arrive with a traceback for a message."""

    message: str


class _Death(_Failure):
    """The end of a worker, whatever it was at work on."""


class _Order(list[Sample]):
    """The samples of a batch, the stream they are of, and the slot of the ring to put them into, if one is free."""

    def __init__(self, samples: Iterable[Sample] = (), stream: int = 0) -> None:
        super().__init__(samples)
        self.stream = stream
        self.slot: int | None = None


@dataclass(eq=False)
class _Request:
    """An iteration of a loader: what it has yet to order, and what came while another one was waited for."""

    stream: int
    orders: Iterator[_Order]
    left: int  # batches that its loader has yet to get
    held: deque[Batch | _Failure] = field(default_factory=deque)

    def drop(self) -> None:
        self.orders, self.left = iter(()), 0
        self.held.clear()


class _Workers:
    """A DataLoader and its worker processes, at work for one or several loaders; also its batch sampler."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._dataset = _Mixture()
        self._requests: list[_Request] = []  # the last one that began first
        self._sent: deque[_Request] = deque()  # whose batches come next: in the order in which they were ordered
        self._loader: DataLoader[Any] | None = None
        self._batches: Iterator[Any] | None = None
        self._batch_sizes: list[int] = []

    def add(self, datasets: Sequence[SampleDataset], batch_size: int) -> int:
        """A further stream of samples, before the workers start; returns its number."""
        assert self._loader is None, "the workers are at work already"
        self._dataset.streams.append(list(datasets))
        self._batch_sizes.append(batch_size)
        return len(self._batch_sizes) - 1

    def begin(self, stream: int, orders: Iterator[_Order], count: int) -> _Request:
        for former in (r for r in self._requests if r.stream == stream):
            former.drop()
        request = _Request(stream, orders, count)
        self._requests = [request, *(r for r in self._requests if r.left)]
        return request

    def receive(self, request: _Request) -> Batch | _Failure | None:
        """The next batch of a request; None when it has them all."""
        while request.left and not request.held:
            if self._batches is None:
                self._batches = self._start()
            batch = _next(self._batches)
            if batch is None:  # All orders that there were are done; later ones need a new iteration.
                self._batches = None
                continue
            if isinstance(batch, _Death):
                return batch
            owner = self._sent.popleft()
            if owner.left:
                owner.held.append(batch)
            del batch
        if not request.left:
            return None
        request.left -= 1
        return request.held.popleft()

    def close(self) -> None:
        for request in self._requests:
            request.drop()
        self._requests, self._loader, self._batches, self._dataset.ring = [], None, None, None

    def __iter__(self) -> Iterator[_Order]:
        self._sent.clear()
        if self._dataset.ring is not None:
            self._dataset.ring.reset()  # the DataLoader has waited for the workers to end the former iteration
        while (found := self._next_order()) is not None:
            request, order = found
            if self._dataset.ring is not None and self._fits_ring(order.stream):
                order.slot = self._dataset.ring.lend()
            self._sent.append(request)
            yield order

    def _next_order(self) -> tuple[_Request, _Order] | None:
        for request in self._requests:
            if (order := next(request.orders, None)) is not None:
                return request, order
        return None

    def _start(self) -> Iterator[Any]:
        if self._loader is None:
            self._dataset.ring = self._make_ring()
            self._loader = DataLoader(self._dataset, batch_sampler=self, collate_fn=_keep, **self._options)  # type: ignore[arg-type]
        with naming(Path(SHARED)):  # Where semaphores lie, too.
            return iter(self._loader)

    def _make_ring(self) -> SharedRing | None:
        """Memory for the batches that workers hold ready, the one that is being used, and the one before it."""
        shapes = self._dataset.tensor_shapes(0)
        if not self._options["num_workers"] or shapes is None:
            return None
        slots = self._options["num_workers"] * self._options["prefetch_factor"] + 2
        return SharedRing({name: (self._batch_sizes[0], *shape) for name, shape in shapes.items()}, slots)

    def _fits_ring(self, stream: int) -> bool:
        shapes = self._dataset.tensor_shapes
        return self._batch_sizes[stream] == self._batch_sizes[0] and shapes(stream) == shapes(0)


class _Mixture(Dataset[dict[str, Any] | _Failure]):
    def __init__(self) -> None:
        self.streams: list[list[SampleDataset]] = []
        self._buffers = _Buffers()
        self.ring: SharedRing | None = None

    def _item(self, stream: int, sample: Sample) -> dict[str, Any] | _Failure:
        regime, index = sample
        try:
            return self.streams[stream][regime][index]
        except ShodhError as error:
            return _Failure(str(error))

    def tensor_shapes(self, stream: int) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the tensors of a sample; None if the datasets cannot write into given ones, or differ."""
        shapes = [getattr(dataset, "tensor_shapes", None) for dataset in self.streams[stream]]
        return shapes[0] if all(s == shapes[0] for s in shapes) else None

    def __getitems__(self, order: _Order) -> Batch | Filled | _Failure:
        """A batch; datasets that can write into its tensors do so, and nothing is copied."""
        shapes = self.tensor_shapes(order.stream)
        if shapes is None:
            return _collate([self._item(order.stream, sample) for sample in order])
        if order.slot is not None and self.ring is not None:
            batch = self.ring.tensors(order.slot)
        else:
            batch = {name: self._buffers.take((len(order), *shape)) for name, shape in shapes.items()}
        rest: list[dict[str, Any]] = []
        for row, (regime, index) in enumerate(order):
            target = {name: tensor[row] for name, tensor in batch.items()}
            try:
                item = self.streams[order.stream][regime].read_into(index, target)  # type: ignore[attr-defined]
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


def _heed_parent_alone(_: int) -> None:
    """Schedulers send SIGTERM and SIGUSR1 to all processes of a job; the last step still needs its batches."""
    heed_parent_alone()


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
    """The next batch; the death of a worker becomes a `_Death`, the end of the iteration None."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):  # raised by code within a worker: a bug, which keeps its traceback
            raise
        reason = str(error).strip().splitlines()[0]
    return _Death(
        f"a data worker was killed or is stuck (out of memory or of /dev/shm, slow disk?); use fewer workers: {reason}"
    )
