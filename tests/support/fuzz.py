"""Damaged files of every format: each must be read, or refused with one line; never a traceback, a hang or a crash.

    python tests/support/fuzz.py --files 1000 --out fuzz.json

Every file is opened, described and read (one snapshot of each field) in a worker process with a limit on its address
space; a worker that is silent for longer than the timeout, or dies, is counted and replaced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import numpy as np
from layouts import LAYOUTS, Fields

from shodh.core.errors import ShodhError
from shodh.data.formats import FORMATS, open_file
from shodh.data.formats.probe import probe

MEMORY = 3 << 30
TIMEOUT = 20.0


def write_well(path: Path, seed: int = 0) -> Fields:
    from shodh.data import write_trajectories
    from shodh.schema.fields import Field, RegimeSchema, Trajectories

    rng = np.random.default_rng(seed)
    schema = RegimeSchema("box", (Field("velocity", "vector"), Field("heat")), ("periodic", "periodic", "wall"))
    values = {
        "velocity": rng.standard_normal((2, 3, 6, 5, 4, 3), dtype=np.float32),
        "heat": rng.standard_normal((2, 3, 6, 5, 4), dtype=np.float32),
    }
    write_trajectories(path, Trajectories(schema, (1.0, 1.0, 1.0), np.arange(3.0), values, {"nu": 0.1}))
    return values


ALL = {"well": ("well", "box.hdf5", write_well), **LAYOUTS}


def truncate(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.random() * len(content))])


def flip_bytes(path: Path, rng: np.random.Generator) -> None:
    """Up to 16 random bytes: half of the time near the front, where the structure is."""
    content = bytearray(path.read_bytes())
    reach = len(content) if rng.random() < 0.5 else min(len(content), 4096)
    for position in rng.integers(0, reach, rng.integers(1, 17)):
        content[position] = rng.integers(256)
    path.write_bytes(content)


def _datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _replace(file: h5py.File, name: str, **kwargs: object) -> None:
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, **kwargs).attrs.update(attributes)


def _edit(change: Callable[[h5py.File, str, np.random.Generator], None]) -> Callable[[Path, np.random.Generator], None]:
    def damage(path: Path, rng: np.random.Generator) -> None:
        if not h5py.is_hdf5(path):
            return flip_bytes(path, rng)
        with h5py.File(path, "r+") as file:
            names = _datasets(file)
            change(file, names[rng.integers(len(names))], rng)
        return None

    return damage


@_edit
def wrong_dtype(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    values = file[name][()]
    kind = ["i4", "u1", "c8", "S5", "f2", "f8", h5py.string_dtype(), [("a", "f4"), ("b", "i2")]][rng.integers(8)]
    kind = np.dtype(kind)
    empty = np.zeros(values.shape, kind) if kind.names or kind.kind == "O" else values.astype(kind)
    _replace(file, name, data=empty) if kind.kind != "O" else _replace(file, name, shape=values.shape, dtype=kind)


@_edit
def not_finite(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    values = np.atleast_1d(file[name][()]).astype(np.float64)
    values.flat[rng.integers(0, values.size, 1 + values.size // 10)] = [np.nan, np.inf, -np.inf][rng.integers(3)]
    _replace(file, name, data=values.reshape(file[name].shape).astype("f4"))


@_edit
def huge_shape(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    shape = list(file[name].shape) or [1]
    shape[rng.integers(len(shape))] = int(10 ** rng.integers(6, 13))
    chunks = tuple(min(n, 64) for n in shape)
    filters = [{}, {"compression": "gzip"}, {"fillvalue": 1}][rng.integers(3)]
    _replace(file, name, shape=tuple(shape), dtype="f4", chunks=chunks, **filters)


@_edit
def huge_chunk(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    shape = file[name].shape or (1,)
    unlimited = tuple(None for _ in shape)
    chunks = (int(2 ** rng.integers(20, 29)), *(1,) * (len(shape) - 1))
    _replace(file, name, shape=shape, dtype="f4", chunks=chunks, maxshape=unlimited, compression="gzip")


@_edit
def swap_names(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    names = _datasets(file)
    other = names[rng.integers(len(names))]
    if other != name:
        file.move(name, "swapped_away")
        file.move(other, name)
        file.move("swapped_away", other)


@_edit
def group_for_dataset(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    del file[name]
    if rng.random() < 0.7:
        file.create_group(name).create_group("deeper")


@_edit
def link_away(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    del file[name]
    kinds = [
        lambda: h5py.ExternalLink("/etc/passwd", "/data"),
        lambda: h5py.ExternalLink(file.filename, "/" + name),
        lambda: h5py.SoftLink("/" + name),
        lambda: h5py.SoftLink("/nowhere"),
    ]
    file[name] = kinds[rng.integers(len(kinds))]()


@_edit
def storage_away(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    shape = file[name].shape or (1,)
    size = int(np.prod(shape)) * 4
    if rng.random() < 0.5:
        _replace(file, name, shape=shape, dtype="f4", external=[("/etc/passwd", 0, size)])
        return
    layout = h5py.VirtualLayout(shape=shape, dtype="f4")
    layout[...] = h5py.VirtualSource("/tmp/elsewhere.h5", "data", shape=shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


@_edit
def damaged_attributes(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    items = [file, *(file[n] for n in _datasets(file)), *(g for g in file.values() if isinstance(g, h5py.Group))]
    items = [i for i in items if len(i.attrs)]
    if not items:
        return
    item = items[rng.integers(len(items))]
    key = list(item.attrs)[rng.integers(len(item.attrs))]
    values = [np.nan, -1, 10**15, "PERIODIC", b"\xff\xfe", np.zeros(0), np.zeros((3, 3)), h5py.Empty("f4"), ["a"] * 9]
    item.attrs[key] = values[rng.integers(len(values))]


DAMAGES: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "truncate": truncate,
    "flip_bytes": flip_bytes,
    "wrong_dtype": wrong_dtype,
    "not_finite": not_finite,
    "huge_shape": huge_shape,
    "huge_chunk": huge_chunk,
    "swap_names": swap_names,
    "group_for_dataset": group_for_dataset,
    "link_away": link_away,
    "storage_away": storage_away,
    "damaged_attributes": damaged_attributes,
}


def examine(path: Path, format: str) -> None:
    """All that a reader does with a file: its header, and one snapshot of each field."""
    probe(path, format, timeout=TIMEOUT / 2)
    file = open_file(path, format)
    if int(np.prod(file.grid, dtype=object)) > 10**8:
        raise AssertionError(f"the grid {file.grid} was believed")
    for name, field in file.fields.items():
        out = np.empty((1, field.num_components(len(file.grid)), *file.grid), dtype=np.float32)
        last = range(file.num_frames - 1, file.num_frames)
        file.read(name, file.num_trajectories - 1, last, out[0] if field.static else out)
    file.close()


def verdict(path: Path, format: str) -> tuple[str, str]:
    try:
        examine(path, format)
    except ShodhError as error:
        text = str(error)
        if "\n" in text or str(path) not in text:
            return "unclear", text
        return "refused", text
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "read", ""


def work(connection: Connection, memory: int) -> None:
    """Worker: paths in, verdicts out."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while (task := connection.recv()) is not None:
        connection.send(verdict(*task))


