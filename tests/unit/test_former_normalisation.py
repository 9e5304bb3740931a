"""A tokenizer's training goes on with the normalisation that it began with, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shodh.config import RunConfig
from shodh.config.reading import config_from_dict
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.strict_json import write_json
from shodh.schema.normalize import FieldNormalizer
from shodh.train.jobs import _normalizer_of_start
from shodh.train.run_folder import RunFolder


def config(**tracer: Any) -> RunConfig:
    fields = [{"name": "tracer", **tracer}, {"name": "solid", "static": True}, {"name": "k", "static": True}]
    return config_from_dict({"name": "r", "data": {"fields": fields, "regimes": [{"name": "r", "path": "d"}]}}, "test")


@pytest.mark.parametrize("name", ["space.json", "tokenizer.json"])
def test_training_goes_on_with_its_own_constants(tmp_path: Path, name: str) -> None:
    fields = [f.build() for f in config(masked_by="solid").data.fields]
    kept = FieldNormalizer(fields, 3, {"r": {"tracer": (3.0, 2.0)}}).to_dict()
    former = {key: value for key, value in kept.items() if key != "version"}
    for content in (kept, former):
        write_json(tmp_path / name, {"normalizer": content})
        found = _normalizer_of_start(config(masked_by="solid"), RunFolder(tmp_path))
        assert found is not None and found.constants == {"r": {"tracer": (3.0, 2.0)}}


def test_a_run_that_did_not_keep_how_it_normalised_masked_fields_is_refused(tmp_path: Path) -> None:
    assert _normalizer_of_start(config(), RunFolder(tmp_path)) is None
    with pytest.raises(CheckpointError, match="normalised tracer otherwise"):
        _normalizer_of_start(config(masked_by="solid"), RunFolder(tmp_path))


def test_a_mask_is_not_scaled() -> None:
    tree = {"name": "solid", "static": True, "static_scale": "zscore"}
    fields = [{"name": "tracer", "masked_by": "solid"}, tree]
    with pytest.raises(ConfigError, match="masked_by 'solid'"):
        config_from_dict({"name": "r", "data": {"fields": fields, "regimes": [{"name": "r", "path": "d"}]}}, "test")
