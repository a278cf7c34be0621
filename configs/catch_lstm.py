"""Catch with memory: the ball is visible in the first frame only, so feed-forward agents cannot solve it."""

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
        total_frames=900_000,
        environment=EnvironmentConfig(name='catch_memory'),
        network=NetworkConfig(torso='mlp', core='lstm', lstm_size=64),
        loss=LossConfig(entropy_cost=0.003),
        learner=LearnerConfig(batch_size=32, unroll_length=20),
        optimizer=OptimizerConfig(name='adam', learning_rate=2e-3, epsilon=1e-8),
        actor=ActorConfig(num_actors=2, num_envs=16),
        evaluator=EvaluatorConfig(episodes=100, num_envs=20, interval_s=20.0),
        logging=LoggingConfig(interval_s=1.0),
    )
