"""Tasks that a CPU core trains on in seconds, and games of MinAtar, for the grids in this folder."""

import math

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
from impala_jax.config import replace


def task(name: str, total_frames: int) -> Config:
    """Returns the configuration of a task."""
    return Config(
        total_frames=total_frames,
        environment=EnvironmentConfig(name=name, processes=int(name.startswith('gymnasium/'))),
        network=NetworkConfig(torso='mlp'),
        loss=LossConfig(entropy_cost=0.003),
        learner=LearnerConfig(batch_size=8, unroll_length=10, num_devices=1),
        optimizer=OptimizerConfig(name='adam', learning_rate=1e-3, epsilon=1e-8, max_grad_norm=math.inf),
        actor=ActorConfig(num_actors=1, num_envs=4),
        evaluator=EvaluatorConfig(episodes=100, num_envs=20),
        logging=LoggingConfig(interval_updates=100),
    )


CATCH = task('catch', 80_000)  # 9 steps
DELAYED_BANDIT = task('delayed_bandit', 80_000)  # 20 steps
CARTPOLE = task('gymnasium/CartPole-v1', 80_000)  # up to 500 steps
SEEDS = tuple(range(30))
TASKS = {'catch': CATCH, 'delayed_bandit': DELAYED_BANDIT, 'cartpole': CARTPOLE}


def game(name: str) -> Config:
    """Returns the configuration of a game of MinAtar."""
    return replace(
        task(f'jax/minatar/{name}', 300_000),
        {'network.mlp_sizes': (128,), 'learner.batch_size': 32, 'learner.unroll_length': 20, 'loss.entropy_cost': 0.01},
    )


GAMES = {name: game(name) for name in ('breakout', 'space_invaders')}
