"""Checkpoint folders that are whole or absent: manifest, checksums, publication by a rename, pruning.

``RUN/checkpoints/step_NNNNNNNN/`` holds ``model.safetensors``, ``optimizer/rank_NNNNN.safetensors`` and
``manifest.json``, which lists the others with their sizes and SHA-256. A checkpoint is written into a hidden folder
beside it (``.step_NNNNNNNN.partial``) and takes its name when all of it is on disk. Whatever else lies in
``checkpoints/`` (a copy, a symbolic link) is the user's, and is neither read nor removed.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from shodh.core.errors import CheckpointError
from shodh.core.files import PARTIAL_SUFFIX, WEIGHTS, checksum, sync_to_disk, write_atomically
from shodh.core.reading import read_object, read_text
from shodh.core.strict_json import write_json

log = logging.getLogger("shodh")

MANIFEST = "manifest.json"
LATEST = "latest"
LOCK = ".lock"  # of a run folder, held by the job that writes there
BEST = "best"  # what a user calls the checkpoint that `best_checkpoint` finds
OPTIMIZER = "optimizer"
FORMAT = 2
_TAG = re.compile(r"step_(\d{8,})")
_OLD_SUFFIX = ".old"
_LEFTOVER = re.compile(rf"\.({_TAG.pattern})({re.escape(PARTIAL_SUFFIX)}|{re.escape(_OLD_SUFFIX)})")


# Of a run


def checkpoints_of(run: Path) -> list[Path]:
    """The published checkpoints of a run folder by step; folders that the project did not name are left out."""
    found = (run / "checkpoints").glob("step_*")
    ours = [p for p in found if _TAG.fullmatch(p.name) and not p.is_symlink() and (p / MANIFEST).is_file()]
    return sorted(ours, key=lambda path: int(path.name.removeprefix("step_")))


def checkpoints_before(checkpoint: Path) -> list[Path]:
    """The published checkpoints of the same run with lower steps, by step."""
    found = checkpoints_of(checkpoint.parent.parent)
    return found[: found.index(checkpoint)] if checkpoint in found else []


def published_folders(run: Path) -> list[Path]:
    """What lies under the names of checkpoints in a run folder, damaged ones too."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(p for p in found if _TAG.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that ``latest`` names; where it names none, the newest whole one, which is said; or None."""
    file, folder = run / LATEST, run / "checkpoints"
    try:
        tag = read_text(file, "name of a checkpoint", CheckpointError).strip() if file.is_file() else ""
    except CheckpointError:
        tag = "?"
    if tag and Path(tag).name == tag and _described(folder / tag):
        return folder / tag
    whole = next((path for path in reversed(checkpoints_of(run)) if _is_whole(path)), None)
    if whole is not None:
        what = f"{file} names {tag!r}, which is no whole checkpoint" if tag else f"{file} is missing or empty"
        _warn_once(f"{what}; the newest whole one is taken, {whole.name}")
    return whole


def _described(checkpoint: Path) -> bool:
    try:
        return bool(read_manifest(checkpoint))
    except CheckpointError:
        return False


