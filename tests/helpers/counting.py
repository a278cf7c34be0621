"""An environment that counts its timesteps, and actors in it."""

import math

import dm_env
import jax
import numpy as np
from dm_env import specs

from impala_jax import build
from impala_jax.actor import Actor
from impala_jax.build import make_agent
from impala_jax.config import (
    Config,
    LearnerConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
)
from impala_jax.environments.serial import SerialVectorEnvironment

A = 3
SMALL = NetworkConfig('mlp', mlp_sizes=(8,))


class Counting(dm_env.Environment):
    """Every timestep of its life has a number, which it shows; it keeps a record of every transition.

    The reward is `reward(count, action)`. Episodes last `length` steps, and terminate or are truncated by turns.
    """

    def __init__(self, reward, length=4, ends=(dm_env.termination, dm_env.truncation)):
        self.transitions = []  # (number of the timestep before, action, reward)
        self.returns = []
        self._reward = reward
        self._length = length
        self._ends = ends
        self._count = -1
        self._steps = 0

    def reset(self):
        self._count += 1
        self._steps = 0
        self.returns.append(0.0)
        return dm_env.restart(self._observe())

    def step(self, action):
        reward = self._reward(self._count, action)
        self.transitions.append((self._count, action, reward))
        self.returns[-1] += reward
        self._count += 1
        self._steps += 1
        if self._steps < self._length:
            return dm_env.transition(reward, self._observe())
        return self._ends[len(self.returns) % len(self._ends)](reward, self._observe())

    def observation_spec(self):
        return specs.Array((1,), np.float32)

    def action_spec(self):
        return specs.DiscreteArray(A)

    def _observe(self):
        return np.array([self._count], np.float32)


def make_counting(num_envs=2, reward=lambda count, action: 0.01 * count + 0.1 * action, **kwargs):
    """A vector of Counting environments, and the environments themselves; lengths of episodes differ."""
    made = []

    def factory(seed):
        made.append(Counting(reward, **({'length': 4 + len(made)} | kwargs)))
        return made[-1]

    return SerialVectorEnvironment(factory, num_envs, seed=0), made


def make_actor(environment, unroll_length=11, network=NetworkConfig('mlp', mlp_sizes=(4,)), seed=0):  # noqa: B008
    """An actor in the environment, and parameters."""
    agent = make_agent(network, environment.spec)
    return Actor(agent, environment, unroll_length, seed), agent.init(jax.random.PRNGKey(seed))


def cut(trajectory, start, stop):
    """Transitions `start` to `stop`, as a trajectory of their own; without a recurrent core."""
    return trajectory._replace(
        timesteps=jax.tree.map(lambda x: x[start : stop + 1], trajectory.timesteps),
        behaviour_logits=trajectory.behaviour_logits[start:stop],
        info=jax.tree.map(lambda x: x[start:stop], trajectory.info),
        game_version=trajectory.game_version[start:stop],
    )


def make_counting_learner(num_envs=8, devices=None, unroll_length=5, loss=LossConfig(), learning_rate=1e-2):  # noqa: B008
    """A learner, an actor of Counting environments whose trajectories fit it, and parameters."""
    environment, _ = make_counting(num_envs)
    actor, params = make_actor(environment, unroll_length, SMALL)
    config = Config(
        total_frames=100 * num_envs * unroll_length,
        network=SMALL,
        loss=loss,
        learner=LearnerConfig(batch_size=num_envs, unroll_length=unroll_length),
        optimizer=OptimizerConfig(learning_rate=learning_rate, max_grad_norm=math.inf),
    )
    return build.make_learner(config, make_agent(SMALL, environment.spec), devices), actor, params
