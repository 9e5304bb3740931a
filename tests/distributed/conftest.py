"""The laboratory: a tiny tokenizer, and runs of the tiny configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from laboratory import Laboratory, make_laboratory


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Laboratory:
    return make_laboratory(tmp_path_factory.mktemp("runs"), write_config)
