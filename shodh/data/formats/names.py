"""What names of files and folders say: words, numbers, and the split that a word states.

A word is a run of letters, and a capital letter begins a new one: ``2D_Transport_periodic`` has the words d, transport
and periodic, ``nsTrain2`` has ns and train. A part of a word never counts.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Literal, get_args

from shodh.core.errors import DataError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Training set, traindata; validation; testing, tests, eval, held-out: joined or apart, in any case.
SPLIT_WORDS: dict[Split, re.Pattern[str]] = {
    "train": re.compile(r"(train|trn)(ing)?(set|data)?"),
    "valid": re.compile(r"(val|valid|validate|validation|validating)(set|data)?"),
    "test": re.compile(r"(test|tst|eval|evaluate|evaluation|evaluating|heldout|holdout)(ing|s)?(set|data)?"),
}


def words(name: str) -> list[str]:
    """The words of a name in lower case, in their order."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def natural_key(name: str) -> tuple[tuple[str, int, str], ...]:
    """Sorts names with numbers by their values: data_2 before data_10."""
    parts = re.findall(r"(\D*)(\d*)", name)
    return tuple((text.lower(), int(digits or -1), text + digits) for text, digits in parts)


def stated_split(name: PurePath) -> Split | None:
    """The split that a path below a data set's folder states, by a word of its folder or of its stem; None: neither.

    A folder decides for the files in it; one called train may not hold a file that calls itself held out.

    Raises
    ------
    DataError
        The words contradict each other.
    """
    by_folder, by_stem = _stated(str(name.parent)), _stated(name.stem)
    if len(by_folder) > 1 or len(by_stem) > 1 or (by_folder and by_stem - {"train"} - by_folder):
        raise DataError(f"{name}: the name states the splits {sorted(by_folder | by_stem)}; rename it to state one")
    return next(iter(by_folder or by_stem), None)


def _stated(text: str) -> set[Split]:
    single = words(text)
    joined = [first + second for first, second in zip(single, single[1:])]
    return {split for split, known in SPLIT_WORDS.items() if any(map(known.fullmatch, (*single, *joined)))}
