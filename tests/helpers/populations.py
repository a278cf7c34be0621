"""A small population."""

import numpy as np

from impala_jax.config import (
    ActorConfig,
    Config,
    EnvironmentConfig,
    EvaluatorConfig,
    LearnerConfig,
    LoggingConfig,
    NetworkConfig,
    OptimizerConfig,
    PBTConfig,
)

BURN_IN, INTERVAL = 2000, 1000
SMALL = Config(
    total_frames=6000,
    environment=EnvironmentConfig(name='catch'),
    network=NetworkConfig(torso='mlp', mlp_sizes=(8,)),
    learner=LearnerConfig(batch_size=4, unroll_length=10, num_devices=1),
    actor=ActorConfig(num_actors=1, num_envs=4),
    evaluator=EvaluatorConfig(episodes=0),
    logging=LoggingConfig(interval_updates=10),
    optimizer=OptimizerConfig(name='adam'),
    pbt=PBTConfig(burn_in_frames=BURN_IN, interval_frames=INTERVAL, epsilon=(1e-8,)),
)
TEMPLATE = {'learner': {'weights': np.zeros(3, np.float32)}}
