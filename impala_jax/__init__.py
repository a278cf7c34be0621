"""IMPALA (Espeholt et al., 2018) in JAX: actors on CPUs, a trajectory queue, and a compiled V-trace learner."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from impala_jax import environments, networks, vtrace
    from impala_jax.actor import Actor
    from impala_jax.agent import Agent
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
    from impala_jax.learner import Learner
    from impala_jax.loss import ImpalaLoss, LossDetails
    from impala_jax.networks import NetworkOutput
    from impala_jax.optimizer import Hyperparameters
    from impala_jax.runtimes.run import Interrupted, RunResult, run
    from impala_jax.studies import plotting, statistics, tabular
    from impala_jax.types import EnvironmentSpec, Experience, TimeStep, Trajectory

__version__ = '0.2.0'

__all__ = [
    'Actor',
    'ActorConfig',
    'Agent',
    'CheckpointConfig',
    'Config',
    'ConfigError',
    'EnvironmentConfig',
    'EnvironmentSpec',
    'EvaluatorConfig',
    'Experience',
    'Hyperparameters',
    'ImpalaLoss',
    'Interrupted',
    'Learner',
    'LearnerConfig',
    'LoggingConfig',
    'LossConfig',
    'LossDetails',
    'NetworkConfig',
    'NetworkOutput',
    'OptimizerConfig',
    'PBTConfig',
    'PopArtConfig',
    'ReplayConfig',
    'RunResult',
    'TimeStep',
    'Trajectory',
    'VTraceConfig',
    'environments',
    'evaluate',
    'networks',
    'plotting',
    'run',
    'statistics',
    'tabular',
    'vtrace',
]

# Public names, keyed by the modules that define them.
_OWNERS = {
    'impala_jax.actor': 'Actor',
    'impala_jax.agent': 'Agent',
    'impala_jax.config': (
        'ActorConfig CheckpointConfig Config ConfigError EnvironmentConfig EvaluatorConfig LearnerConfig LoggingConfig '
        'LossConfig NetworkConfig OptimizerConfig PBTConfig PopArtConfig ReplayConfig VTraceConfig'
    ),
    'impala_jax.evaluation.run_evaluation': 'evaluate',
    'impala_jax.learner': 'Learner',
    'impala_jax.loss': 'ImpalaLoss LossDetails',
    'impala_jax.networks': 'NetworkOutput',
    'impala_jax.optimizer': 'Hyperparameters',
    'impala_jax.runtimes.run': 'Interrupted RunResult run',
    'impala_jax.types': 'EnvironmentSpec Experience TimeStep Trajectory',
}
_MODULES = {
    'environments': 'impala_jax.environments',
    'networks': 'impala_jax.networks',
    'plotting': 'impala_jax.studies.plotting',
    'statistics': 'impala_jax.studies.statistics',
    'tabular': 'impala_jax.studies.tabular',
    'vtrace': 'impala_jax.vtrace',
}
_OWNER = {name: owner for owner, names in _OWNERS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    # Imports on first use, because the processes of environments import this package without JAX.
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _OWNER:
        return getattr(importlib.import_module(_OWNER[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return __all__
