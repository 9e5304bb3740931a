"""Writing and reading folders of safetensors, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shodh.core import weights
from shodh.core.errors import CheckpointError
from shodh.core.weights import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    differences,
    load_weights,
    open_weights,
    plan_shards,
    target_dtypes,
    write_file,
    write_weights,
)

HERE = Path("somewhere")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5, 7), "b": (1,), "c": (), "d": (0, 4), "e": (129,)}
    found = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    found["half"] = torch.randn(3, generator=draw).bfloat16()
    found["count"] = torch.arange(5)
    found["flag"] = torch.tensor([True, False, True])
    return found


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(tensor, HERE) for name, tensor in tensors.items()}


def test_the_library_reads_what_is_written(
    tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where tensors are written in many parts."""
    monkeypatch.setattr(weights, "CHUNK", 16)
    done: list[int] = []
    write_file(tmp_path / "w", stored(tensors), target_dtypes(stored(tensors), None), {"note": "text"}, done.append)
    found = load_file(tmp_path / "w")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "w", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "text"}
    assert sum(done) == sum(t.numel() * t.itemsize for t in tensors.values()) and max(done) <= 16 * 8


def test_file_is_that_of_the_library(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Same order and alignment of the values: byte for byte the same data."""
    write_file(tmp_path / "ours", stored(tensors), target_dtypes(stored(tensors), None))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    size = sum(t.numel() * t.itemsize for t in tensors.values())
    assert ours.read_bytes()[-size:] == theirs.read_bytes()[-size:]
    assert (ours.stat().st_size - size) % 8 == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_cast_leaves_integers_and_what_is_kept(
    dtype: torch.dtype, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    dtypes = target_dtypes(stored(tensors), dtype, keep={"e"})
    write_file(tmp_path / "w", stored(tensors), dtypes)
    for name, found in load_file(tmp_path / "w").items():
        kept = name in ("e", "count", "flag")
        assert torch.equal(found, tensors[name] if kept else tensors[name].to(dtype)), name
        assert found.dtype == (tensors[name].dtype if kept else dtype)


def test_fragments_are_one_tensor() -> None:
    whole = torch.randn(4, 6)
    flat = whole.flatten()
    split = StoredTensor((4, 6), (flat[:5], flat[5:6], flat[6:]), HERE)
    assert torch.equal(split.read(), whole)
    assert torch.equal(torch.cat(list(split.chunks(torch.float32))), flat)
    with pytest.raises(CheckpointError, match=r"somewhere.* 23 .*\[4, 6\]"):
        StoredTensor((4, 6), (flat[:5], flat[6:]), HERE)
    with pytest.raises(CheckpointError, match="mixes dtypes"):
        StoredTensor((4, 6), (flat[:5].half(), flat[5:]), HERE)


def test_reading_one_piece_copies_nothing() -> None:
    flat = torch.zeros(6)
    assert StoredTensor((2, 3), (flat,), HERE).read().data_ptr() == flat.data_ptr()


def test_shards_keep_the_order_and_the_limit() -> None:
    sizes = {"a": 4, "b": 4, "c": 3, "d": 20, "e": 1, "f": 10}
    assert plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    assert plan_shards(sizes, 1000) == [list(sizes)]


def test_shards_are_read_back(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = stored(tensors)
    files = write_weights(tmp_path, source, target_dtypes(source, None), max_shard_size=300)
    assert len(files) > 2 and not (tmp_path / WEIGHTS).exists()
    assert not differences(open_weights(tmp_path), source, target_dtypes(source, None))
    total = json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(t.numel() * t.itemsize for t in tensors.values())


def test_difference_is_one_of_bits() -> None:
    """NaN equals itself, minus zero is not zero, a changed bit, shape, dtype or name is found."""
    ours = {"nan": torch.tensor([float("nan"), 1.0]), "zero": torch.tensor([0.0]), "same": torch.ones(2)}
    theirs = {**ours, "zero": torch.tensor([-0.0])}
    dtypes = target_dtypes(stored(ours), None)
    assert differences(stored(ours), stored(ours), dtypes) == []
    assert differences(stored(theirs), stored(ours), dtypes) == ["zero"]
    assert differences(stored({**ours, "same": torch.ones(2, 1)}), stored(ours), dtypes) == ["same"]
    assert differences(stored({**ours, "same": torch.ones(2).double()}), stored(ours), dtypes) == ["same"]
    assert differences(stored({**ours, "more": torch.ones(1)}), stored(ours), dtypes) == ["more"]
    last = torch.tensor([1.0, 1.0 + 2**-23])
    assert differences(stored({**ours, "same": last}), stored(ours), dtypes) == ["same"]


def test_weights_are_mapped_and_not_read(tmp_path: Path) -> None:
    """A file of 64 MB adds next to nothing to what the process has allocated."""
    save_file({"a": torch.zeros(16 * 2**20)}, tmp_path / "w")

    def allocated() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = allocated()
    found = load_weights(tmp_path / "w")
    assert float(found["a"].sum()) == 0.0
    assert allocated() - before < 16 * 1024, "kB"


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights at .*absent"):
        open_weights(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no weights: neither model.safetensors"):
        open_weights(tmp_path)
