"""Configuration of an experiment: frozen dataclasses, validated on construction, with derived values as properties.

Defaults are those of the paper for Atari (Espeholt et al., 2018, appendix G). A file in `configs/` overrides fields for
its experiment, and the command line overrides the file. This package does not import JAX or build environments.
"""

from __future__ import annotations

from impala_jax.config.algorithm import (
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    PBTConfig,
    PopArtConfig,
    ReplayConfig,
    VTraceConfig,
)
from impala_jax.config.checks import ConfigError, closest, import_object
from impala_jax.config.environment import EnvironmentConfig
from impala_jax.config.execution import ActorConfig, CheckpointConfig, EvaluatorConfig, LearnerConfig, LoggingConfig
from impala_jax.config.experiment import Config
from impala_jax.config.fields import get, replace
from impala_jax.config.serialization import differences, from_dict, to_dict, to_flat_dict, upgraded

__all__ = [
    'ActorConfig',
    'CheckpointConfig',
    'Config',
    'ConfigError',
    'EnvironmentConfig',
    'EvaluatorConfig',
    'LearnerConfig',
    'LoggingConfig',
    'LossConfig',
    'NetworkConfig',
    'OptimizerConfig',
    'PBTConfig',
    'PopArtConfig',
    'ReplayConfig',
    'VTraceConfig',
    'closest',
    'differences',
    'from_dict',
    'get',
    'import_object',
    'replace',
    'to_dict',
    'to_flat_dict',
    'upgraded',
]
