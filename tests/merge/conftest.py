"""Converted folders of a family of real models, tiny and never trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from expert_weights import random_operator
from safetensors.torch import save_file

from shodh.checkpoint.convert import convert
from shodh.checkpoint.description import read_pretrained
from shodh.checkpoint.run_files import write_tokenizer
from shodh.config import RunConfig, dump_config, load_config
from shodh.core.weights import expected_shapes
from shodh.models.factory import build_tokenizer
from shodh.models.init import initialise
from shodh.schema.domain import Domain
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space
from shodh.train.run_folder import RunFolder


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Callable[..., Path]:
    """``make_folder(name, *key, init_from=None, mean=0.0, tokenizer=0, dtype="fp32", **config)``: a converted folder.

    What lies in the run folder is what training leaves there, but for the steps of training.
    """
    root = tmp_path_factory.mktemp("family")

    def make(
        name: str,
        *key: int | str,
        init_from: Path | None = None,
        mean: float = 0.0,
        tokenizer: int = 0,
        dtype: str = "fp32",
        **changes: Any,
    ) -> Path:
        folder = root / name
        folder.mkdir()
        config = load_config(write_config(folder / "config.yaml", name=name, **changes))
        _write_tokenizer(config, mean, tokenizer)
        run = RunFolder(config.run_dir)
        run.path.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in random_operator(config, *key).items()}, run.path / "model.safetensors")
        (run.path / "config.yaml").write_text(dump_config(config))
        run.record_start(None if init_from is None else read_pretrained(init_from)[0].source.sha256)
        convert(run.path / "model.safetensors", folder / "converted", dtype)
        return folder / "converted"

    return make


def _write_tokenizer(config: RunConfig, mean: float, seed: int) -> None:
    folder = config.tokenizer_dir
    folder.mkdir(parents=True)
    model = build_tokenizer(config)
    initialise(model, seed)
    state = model.state_dict()
    fields = [f.build() for f in config.data.fields]
    names = [r.name for r in config.data.regimes]
    constants = {
        name: {f.name: (0.0 if f.kind == "vector" else mean, 1.0) for f in fields if not f.static} for name in names
    }
    domain = Domain(("periodic",) * 3, (1.0, 1.0, 1.0))
    space = Space.of(FieldNormalizer(fields, 3, constants), fields, dict.fromkeys(names, domain))
    write_tokenizer(folder, config, space, {n: state[n] for n in expected_shapes(model)})
