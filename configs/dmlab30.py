"""All 30 levels of DMLab-30 with one network, with the settings of the paper (appendix D) and its released code."""

import math

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
        total_frames=10_000_000_000,
        environment=EnvironmentConfig(name='dmlab30'),
        network=NetworkConfig(torso='deep', core='lstm'),
        loss=LossConfig(entropy_cost=0.0033391318945337044, reward_clip='asymmetric'),
        learner=LearnerConfig(batch_size=32, unroll_length=100),
        optimizer=OptimizerConfig(learning_rate=0.00031866995608948655, epsilon=0.1, max_grad_norm=math.inf),
        actor=ActorConfig(num_actors=30, num_envs=5),  # five environments per level, as with the paper's 150 actors
        # Evaluating 30 levels would delay the training; evaluate checkpoints with launch/evaluate.py instead.
        evaluator=EvaluatorConfig(episodes=0),
        # With one environment per level on two busy cores, a reset took 0.4 to 45 s, and steps that load maps took up
        # to 8 s. Five environments per level that reset together, as at the start, may therefore take 5 x 45 s. Later,
        # all environments of an actor wait for each reset: 5 x 45 s per unroll, and 5 x 8 s for steps. With the other
        # steps this is about ten minutes per trajectory; the limit is three times as long for slower machines.
        timeout_s=1800,
    )
