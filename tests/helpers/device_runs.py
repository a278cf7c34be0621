"""Configurations of small runs on environments in JAX."""

from impala_jax import Config, config
from impala_jax.config import EvaluatorConfig, LearnerConfig, LoggingConfig, NetworkConfig


def small(num_updates=100, **changes):
    """A run of 4 environments in JAX, 10 steps an update."""
    made = config.replace(
        Config(
            total_frames=40 * num_updates,
            network=NetworkConfig(torso='mlp', mlp_sizes=(16,), lstm_size=8),
            learner=LearnerConfig(batch_size=4, unroll_length=10, num_devices=1),
            evaluator=EvaluatorConfig(episodes=0),
            logging=LoggingConfig(interval_updates=10),
        ),
        {'environment.name': 'jax/catch', 'actor.num_actors': 1, 'actor.num_envs': 4},
    )
    return config.replace(made, {name.replace('__', '.'): value for name, value in changes.items()})
