"""Actors as runs make them."""

import jax
import numpy as np
import pytest

import impala_jax
from impala_jax import environments
from impala_jax.actor import Actor
from impala_jax.build import make_agent
from impala_jax.config import ConfigError, EnvironmentConfig
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import host_share
from tests.helpers.configs import TASKS, small_suite


def test_a_trajectory_carries_its_task():
    """Where there are words, it is the task that has them, whatever actor it comes from."""
    config = small_suite(actor=impala_jax.ActorConfig(num_actors=2, num_envs=5))
    agent = make_agent(config.network, environments.spec(config.environment))
    params, ids = agent.init(jax.random.PRNGKey(0)), []
    for index in range(2):
        actor = nodes.make_actor(host_share(config), agent, index)
        trajectory = actor.unroll(0, params)
        with_words = trajectory.timesteps.observation['instruction'].any(axis=(0, 2))
        assert trajectory.task.dtype == np.int32
        np.testing.assert_array_equal(with_words, trajectory.task == TASKS.index('minisuite/go_to_colour'))
        ids += trajectory.task.tolist()
    assert ids == [i % 4 for i in range(10)]
    single = Actor(agent, environments.make(EnvironmentConfig(TASKS[0]), 3, 0), 4, 0)
    assert single.unroll(0, params).task.tolist() == [0, 0, 0]


def test_an_actor_whose_environments_are_not_the_agents_is_refused():
    """As where a suite's spec was found out from one of its tasks, and another one's differs."""
    config = small_suite(environment=EnvironmentConfig('delayed_bandit'))
    agent = make_agent(config.network, environments.spec(EnvironmentConfig('catch')))
    with pytest.raises(
        ConfigError, match="environments of 'delayed_bandit' differ: an actor's have .* the agent knows"
    ):
        nodes.make_actor(host_share(config), agent, 0)
