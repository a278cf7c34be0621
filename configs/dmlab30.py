"""All 30 levels of DMLab-30 with one network, the settings of the paper (appendix D) and of its released code."""

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
    return Config(
        total_frames=10_000_000_000,
        environment=EnvironmentConfig(name='dmlab30'),
        network=NetworkConfig(torso='deep', core='lstm'),
        loss=LossConfig(entropy_cost=0.0033391318945337044, reward_clip='asymmetric'),
        learner=LearnerConfig(batch_size=32, unroll_length=100),
        optimizer=OptimizerConfig(learning_rate=0.00031866995608948655, epsilon=0.1, max_grad_norm=math.inf),
        actor=ActorConfig(num_actors=30, num_envs=5),  # Five environments a level, as with the paper's 150 actors
        # An evaluation of 30 levels would keep up the training: score the checkpoints with launch/evaluate.py.
        evaluator=EvaluatorConfig(episodes=0),
        # On two busy cores, one environment of each level took 0.4 to 45 s for a reset, and single steps, which load
        # maps, up to 8 s. Five a level that all reset at once, as at the start, may then take 5 x 45 s. Later, all
        # environments of an actor wait for each one's reset: 5 x 45 s in an unroll, and 5 x 8 s for steps. With the
        # steps themselves that is ten minutes for a trajectory, here three times over for slower machines.
        timeout_s=1800,
    )
