"""Which data a run may learn from and be measured on: the record of its own folder, and of those it starts from."""

from __future__ import annotations

import logging
from pathlib import Path

from shodh.checkpoint.folder import run_of
from shodh.config import RunConfig
from shodh.data.identity import RECORD, Choose, DataRecord, inherited

log = logging.getLogger("shodh")


def kept_choice(run: Path) -> Choose | None:
    """The files and splits of a run that goes on or is evaluated; None, and a line in the log, for one of old."""
    record = DataRecord.load(run)
    if record is None:
        log.warning(
            "%s has no %s: it is of an older version, and whether its data are the same, and split as they were, "
            "cannot be checked",
            run,
            RECORD,
        )
        return None
    return record.kept


def new_choice(config: RunConfig, init_from: Path | None = None) -> Choose | None:
    """The splits that a new run takes over: of the run that its weights come from, and of its tokenizer."""
    folders = []
    if init_from is not None:
        weights = init_from.absolute()
        checkpoint = weights if weights.is_dir() else weights.parent
        folders += [checkpoint, *([run] if (run := run_of(checkpoint)) is not None else [])]
    if config.has_tokenizer:
        folders.append(config.tokenizer_dir)
    records = [record for folder in folders if (record := DataRecord.load(folder)) is not None]
    return inherited(records) if records else None
