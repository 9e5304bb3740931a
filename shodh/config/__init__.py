"""Typed run configuration: YAML in, unknown keys refused with the nearest match, a resolved copy with every run.

One file describes a whole run: the data, the tokenizer and the operator, so that both training stages, the
evaluation and every tool read the same text. Paths are relative to the working directory.
"""

from shodh.config.base import FileFormat, Section
from shodh.config.data import DataConfig, FieldConfig, RegimeConfig
from shodh.config.experts import BalanceConfig, ExpertsConfig
from shodh.config.operator import FieldSpaceConfig, OperatorConfig, UnrollConfig
from shodh.config.reading import (
    apply_overrides,
    config_from_dict,
    dump_config,
    load_config,
    load_kept_config,
    to_dict,
)
from shodh.config.routers import RouterConfig, TemperatureSchedule
from shodh.config.run import EvaluationConfig, FamilyConfig, FinetuneConfig, ParallelConfig, RunConfig, WatchdogConfig
from shodh.config.tokenizer import TokenizerConfig, TokenizerLoss
from shodh.config.training import BestConfig, SpikeConfig, TrainConfig

__all__ = [
    "BalanceConfig",
    "BestConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExpertsConfig",
    "FamilyConfig",
    "FieldConfig",
    "FieldSpaceConfig",
    "FileFormat",
    "FinetuneConfig",
    "OperatorConfig",
    "ParallelConfig",
    "RegimeConfig",
    "RouterConfig",
    "RunConfig",
    "Section",
    "SpikeConfig",
    "TemperatureSchedule",
    "TokenizerConfig",
    "TokenizerLoss",
    "TrainConfig",
    "UnrollConfig",
    "WatchdogConfig",
    "apply_overrides",
    "config_from_dict",
    "dump_config",
    "load_config",
    "load_kept_config",
    "to_dict",
]
