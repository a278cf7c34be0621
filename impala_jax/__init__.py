"""IMPALA (Espeholt et al., 2018) in JAX: CPU actors, a trajectory queue, a compiled V-trace learner."""

from impala_jax import vtrace
from impala_jax.config import (
    ActorConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LoggingConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    VTraceConfig,
)
from impala_jax.runtimes.run import Interrupted, RunResult, run

__version__ = '0.1.0'

__all__ = [
    'ActorConfig',
    'CheckpointConfig',
    'Config',
    'ConfigError',
    'EnvironmentConfig',
    'EvaluatorConfig',
    'Interrupted',
    'LearnerConfig',
    'LoggingConfig',
    'LossConfig',
    'NetworkConfig',
    'OptimizerConfig',
    'RunResult',
    'VTraceConfig',
    'run',
    'vtrace',
]
