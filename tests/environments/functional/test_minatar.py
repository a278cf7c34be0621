"""Games of MinAtar in JAX are those of the package, whose trajectories tests.helpers.minatar_reference has recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from impala_jax import environments
from impala_jax.config import EnvironmentConfig, NetworkConfig
from impala_jax.environments import functional
from impala_jax.environments.functional import FunctionalEnvironment
from impala_jax.readings import read
from impala_jax.types import LAST
from tests.helpers import minatar_reference


@pytest.mark.parametrize('game', minatar_reference.GAMES)
def test_a_game_is_that_of_the_package(game):
    """Every observation, reward and termination, given the same actions and random numbers."""
    expected = minatar_reference.load(game)
    task = functional.task(f'jax/minatar/{game}')

    def advance(state, row):
        started, observation = task.start(row.side)
        continued, arrival = task.act(state, row.action.astype(jnp.int32), row.repeat)
        choose = lambda a, b: jax.tree.map(lambda x, y: jnp.where(row.first, x, y), a, b)  # noqa: E731
        state = choose(started, continued)
        arrived = (arrival.reward, arrival.terminated, arrival.observation)
        return state, choose((jnp.float32(0), jnp.bool_(False), observation), arrived)

    start, _ = task.start(jnp.bool_(False))
    _, (reward, terminated, observation) = jax.jit(lambda rows: jax.lax.scan(advance, start, rows))(expected)
    np.testing.assert_array_equal(observation, expected.observation)
    np.testing.assert_array_equal(reward, expected.reward)
    np.testing.assert_array_equal(terminated, expected.terminated)
    # The recording is one from which a difference can be seen.
    assert (~expected.first).sum() == minatar_reference.NUM_STEPS >= 1_000
    assert set(expected.action) == set(range(6)) and 0.07 < expected.repeat.mean() < 0.13
    returns = [part.sum(dtype=int) for part in np.split(expected.reward, np.flatnonzero(expected.first)[1:])]
    assert len(returns) >= 4
    assert max(returns) > {'breakout': 60, 'space_invaders': 168}[game]  # Two walls; the fastest wave.


@pytest.mark.parametrize('game', minatar_reference.GAMES)
def test_episodes_are_random_by_their_keys_only(game):
    """Actions are repeated with probability 0.1, and where the ball enters is random."""
    task = functional.task(f'jax/minatar/{game}')
    keys = jax.random.split(jax.random.PRNGKey(0), 4_000)
    states, _ = jax.vmap(task.reset)(keys)
    states = states._replace(last_action=jnp.full(len(keys), 3, jnp.int32))
    after, arrival = jax.vmap(task.step)(states, jnp.full(len(keys), 1, jnp.int32), keys)
    assert set(np.asarray(after.last_action)) == {1, 3}
    assert 0.08 < (after.last_action == 3).mean() < 0.12
    paddle = arrival.observation[:, -1, :, 0].argmax(axis=1)
    centre = {'breakout': 4, 'space_invaders': 5}[game]
    np.testing.assert_array_equal(paddle, np.where(after.last_action == 3, centre + 1, centre - 1))
    if game == 'breakout':
        assert 0.45 < (states.game.ball[:, 1] == 9).mean() < 0.55


@pytest.mark.parametrize('game', minatar_reference.GAMES)
def test_the_network_reads_zeros_and_ones(game):
    name = f'jax/minatar/{game}'
    spec = environments.spec(EnvironmentConfig(name))
    (reading,) = read(NetworkConfig(), spec.observation)
    assert reading.scale == 1 and spec.observation.dtype == np.uint8
    (image,) = read(NetworkConfig(torso='deep'), spec.observation)
    assert image.axes == (0, 1, 2)
    environment = FunctionalEnvironment(functional.task(name))
    state, step = environment.init(jax.random.PRNGKey(0)), jax.jit(environment.step)
    ends = 0
    for action in np.random.RandomState(0).randint(0, 6, 600).tolist():
        state, timestep, _ = step(state, action)
        assert set(np.unique(timestep.observation)) == {0, 1}
        ends += int(timestep.step_type) == LAST
    assert ends > 1
