"""Pong from pixels, with settings for the fastest training on two CPU cores; `atari.py` has the paper's settings."""

from impala_jax import (
    ActorConfig,
    Config,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
)


def get_config() -> Config:
    """Returns the configuration."""
    return Config(
        total_frames=12_000_000,
        environment=EnvironmentConfig(name='atari/pong'),
        network=NetworkConfig(torso='shallow', centre_filters=True),
        loss=LossConfig(entropy_cost=0.003, entropy_schedule='linear'),
        learner=LearnerConfig(batch_size=4, unroll_length=20, queue_capacity=8),
        optimizer=OptimizerConfig(learning_rate=7e-4, epsilon=1e-8),
        actor=ActorConfig(num_actors=2, num_envs=8),
        evaluator=EvaluatorConfig(episodes=20, num_envs=10, interval_s=900.0),
    )
