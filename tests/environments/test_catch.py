"""Catch, and what memory is worth in it."""

import itertools

import dm_env
import numpy as np
import pytest

from impala_jax.environments.catch import Catch

LEFT, STAY, RIGHT = range(3)


def play(environment: Catch, policy, column: int) -> list[dm_env.TimeStep]:
    """An episode with the ball in `column`."""
    while True:
        timestep = environment.reset()
        if timestep.observation[0, column]:
            break
    timesteps = [timestep]
    while not timesteps[-1].last():
        timesteps.append(environment.step(policy(timesteps)))
    return timesteps


def test_the_ball_falls_and_the_paddle_moves():
    timesteps = play(Catch(seed=0), lambda past: LEFT, column=0)
    assert len(timesteps) == 10
    for row, timestep in enumerate(timesteps):
        board = np.zeros((10, 5), np.float32)
        board[row, 0] = 1
        board[9, max(0, 2 - row)] = 1
        np.testing.assert_array_equal(timestep.observation, board)
    assert [timestep.reward for timestep in timesteps] == [None] + [0] * 8 + [1]
    assert [timestep.discount for timestep in timesteps] == [None] + [1] * 8 + [0]
    assert play(Catch(seed=0), lambda past: RIGHT, column=3)[-1].reward == -1
    assert play(Catch(seed=0), lambda past: STAY, column=2)[-1].reward == 1


def test_the_ball_falls_in_every_column_equally_often():
    environment = Catch(seed=0)
    columns = [int(environment.reset().observation[0].argmax()) for _ in range(5000)]
    np.testing.assert_allclose(np.bincount(columns) / 5000, 0.2, atol=0.02)


def towards(column: int, observation: np.ndarray) -> int:
    return int(np.sign(column - observation[-1].argmax())) + 1


@pytest.mark.parametrize('memory', [False, True])
def test_the_best_return_is_one(memory):
    environment = Catch(seed=0, memory=memory)
    for column in range(5):
        timesteps = play(
            environment, lambda past: towards(past[0].observation[0].argmax(), past[-1].observation), column
        )
        assert timesteps[-1].reward == 1


def test_without_memory_nothing_helps():
    """Given its own actions, a policy without memory sees the same after the first observation wherever the ball is:
    its paddle's last column is independent of the ball's, so it catches one in five, randomised or not."""
    environment = Catch(seed=0, memory=True)
    rng = np.random.RandomState(0)
    for _ in range(20):
        actions = rng.randint(3, size=9)
        first = None
        for column in range(5):
            # The first action is all that may depend on the first observation; whatever it is, nothing moves.
            opening = rng.randint(3)
            timesteps = play(
                environment, lambda past, a=actions, o=opening: o if len(past) == 1 else a[len(past) - 1], column
            )
            seen = [timestep.observation for timestep in timesteps[1:]]
            if first is None:
                first = seen
            np.testing.assert_array_equal(seen, first)
            assert np.sum(seen[-1]) == 1  # only the paddle

    best = -np.inf
    for table in itertools.product(range(3), repeat=5):  # an action for each place of the paddle
        returns = [
            play(environment, lambda past, t=table: t[past[-1].observation[-1].argmax()], column)[-1].reward
            for column in range(5)
        ]
        best = max(best, float(np.mean(returns)))
    np.testing.assert_allclose(best, 2 / 5 - 1)


def test_the_picture_shows_the_ball():
    environment = Catch(seed=0, memory=True)
    environment.reset()
    environment.step(STAY)
    assert environment.render()[1].sum() == 1
