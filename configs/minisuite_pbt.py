"""Population based training on the minisuite with launch/pbt.py, from learning rates at least ten times too low."""

import dataclasses

import minisuite

from impala_jax import ActorConfig, Config, LearnerConfig, LoggingConfig, OptimizerConfig, PBTConfig


def get_config() -> Config:
    """Returns the configuration."""
    return dataclasses.replace(
        minisuite.get_config(),
        total_frames=300_000,
        learner=LearnerConfig(batch_size=16, unroll_length=20, num_devices=1),
        # The population determines the schedule.
        optimizer=OptimizerConfig(name='adam', schedule='constant'),
        actor=ActorConfig(num_actors=1, num_envs=16),
        logging=LoggingConfig(interval_s=1.0, interval_updates=30),
        pbt=PBTConfig(
            learning_rate=(1e-4, 1e-3),
            entropy_cost=(1e-3, 1e-2),
            epsilon=(1e-8,),
            burn_in_frames=10_000,
            interval_frames=5_000,
            # Three standard errors of the difference between two such fitnesses. With a lower threshold, members that
            # have not begun to learn copy each other by chance, and their hyperparameters follow a random walk.
            threshold=0.2,
            # Larger than in the paper, because there are only about sixty comparisons and not thousands.
            mutation_probability=0.5,
            mutation_factor=2.0,
        ),
    )
