"""Configurations of runs that take seconds."""

import dataclasses

from impala_jax.cli.command_line import load_config_file
from impala_jax.config import (
    ActorConfig,
    Config,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LoggingConfig,
    NetworkConfig,
)
from impala_jax.environments import suites
from tests.helpers.programs import ROOT

CONFIGS = ROOT / 'configs'
TASKS = suites.tasks(EnvironmentConfig('minisuite'))


def small(**kwargs):
    """A run on Catch, of ten updates and 400 frames."""
    return Config(
        **(
            {
                'total_frames': 400,
                'environment': EnvironmentConfig(name='catch'),
                'network': NetworkConfig(torso='mlp', mlp_sizes=(8,)),
                'learner': LearnerConfig(batch_size=4, unroll_length=10, num_devices=1),
                'actor': ActorConfig(num_actors=1, num_envs=2),
                'evaluator': EvaluatorConfig(episodes=0),
                'logging': LoggingConfig(interval_updates=5),
            }
            | kwargs
        )
    )


def one_device(name):
    """A shipped configuration on one device, as a person has, and not on the tests' eight."""
    config = load_config_file(str(CONFIGS / name))
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_devices=1))


def small_suite(**changes):
    """A run on the minisuite, of 40 updates and 1,600 frames; each actor has all tasks."""
    config = Config(
        total_frames=1600,
        environment=EnvironmentConfig('minisuite'),
        network=NetworkConfig(torso='mlp', core='lstm', lstm_size=8, mlp_sizes=(8,)),
        learner=LearnerConfig(batch_size=8, unroll_length=10, num_devices=1),
        actor=ActorConfig(num_actors=2, num_envs=4),
        evaluator=EvaluatorConfig(episodes=3, num_envs=2),
        logging=LoggingConfig(interval_updates=5),
    )
    return dataclasses.replace(config, **changes)
