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
from tests.helpers.programs import ROOT


def small(**kwargs):
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


CONFIGS = ROOT / 'configs'


def one_device(name):
    """A shipped configuration on one device, as a person has, and not on the tests' eight."""
    config = load_config_file(str(CONFIGS / name))
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_devices=1))