class Worker:
    """A process that examines files and may die doing so."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, MEMORY))
        self.process.start()
        other.close()

    def examine(self, path: Path, format: str) -> tuple[str, str]:
        self.connection.send((path, format))
        try:
            if self.connection.poll(TIMEOUT):
                return self.connection.recv()
            return "hang", f"silent for {TIMEOUT} s"
        except EOFError:
            self.process.join(5)
            return "crash", f"worker died with {self.process.exitcode}"

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def run(count: int, seed: int, folder: Path, show: Callable[[int], None] = lambda _: None) -> dict[str, object]:
    """Damage and examine ``count`` files; verdicts by format, and every one that is wrong."""
    worker, verdicts, wrong, messages = Worker(), Counter[str](), [], Counter[str]()
    by_damage: dict[str, Counter[str]] = {}
    layouts, damages = list(ALL.items()), list(DAMAGES.items())
    start, isolated = time.monotonic(), 0
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        layout, (format, name, write) = layouts[number % len(layouts)]
        damage, apply = damages[(number // len(layouts)) % len(damages)]
        path = folder / name
        path.unlink(missing_ok=True)
        write(path, number)
        apply(path, rng)
        result, text = worker.examine(path, "auto" if rng.random() < 0.5 else format)
        verdicts[result] += 1
        by_damage.setdefault(damage, Counter())[result] += 1
        if result == "refused":
            messages[text.replace(str(path), "FILE")[:60]] += 1
            isolated += any(word in text for word in ("reading hangs", "reading crashes"))
        elif result != "read":
            wrong.append({"number": number, "layout": layout, "damage": damage, "verdict": result, "text": text[:300]})
        if result in ("hang", "crash"):
            worker.close()
            worker = Worker()
        show(number + 1)
    worker.close()
    return {
        "files": count,
        "seed": seed,
        "formats": list(FORMATS),
        "verdicts": dict(verdicts),
        "by_damage": {d: dict(c) for d, c in by_damage.items()},
        "different_messages": len(messages),
        "hangs_and_crashes_of_the_library_caught": isolated,
        "wrong": wrong,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.files, disable=None) as bar:
        result = run(args.files, args.seed, Path(folder), lambda n: bar.update(n - bar.n) and None)
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.write_text(text)
    sys.stdout.write(text + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
