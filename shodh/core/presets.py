"""Packaged configurations: ``launch/configs`` and ``ds_configs`` of the source tree, found where there is none."""

from __future__ import annotations

from pathlib import Path

#: Links in the source tree, copies in a wheel.
PRESETS = Path(__file__).resolve().parents[1] / "presets"
PLACES = {"configs": ("launch/configs", ".yaml"), "ds_configs": ("ds_configs", ".json")}


def find_preset(path: Path, kind: str) -> Path:
    """A file as it is named; where there is none, the packaged one.

    Parameters
    ----------
    path : Path
        A file, or the name of a packaged one: ``demo``, ``demo.yaml``, ``launch/configs/demo.yaml``.
    kind : {"configs", "ds_configs"}
        What is looked for.
    """
    folder, suffix = PLACES[kind]
    if path.is_file() or path.parent.as_posix() not in (".", folder):
        return path
    packaged = PRESETS / kind / (path.name if path.suffix == suffix else path.name + suffix)
    return packaged if packaged.is_file() else path


def presets() -> str:
    """Names of the packaged configurations."""
    return ", ".join(sorted(path.stem for path in (PRESETS / "configs").glob("*.yaml")))
