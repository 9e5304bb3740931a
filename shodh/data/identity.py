"""What a run learned from: the files of each regime, their sizes and contents, and the split of every trajectory.

The record (`RECORD`) lies in the run folder. A run that goes on, or is evaluated, has the same files and the same split
or is refused; files that came after it are left out. A new run that starts from a trained one keeps the split of every
file that this one knows, wherever the file lies by then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shodh.data.formats.fingerprints import fingerprint
from shodh.data.formats.splits import SPLITS, Former, Split, data_folder, find_files, list_files
from shodh.data.formats.views import FileView
from shodh.data.source import RegimeSource
from shodh.core.errors import DataError
from shodh.core.files import write_atomically
from shodh.core.reading import read_json
from shodh.core.strict_json import dumps

log = logging.getLogger("shodh")

RECORD = "data.json"
# From a regime's name and path: the splits that its files keep, and files that are left out.
Choose = Callable[[str, Path], tuple[Former, Sequence[Path]]]


def describe_source(source: RegimeSource) -> dict[str, Any]:
    """``{file below the regime's folder: {bytes, content, train: [...], valid: [...], test: [...]}}``.

    Trajectories by their numbers in the file; of one that is split in time, ``frames: {split: [first, end]}``.
    """
    if source.described is not None:
        return source.described
    folder = data_folder(source.path)
    files: dict[str, Any] = {}
    for split in SPLITS:
        for file in source.all_files[split]:
            entry = files.setdefault(file.path.relative_to(folder).as_posix(), fingerprint(file.path))
            if isinstance(file, FileView) and file.is_part_in_time:
                entry.setdefault("frames", {})[split] = [file.frames.start, file.frames.stop]
            else:
                entry[split] = list(file.trajectories if isinstance(file, FileView) else range(file.num_trajectories))
    return files


class DataRecord:
    """The record of a run: ``{regime: describe_source}``."""

    def __init__(self, regimes: Mapping[str, Mapping[str, Any]], owner: Path) -> None:
        self.regimes, self.owner = regimes, owner

    @classmethod
    def of(cls, sources: Iterable[RegimeSource], owner: Path) -> DataRecord:
        return cls({source.name: describe_source(source) for source in sources}, owner)

    @classmethod
    def load(cls, run: Path) -> DataRecord | None:
        """The record in a run folder; None where there is none: a run of an older version.

        Raises
        ------
        DataError
            It is damaged.
        """
        path = run / RECORD
        if not path.is_file():
            return None
        try:
            content = read_json(path, "record of a run's data", DataError)["regimes"]
            for entry in (entry for files in content.values() for entry in files.values()):
                _former(entry), _content_key(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is damaged; expected the files of each regime ({error!r})") from error
        return cls(content, run)

    def save(self) -> None:
        """Write it into the run folder."""
        regimes = [
            f"{dumps(name)}: {{\n" + ",\n".join(f"  {dumps(f)}: {dumps(e)}" for f, e in files.items()) + "}"
            for name, files in self.regimes.items()
        ]
        write_atomically(self.owner / RECORD, '{"version": 1, "regimes": {\n' + ",\n".join(regimes) + "}}\n")

    def kept(self, regime: str, path: Path) -> tuple[Former, list[Path]]:
        """`Choose` for the same run: its files as they were; those that are new are left out, and said.

        Raises
        ------
        DataError
            A file is missing or changed; names it.
        """
        if regime not in self.regimes:
            return {}, []
        folder = data_folder(path)
        former: dict[Path, Any] = {}
        for name, entry in self.regimes[regime].items():
            file = folder / name
            if not file.is_file():
                raise self._changed(regime, file, "is missing")
            now = fingerprint(file)
            if now["bytes"] != entry["bytes"]:
                raise self._changed(regime, file, f"has {now['bytes']} bytes and had {entry['bytes']}")
            if now["content"] != entry["content"]:
                raise self._changed(regime, file, "has another content, of the same size,")
            former[file] = _former(entry)
        added = [file for file in list_files(path) if file not in former]
        if added:
            names = ", ".join(file.relative_to(folder).as_posix() for file in added[:5])
            log.info("regime %s: %d files are newer than %s and left out (%s%s); its split stays as it was",
                     regime, len(added), self.owner, names, " ..." if len(added) > 5 else "")  # fmt: skip
        return former, added

    def _changed(self, regime: str, file: Path, how: str) -> DataError:
        return DataError(
            f"{file}: {how} since {self.owner} learned regime {regime!r} from it; bring it back, correct the path, or "
            "start a new run with --set name=..."
        )


def inherited(records: Sequence[DataRecord]) -> Choose:
    """`Choose` for a new run that starts from others: files that these know keep their splits, all others are new.

    Raises
    ------
    DataError
        A file that was trained on is called held out now.
    """
    known = {
        _content_key(entry): (entry, record.owner)
        for record in reversed(records)
        for files in record.regimes.values()
        for entry in files.values()
    }
    sizes = {size for size, _ in known}

    def choose(regime: str, path: Path) -> tuple[Former, list[Path]]:
        former: dict[Path, Any] = {}
        for split, files in find_files(path).items():
            for file in (f for f in files if f.stat().st_size in sizes):
                entry, owner = known.get(_content_key(fingerprint(file)), (None, None))
                if entry is None:
                    continue
                if split in ("valid", "test") and ("train" in entry or "train" in entry.get("frames", {})):
                    raise DataError(
                        f"{file}: regime {regime!r} holds it out as {split}, and {owner}, which this run starts from, "
                        "was trained on it; take it out, or start from other weights"
                    )
                former[file] = _former(entry)
        return former, []

    return choose


def _content_key(entry: Mapping[str, Any]) -> tuple[int, str]:
    return int(entry["bytes"]), str(entry["content"])


def _former(entry: Mapping[str, Any]) -> list[Split] | dict[Split, range]:
    if "frames" in entry:
        return {s: range(*entry["frames"][s]) for s in SPLITS if s in entry["frames"]}
    numbered: dict[int, Split] = {int(n): s for s in SPLITS for n in entry.get(s, ())}
    return [numbered[n] for n in range(len(numbered))]
