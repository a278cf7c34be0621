"""CartPole in JAX is that of Gymnasium, up to the precision of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import environments
from impala_jax.config import EnvironmentConfig
from impala_jax.environments import functional
from impala_jax.environments.functional.cartpole import CartPoleState

pytestmark = pytest.mark.atari  # The marker of tests that need Gymnasium.
TASK = functional.task('jax/cartpole')
RESET, STEP = jax.jit(TASK.reset), jax.jit(TASK.step)
KEY = jax.random.PRNGKey(0)


@pytest.fixture
def other():
    import gymnasium

    environment = gymnasium.make('CartPole-v1')
    environment.reset(seed=0)
    yield environment
    environment.close()


def test_episodes_are_those_of_gymnasium(other):
    """Random actions from the same start; the whole episode is computed without correction."""
    names = ('jax/cartpole', 'gymnasium/CartPole-v1')
    own, twin = (environments.spec(EnvironmentConfig(name)) for name in names)
    assert own == twin
    rng, lengths = np.random.RandomState(0), []
    for episode in range(30):
        state, observation = RESET(jax.random.PRNGKey(episode))
        assert np.abs(observation).max() <= 0.05
        other.reset()
        other.unwrapped.state = np.asarray(observation, np.float64)
        for t in range(1, 500):
            action = rng.randint(2)
            state, arrival = STEP(state, action, KEY)
            expected, reward, terminated, truncated, _ = other.step(action)
            # Rounding errors grow while the pole falls: 1.4e-6 was the largest difference in these episodes.
            np.testing.assert_allclose(arrival.observation, expected, rtol=0, atol=1e-5)
            assert (arrival.reward, arrival.terminated, arrival.truncated) == (reward, terminated, truncated)
            if terminated:
                lengths.append(t)
                break
    assert len(lengths) == 30 and max(lengths) > 50


def test_steps_of_a_balanced_episode_are_those_of_gymnasium(other):
    """Until it is truncated. Gymnasium takes each step from the state in JAX: errors would grow exponentially."""
    state = CartPoleState(jnp.array([0.02, -0.03, 0.01, 0.04]), jnp.int32(0))
    for t in range(1, 501):
        other.unwrapped.state = np.asarray(state.physics, np.float64)
        action = int(state.physics @ jnp.array([0.1, 0.3, 1.0, 0.5]) > 0)
        state, arrival = STEP(state, action, KEY)
        expected, reward, terminated, truncated, _ = other.step(action)
        np.testing.assert_allclose(arrival.observation, expected, rtol=0, atol=1e-6)
        assert (arrival.reward, arrival.terminated, arrival.truncated) == (reward, terminated, truncated)
        assert truncated == (t == 500) and not terminated


@pytest.mark.parametrize('physics', [[2.39, 5, 0, 0], [-2.39, -5, 0, 0], [0, 0, 0.209, 1], [0, 0, -0.209, -1]])
def test_the_four_ends_are_those_of_gymnasium(other, physics):
    other.unwrapped.state = np.array(physics, np.float64)
    _, arrival = STEP(CartPoleState(jnp.array(physics, jnp.float32), jnp.int32(0)), 1, KEY)
    assert arrival.terminated and other.step(1)[2]
