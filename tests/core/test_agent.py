"""The agent: its unroll is its steps, and what its core sees and forgets."""

import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import environments
from impala_jax.actor import Actor
from impala_jax.agent import Agent, dummy_timestep
from impala_jax.build import make_agent
from impala_jax.config import ConfigError, EnvironmentConfig, NetworkConfig
from impala_jax.networks import NetworkOutput
from impala_jax.types import FIRST, MID
from tests.helpers.agents import DICT, FEEDFORWARD, LSTM, STEP_TYPES, VECTOR, A, random_state, random_timesteps, row


@pytest.mark.parametrize(
    'config, spec',
    [(FEEDFORWARD, VECTOR), (LSTM, VECTOR), (NetworkConfig('shallow', core='lstm', lstm_size=8), DICT)],
    ids=['feedforward', 'lstm', 'lstm_of_a_dict'],
)
def test_unroll_is_t_times_step(config, spec):
    agent = make_agent(config, spec)
    params = agent.init(jax.random.PRNGKey(0))
    timesteps = random_timesteps(spec)
    T, B = STEP_TYPES.shape
    initial_state = random_state(agent, B)

    output, last_state = jax.jit(agent.unroll)(params, timesteps, initial_state)
    assert output.logits.shape == (T, B, A)
    assert output.values.shape == (T, B)
    assert output.logits.dtype == output.values.dtype == jnp.float32

    step = jax.jit(agent.step)
    state = initial_state
    for t in range(T):
        acted = step(params, jax.random.PRNGKey(t), row(timesteps, t), state)
        assert acted.action.shape == (B,)
        assert acted.action.dtype == jnp.int32
        np.testing.assert_allclose(acted.logits, output.logits[t], rtol=1e-5, atol=1e-5)
        state = acted.state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state, last_state)


def test_the_state_is_reset_before_an_episodes_first_step():
    """What was before FIRST changes nothing from there on; what was before MID or LAST does."""
    agent = make_agent(LSTM, VECTOR)
    params = agent.init(jax.random.PRNGKey(0))
    timesteps = random_timesteps(VECTOR)
    B = STEP_TYPES.shape[1]
    unroll = jax.jit(agent.unroll)
    a, _ = unroll(params, timesteps, random_state(agent, B, seed=1))
    b, _ = unroll(params, timesteps, random_state(agent, B, seed=2))
    same = (np.asarray(a.logits) == np.asarray(b.logits)).all(axis=-1)
    np.testing.assert_array_equal(same, np.logical_or.accumulate(STEP_TYPES == FIRST))

    # And as if the unroll had begun there.
    for i in range(B):
        for start in np.flatnonzero(STEP_TYPES[:, i] == FIRST):
            tail = jax.tree.map(lambda x, start=start, i=i: x[start:, i : i + 1], timesteps)
            alone, _ = unroll(params, tail, agent.initial_state(1))
            np.testing.assert_allclose(a.logits[start:, i : i + 1], alone.logits, rtol=1e-5, atol=1e-6)


def test_the_core_sees_the_last_action_and_the_clipped_reward():
    agent = make_agent(LSTM, VECTOR)
    params = agent.init(jax.random.PRNGKey(0))
    timesteps = random_timesteps(VECTOR)
    state = random_state(agent, STEP_TYPES.shape[1])
    unroll = jax.jit(agent.unroll)

    def logits(**changes):
        return np.asarray(unroll(params, timesteps._replace(**changes), state)[0].logits)

    def changed(step, **changes):
        different = (logits(**changes) != logits(**before)).any(axis=-1)
        assert not different[:step].any()
        return different[step]

    for step in range(len(STEP_TYPES)):
        # At FIRST neither is seen: there was no action, and a reward would be the episode's before.
        seen = STEP_TYPES[step] != FIRST
        before = {}
        action, reward = timesteps.previous_action.copy(), timesteps.reward.copy()
        action[step] = (action[step] + 1) % A
        np.testing.assert_array_equal(changed(step, previous_action=action), seen)
        reward[step] = 0.123
        np.testing.assert_array_equal(changed(step, reward=reward), seen)
        before, clipped = {'reward': reward.copy()}, reward.copy()
        before['reward'][step], clipped[step] = 1, 7.5
        assert not changed(step, reward=clipped).any()


