"""The trained run that fine-tuning starts from: its configuration, its weights, and the regimes it is to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shodh.checkpoint.description import is_converted, read_pretrained
from shodh.checkpoint.folder import find_checkpoint, read_manifest
from shodh.checkpoint.run_files import is_tokenizer, write_tokenizer
from shodh.config import RegimeConfig, RunConfig, dump_config
from shodh.core.cli import field_maps, named_paths
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.files import write_atomically
from shodh.data.formats.splits import open_splits
from shodh.routing.probe.windows import describe_regime
from shodh.train.run_folder import RunFolder


@dataclass(frozen=True)
class Base:
    """A trained run: ``weights`` is what `shodh.train.jobs.pretrain` takes as ``init_from``."""

    path: Path
    config: RunConfig
    weights: Path


def open_base(path: Path, checkpoint: str | None = None) -> Base:
    """Open a run folder at a checkpoint (`find_checkpoint`), or a converted folder.

    Raises
    ------
    CheckpointError, ConfigError
        It is neither, it has no such checkpoint, or it holds a tokenizer alone.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a run folder or one of tools/convert_checkpoint.py")
    if is_converted(path):
        description, _ = read_pretrained(path)
        if checkpoint is not None:
            raise CheckpointError(f"{path} is a converted folder, which has no checkpoints; leave out {checkpoint!r}")
        if "operator" not in description.parts:
            raise CheckpointError(f"{path} holds a tokenizer alone; expected an operator")
        return Base(path, description.config, path)
    folder = RunFolder(path)
    config = folder.config()
    if is_tokenizer(path):
        raise CheckpointError(f"{path} is the run of a tokenizer; expected the one of an operator")
    weights = find_checkpoint(path, checkpoint)
    read_manifest(weights)
    return Base(path, config, weights)


def find_tokenizer(base: Base, out: Path) -> Path | None:
    """Run folder of the base's tokenizer; one that travelled with a converted folder is unpacked below ``out``.

    None for an operator on fields.

    Raises
    ------
    CheckpointError
        There is none.
    """
    if not base.config.has_tokenizer:
        return None
    if not is_converted(base.path):
        beside = base.path.parent / base.config.tokenizer_dir.name
        for folder in (base.config.tokenizer_dir, beside):
            if is_tokenizer(folder):
                return folder
        raise CheckpointError(f"no trained tokenizer in {base.config.tokenizer_dir} or {beside}")
    folder = out / "tokenizer"
    if not is_tokenizer(folder):
        _unpack_tokenizer(base, folder)
    return folder


def _unpack_tokenizer(base: Base, folder: Path) -> None:
    description, tensors = read_pretrained(base.path)
    prefix = "tokenizer."
    state = {name.removeprefix(prefix): t.read() for name, t in tensors.items() if name.startswith(prefix)}
    if not state:
        raise CheckpointError(f"{base.path} holds an operator on latents without its tokenizer; convert its run again")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", dump_config(base.config))
    write_tokenizer(folder, base.config, description.space.unconditioned(), state)


def check_regime(regime: RegimeConfig, base: Base) -> None:
    """Refuse a regime that the base has learned."""
    learned = [r.name for r in base.config.data.regimes]
    if regime.name in learned:
        raise ConfigError(f"{base.path} was trained on {learned}; give the unseen regime {regime.name!r} another name")


def regimes_of(settings: Sequence[str], maps: Sequence[str], base: Base) -> list[RegimeConfig]:
    """The regimes of ``NAME=PATH``, with those of the base's fields that the files have.

    Parameters
    ----------
    maps : sequence of str
        ``NAME.OURS=THEIRS`` where a field has another name in the files.

    Raises
    ------
    ConfigError
        A setting has another form, or the files have fields that the base's vocabulary lacks.
    DataError
        There are no files, or they are damaged.
    """
    paths = named_paths("--regime", settings)
    renamed = field_maps(maps, paths)
    for name, path in paths.items():
        if not path.exists():
            raise ConfigError(f"--regime {name}={path}: it does not exist; expected a folder or file of trajectories")
        _check_vocabulary(name, path, base, set(renamed.get(name, {}).values()))
    return [describe_regime(name, path, base.config.data, renamed.get(name)) for name, path in paths.items()]


def _check_vocabulary(name: str, path: Path, base: Base, mapped: set[str]) -> None:
    files = open_splits(path)["train"]
    known = [f.name for f in base.config.data.fields]
    stored = {} if not files else files[0].fields
    unknown = sorted(f for f, what in stored.items() if not what.static and f not in known and f not in mapped)
    if unknown:
        raise ConfigError(
            f"regime {name!r}: {path} has the fields {unknown}, which the vocabulary of {base.path} lacks ({known}); "
            f"say which of ours they are with --map {name}.OURS=THEIRS, or leave them out in a file for --config "
            "(regimes[..].only)"
        )
