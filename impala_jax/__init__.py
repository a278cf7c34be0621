"""IMPALA (Espeholt et al., 2018) in JAX: CPU actors, a trajectory queue, a compiled V-trace learner."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        PBTConfig,
        PopArtConfig,
        ReplayConfig,
        VTraceConfig,
    )
    from impala_jax.evaluation.run_evaluation import evaluate
    from impala_jax.runtimes.run import Interrupted, RunResult, run
    from impala_jax.studies import plotting, tabular

__version__ = '0.2.0'

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
    'PBTConfig',
    'PopArtConfig',
    'ReplayConfig',
    'RunResult',
    'VTraceConfig',
    'evaluate',
    'plotting',
    'run',
    'tabular',
    'vtrace',
]


def __getattr__(name: str) -> Any:
    # On first use: the processes of environments import this package too, and need no JAX.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    modules = {
        **{module: f'impala_jax.studies.{module}' for module in ('plotting', 'tabular')},
        'vtrace': 'impala_jax.vtrace',
    }
    if name in modules:
        return importlib.import_module(modules[name])
    owners = {name: 'impala_jax.runtimes.run' for name in ('Interrupted', 'RunResult', 'run')}
    owners['evaluate'] = 'impala_jax.evaluation.run_evaluation'
    return getattr(importlib.import_module(owners.get(name, 'impala_jax.config')), name)