def test_without_a_core_there_is_no_state():
    agent = make_agent(FEEDFORWARD, VECTOR)
    assert agent.initial_state(3) == ()
    _, state = agent.unroll(agent.init(jax.random.PRNGKey(0)), random_timesteps(VECTOR), ())
    assert state == ()


def test_actions_are_sampled_from_the_logits():
    """With the frequencies of softmax(logits), at temperature 1; or the most likely one, where greedy."""
    agent = make_agent(FEEDFORWARD, VECTOR)
    params = agent.init(jax.random.PRNGKey(0))
    params['params']['policy']['bias'] = jnp.log(jnp.array([0.1, 0.2, 0.6, 0.1]))
    timestep = dummy_timestep(VECTOR, 20_000)
    acted = agent.step(params, jax.random.PRNGKey(1), timestep, ())
    frequencies = np.bincount(acted.action, minlength=A) / 20_000
    np.testing.assert_allclose(frequencies, jax.nn.softmax(acted.logits[0]), atol=0.015)
    np.testing.assert_allclose(frequencies, [0.1, 0.2, 0.6, 0.1], atol=0.015)
    other = agent.step(params, jax.random.PRNGKey(2), timestep, ())
    assert (np.asarray(acted.action) != np.asarray(other.action)).any()
    assert (np.asarray(agent.step(params, jax.random.PRNGKey(1), timestep, (), greedy=True).action) == 2).all()


def test_with_popart_there_is_a_value_for_each_task():
    spec = VECTOR._replace(tasks=('a', 'b', 'c'))
    for popart, shape in ((True, (1, 2, 3)), (False, (1, 2))):
        agent = make_agent(FEEDFORWARD, spec, popart)
        timesteps = random_timesteps(spec, np.full([1, 2], MID, np.int32))
        assert agent.unroll(agent.init(jax.random.PRNGKey(0)), timesteps, ())[0].values.shape == shape
    single = make_agent(FEEDFORWARD, VECTOR, True)
    timesteps = random_timesteps(VECTOR, np.full([1, 2], MID, np.int32))
    assert single.unroll(single.init(jax.random.PRNGKey(0)), timesteps, ())[0].values.shape == (1, 2, 1)


def test_an_empty_trajectory_is_like_those_of_actors():
    """Leaf for leaf: a host that has nothing to learn from takes part in an update that was compiled for these."""
    environment = environments.make(EnvironmentConfig('catch'), 3, seed=0)
    agent = make_agent(LSTM, environment.spec)
    trajectory = Actor(agent, environment, 5, seed=0).unroll(0, agent.init(jax.random.PRNGKey(0)))
    environment.close()
    empty = agent.empty_trajectory(5, 3)
    assert jax.tree.structure(empty) == jax.tree.structure(trajectory) == agent.trajectory_structure()
    for a, b in zip(jax.tree.leaves(empty), jax.tree.leaves(trajectory), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


class Returns(nn.Module):
    """A network that returns what a function makes of timesteps and state."""

    make: Callable

    def __call__(self, timesteps, state):
        return self.make(jnp.zeros([*timesteps.reward.shape, A]), jnp.zeros(timesteps.reward.shape), state)


@pytest.mark.parametrize(
    'make, problem',
    [
        (lambda x, v, state: NetworkOutput(x, v), 'a value of type NetworkOutput; return a tuple of a NetworkOutput'),
        (lambda x, v, state: (x, v), r'a value of type tuple of Array, Array; return a tuple of a NetworkOutput'),
        (lambda x, v, state: (NetworkOutput(x[..., 1:], v), state), r'logits of float32 .*return float32 \[1, 3, 4\]'),
        (lambda x, v, state: (NetworkOutput(x, x), state), r'values of float32 .*return float32 \[1, 3\]'),
        (lambda x, v, state: (NetworkOutput(x.astype(jnp.bfloat16), v), state), 'logits of bfloat16'),
        (lambda x, v, state: (NetworkOutput(x, v), v), r'the state float32 .* for the state \(\)'),
    ],
)
def test_a_network_that_returns_something_else_is_refused_in_one_line(make, problem):
    agent = Agent(Returns(make), VECTOR)
    with pytest.raises(ConfigError) as error:
        agent.step({}, jax.random.PRNGKey(0), dummy_timestep(VECTOR, 3), ())
    assert re.fullmatch(f'the network Returns returned {problem}.*', str(error.value))  # In one line.