@cache
def _warn_once(line: str) -> None:
    log.warning(line)


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint that a run's newest one calls the best so far; None where the run keeps none.

    Raises
    ------
    CheckpointError
        It is gone.
    """
    newest = latest_checkpoint(run)
    tag = None if newest is None else best_of(read_manifest(newest))
    if tag is None:
        return None
    best = run / "checkpoints" / tag
    if not (best / MANIFEST).is_file():
        raise CheckpointError(f"the best checkpoint of {run}, {tag}, is gone; name another one")
    return best


def best_of(manifest: dict[str, Any]) -> str | None:
    """Name of the checkpoint that was the best one when this one was saved."""
    best = manifest["state"].get("best")
    try:
        return None if best is None else tag_of(int(best["step"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"a {MANIFEST} is damaged: it calls the step {best!r} the best") from error


def tag_of(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step_{step:08d}"


def find_checkpoint(run: Path, name: str | None) -> Path:
    """The checkpoint of a run that a user means: None the newest, ``best`` (`best_checkpoint`), or a folder's name.

    Raises
    ------
    CheckpointError
        There is none; or a folder of the user is called ``best``, and the run has a best checkpoint, too.
    """
    if name is None:
        newest = latest_checkpoint(run)
        if newest is None:
            raise CheckpointError(f"{run} has no complete checkpoint yet")
        return newest
    path = run / "checkpoints" / name
    if name == BEST:
        best = best_checkpoint(run)
        if best is not None and path.is_dir():
            raise CheckpointError(
                f"{BEST!r} is {best.name}, and a folder {path} of yours, too; name the one by its step, or the other "
                "by a new name"
            )
        if best is None and not path.is_dir():
            raise CheckpointError(
                f"{run} has no best checkpoint: train with train.best in its configuration, or name one of "
                f"{[p.name for p in checkpoints_of(run)]}"
            )
        return best or path
    if not name or name[0] == "." or Path(name).name != name or not path.is_dir():
        raise CheckpointError(f"{run} has no checkpoint {name!r} (there are {[p.name for p in checkpoints_of(run)]})")
    return path


def _is_whole(checkpoint: Path) -> bool:
    """Whether every listed file is there in its size; checksums are not computed."""
    try:
        files = read_manifest(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (CheckpointError, OSError, KeyError, TypeError):
        return False


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None of one that was moved elsewhere."""
    above = checkpoint.absolute().parent
    return above.parent if above.name == "checkpoints" else None


def partial_folder(run: Path, tag: str) -> Path:
    """Where a checkpoint is written before it is published."""
    return run / "checkpoints" / f".{tag}{PARTIAL_SUFFIX}"


def publish(partial: Path, run: Path, tag: str, manifest: dict[str, Any]) -> Path:
    """Give a folder that was written its manifest and its name, and let ``latest`` name it.

    A checkpoint of the same name is replaced; at any moment there is the old one, or the new one, or a hidden one that
    `remove_leftovers` brings back.
    """
    final, old = run / "checkpoints" / tag, run / "checkpoints" / f".{tag}{_OLD_SUFFIX}"
    write_json(partial / MANIFEST, manifest, sort_keys=True)
    if final.exists() or final.is_symlink():
        _remove(old)
        final.rename(old)
    partial.rename(final)
    sync_to_disk(final.parent)
    write_atomically(run / LATEST, tag + "\n")
    _remove(old)
    return final


def prune(run: Path, newest: str, keep: int) -> None:
    """Drop the project's checkpoints with the lowest steps until ``keep`` are left; ``newest`` is among these.

    The one that ``newest`` calls the best stays whatever its step.
    """
    found = checkpoints_of(run)
    best = best_of(read_manifest(run / "checkpoints" / newest))
    old = [p for p in found if p.name != newest][: max(0, len(found) - keep)]
    for path in [p for p in old if p.name != best]:
        _drop(path)


def _drop(checkpoint: Path) -> None:
    # First the name, then the files: a process that is killed leaves no half of a checkpoint under its name.
    hidden = partial_folder(checkpoint.parent.parent, checkpoint.name)
    _remove(hidden)
    checkpoint.rename(hidden)
    _remove(hidden)


def make_room(run: Path, needed: int) -> None:
    """Drop checkpoints, oldest first, until there is room for one of ``needed`` bytes; the newest and the best stay.

    Raises
    ------
    CheckpointError
        There is too little even then; nothing was dropped.
    """
    newest = latest_checkpoint(run)
    best = None if newest is None else best_of(read_manifest(newest))
    old = [path for path in checkpoints_of(run) if path != newest and path.name != best]
    free = shutil.disk_usage(run).free
    sizes = [sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.stat().st_nlink == 1) for path in old]
    if free + sum(sizes) < needed:
        raise CheckpointError(
            f"no disk space left for a checkpoint in {run}: it needs {needed / 2**20:.4g} MiB, and {free / 2**20:.4g} "
            f"are free{', older checkpoints counted' if sizes else ''}; free some, and run the same command again"
        )
    for path, size in zip(old, sizes, strict=True):
        if free >= needed:
            break
        log.warning("%s is dropped early, to make room for the next checkpoint", path)
        _drop(path)
        free += size


