"""A tokenizer's training goes on with the normalisation that it began with, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shodh.config import RunConfig, dump_config
from shodh.config.reading import config_from_dict
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.strict_json import write_json
from shodh.schema.domain import Domain
from shodh.schema.normalize import FieldNormalizer
from shodh.train.jobs import _space_of_start


def config(**tracer: Any) -> RunConfig:
    fields = [{"name": "tracer", **tracer}, {"name": "solid", "static": True}, {"name": "k", "static": True}]
    return config_from_dict({"name": "r", "data": {"fields": fields, "regimes": [{"name": "r", "path": "d"}]}}, "test")


@pytest.mark.parametrize("name", ["space.json", "tokenizer.json"])
def test_training_goes_on_with_its_own_constants(tmp_path: Path, name: str) -> None:
    masked = config(masked_by="solid")
    fields = [f.build() for f in masked.data.fields]
    domain = Domain(("periodic",) * 3, (1.0, 1.0, 1.0))
    (tmp_path / "config.yaml").write_text(dump_config(masked))
    save_file({"a": torch.zeros(1)}, tmp_path / "tokenizer.safetensors")
    kept = FieldNormalizer(fields, 3, {"r": {"tracer": (3.0, 2.0)}}).to_dict()
    former = {key: value for key, value in kept.items() if key != "version"}
    for content in (kept, former):
        domains = {"r": domain.to_dict()}
        write_json(tmp_path / name, {"weights": "tokenizer.safetensors", "normalizer": content, "domains": domains})
        found = _space_of_start(masked, tmp_path)
        assert found is not None and found.constants(0) == {"tracer": (3.0, 2.0)}
        assert found.fields == tuple(fields) and found.domains == (domain,)


def test_a_run_that_did_not_keep_how_it_normalised_masked_fields_is_refused(tmp_path: Path) -> None:
    assert _space_of_start(config(), tmp_path) is None
    with pytest.raises(CheckpointError, match="normalised tracer otherwise"):
        _space_of_start(config(masked_by="solid"), tmp_path)


def test_a_mask_is_not_scaled() -> None:
    tree = {"name": "solid", "static": True, "static_scale": "zscore"}
    fields = [{"name": "tracer", "masked_by": "solid"}, tree]
    with pytest.raises(ConfigError, match="masked_by 'solid'"):
        config_from_dict({"name": "r", "data": {"fields": fields, "regimes": [{"name": "r", "path": "d"}]}}, "test")
