"""Four small tasks with one set of parameters: Catch, Catch with memory, a delayed reward, and instructions."""

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
        environment=EnvironmentConfig(name='minisuite'),
        network=NetworkConfig(torso='mlp', core='lstm', lstm_size=64),
        loss=LossConfig(entropy_cost=0.003),
        learner=LearnerConfig(batch_size=32, unroll_length=20),
        optimizer=OptimizerConfig(name='adam', learning_rate=2e-3, epsilon=1e-8),
        actor=ActorConfig(num_actors=2, num_envs=16),
        evaluator=EvaluatorConfig(episodes=100, num_envs=20, interval_s=30.0),
        logging=LoggingConfig(interval_s=1.0),
    )
