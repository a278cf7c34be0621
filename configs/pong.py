"""Pong from pixels, with settings that get two CPU cores there fastest; `atari.py` has the paper's."""

from impala_jax import (
    ActorConfig,
    Config,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    ReplayConfig,
    VTraceConfig,
)


def get_config() -> Config:
    return Config(
        total_frames=12_000_000,
        environment=EnvironmentConfig(name='atari/pong'),
        network=NetworkConfig(torso='shallow'),
        # Credit for a stroke comes some 40 steps after it.
        learner=LearnerConfig(batch_size=8, unroll_length=40, queue_capacity=8),
        vtrace=VTraceConfig(lambda_=0.95),
        loss=LossConfig(entropy_cost=0.005),
        # Each trajectory is learned from twice, while it is all but on-policy.
        replay=ReplayConfig(fraction=0.5, capacity=256),
        optimizer=OptimizerConfig(learning_rate=6e-4, max_grad_norm=400.0),
        actor=ActorConfig(num_actors=2, num_envs=4),
        evaluator=EvaluatorConfig(episodes=20, num_envs=10, interval_s=1200.0),
    )
