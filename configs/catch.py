"""Catch (bsuite): a ball falls, a paddle catches it. Solved in under a minute on two cores."""

from impala_jax import (
    ActorConfig,
    Config,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LoggingConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
)


def get_config() -> Config:
    """Returns the configuration."""
    return Config(
        total_frames=600_000,
        environment=EnvironmentConfig(name='catch'),
        network=NetworkConfig(torso='mlp'),
        loss=LossConfig(entropy_cost=0.003),
        learner=LearnerConfig(batch_size=32, unroll_length=20),
        optimizer=OptimizerConfig(name='adam', learning_rate=1e-3, epsilon=1e-8),
        actor=ActorConfig(num_actors=2, num_envs=16),
        evaluator=EvaluatorConfig(episodes=100, num_envs=20, interval_s=10.0),
        logging=LoggingConfig(interval_s=1.0),
    )