def set_aside(run: Path, damaged: Path, newest: Path) -> Path:
    """Take a damaged checkpoint out of the way of ``newest``, the newest whole one, which is kept; its new name."""
    write_atomically(run / LATEST, newest.name + "\n")
    aside = damaged.with_name(f"damaged_{damaged.name}")
    _remove(aside)
    damaged.rename(aside)
    return aside


def remove_leftovers(run: Path) -> None:
    """Remove what killed saves left in a run folder; call it while no other process writes there."""
    for path in (run / "checkpoints").glob(".step_*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = path.with_name(match[1])
        if match[3] == _OLD_SUFFIX and not final.exists():
            path.rename(final)
        else:
            _remove(path)
    for folder in (run, run / "routing"):
        for file in folder.glob(f".*{PARTIAL_SUFFIX}"):
            file.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Of a checkpoint, or another folder of weights


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": checksum(path)}


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """List files of a folder with their sizes and checksums, as a checkpoint does."""
    listed = {str(f.relative_to(folder)): describe_file(f) for f in files}
    write_json(folder / MANIFEST, {"files": listed, "state": {}, "topology": {}}, sort_keys=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder with a manifest is a checkpoint of a training, and not a model alone."""
    return (folder / MANIFEST).is_file() and "step" in read_manifest(folder)["state"]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; raises `CheckpointError` if there is none or it is damaged."""
    path = checkpoint / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        manifest = read_object(path)
        for key in ("files", "state", "topology"):
            manifest[key].items()
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: expected JSON with files, state and topology") from error


def verify_checkpoint(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Compare files with the manifest, every ``share[1]``-th of them from ``share[0]`` on; returns the manifest.

    Raises
    ------
    CheckpointError
        Names the file that is missing, truncated or changed.
    """
    manifest = read_manifest(checkpoint)
    missing = required_files(manifest) - manifest["files"].keys()
    if missing:
        raise CheckpointError(f"{checkpoint / MANIFEST} does not list {', '.join(sorted(missing)[:3])}")
    for name in sorted(manifest["files"])[share[0] :: share[1]]:
        verify_file(checkpoint, name, manifest)
    return manifest


def required_files(manifest: dict[str, Any]) -> set[str]:
    """What a checkpoint must hold: the weights of all ranks and experts, and each rank's share of the optimiser."""
    world = manifest["topology"].get("world_size")
    if manifest.get("format") != FORMAT or not isinstance(world, int):
        return set()  # An older version's, or a model alone.
    return {WEIGHTS, *(share_of(rank) for rank in range(world))}


def share_of(rank: int) -> str:
    """Name of the file that a rank writes in a checkpoint."""
    return f"{OPTIMIZER}/rank_{rank:05d}.safetensors"


def verify_model(folder: Path, unread: Collection[str] = ()) -> None:
    """Compare all files but the optimiser's, and ``unread`` ones, with the manifest. Errors as `verify_checkpoint`."""
    manifest = read_manifest(folder)
    for name in sorted(manifest["files"]):
        if not name.startswith(f"{OPTIMIZER}/") and name not in unread:
            verify_file(folder, name, manifest)


def verify_file(checkpoint: Path, name: str, manifest: dict[str, Any]) -> None:
    """Compare one file with the manifest; raises `CheckpointError` that names it."""
    path = checkpoint / name
    if not path.resolve().is_relative_to(checkpoint.resolve()) or name not in manifest["files"]:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: {name!r} is no file of this checkpoint")
    try:
        size, digest = int(manifest["files"][name]["size"]), str(manifest["files"][name]["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: no size and checksum of {name}") from error
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} is missing")
    if path.stat().st_size != size:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, and {size} were written")
    if checksum(path) != digest:
        raise CheckpointError(f"{path} is damaged: its checksum is not the one that was written")
