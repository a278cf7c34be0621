"""The small suite: one space for all its tasks, and a task that only the words disambiguate."""

import itertools

import numpy as np
import pytest

from impala_jax.environments import minisuite
from impala_jax.environments.go_to_colour import WORDS, GoToColour

LEFT, STAY, RIGHT = range(3)


def play(environment, policy):
    """An episode's timesteps; `policy` gets those so far."""
    timesteps = [environment.reset()]
    while not timesteps[-1].last():
        timesteps.append(environment.step(policy(timesteps)))
    return timesteps


def episode_return(timesteps):
    return sum(timestep.reward for timestep in timesteps[1:])


@pytest.mark.parametrize('name', minisuite.TASKS)
def test_one_observation_and_action_space(name):
    environment = minisuite.TASKS[name](seed=0)
    spec = environment.observation_spec()
    assert {key: (leaf.shape, leaf.dtype) for key, leaf in spec.items()} == {
        'board': ((6, 5), np.dtype(np.float32)),
        'instruction': ((4,), np.dtype(np.int32)),
    }
    assert environment.action_spec().num_values == 3
    rng = np.random.RandomState(0)
    instructed = set()
    for _ in range(20):
        for timestep in play(environment, lambda _: rng.randint(3)):
            for key, leaf in spec.items():
                leaf.validate(timestep.observation[key])
            instructed.add(bool(timestep.observation['instruction'].any()))
    assert instructed == {name == 'go_to_colour'}


def best_action(name, past):
    """A policy that plays the task well, from what is seen."""
    board = past[-1].observation['board']
    if name == 'delayed_bandit':
        return board.flat[:3].argmax()
    if name == 'go_to_colour':
        agent, red, blue = (row.argmax() for row in board.ravel()[:15].reshape(3, 5))
        colour = WORDS[past[-1].observation['instruction'][3]]
        return 1 + np.sign({'red': red, 'blue': blue}[colour] - agent)
    ball = past[0].observation['board'][0].argmax()
    return 1 + np.sign(ball - board[-1].argmax())


@pytest.mark.parametrize('name', minisuite.TASKS)
def test_the_best_return_is_one(name):
    environment = minisuite.TASKS[name](seed=0)
    returns = [episode_return(play(environment, lambda past: best_action(name, past))) for _ in range(200)]
    np.testing.assert_allclose(np.mean(returns), 1, atol=0.02)
    assert np.std(returns) < 0.1


def test_going_to_a_colour():
    environment = GoToColour(seed=0)
    seen = set()
    for _ in range(40):
        timesteps = play(environment, lambda _: RIGHT)
        board, words = timesteps[0].observation['board'], timesteps[0].observation['instruction']
        assert board[0].tolist() == [0, 0, 1, 0, 0]
        wanted = WORDS[words[-1]]
        assert ' '.join(WORDS[word] for word in words) == f'go to the {wanted}'
        on_the_right = 'red' if board[1, 4] else 'blue'
        assert board[1:].sum() == 2 and board[1, 0] + board[1, 4] == board[2, 0] + board[2, 4] == 1
        assert [timestep.reward for timestep in timesteps] == [None, 0, 1 if wanted == on_the_right else -1]
        assert timesteps[-1].discount == 0
        seen.add((wanted, on_the_right))
    assert len(seen) == 4
    idle = play(environment, lambda _: STAY)
    assert len(idle) == 9 and episode_return(idle) == 0


def test_without_the_words_nothing_helps():
    """Every policy of the board gets as much from red as from blue: its mean return over both instructions is 0."""
    outcomes = {}
    for policy in itertools.product(range(3), repeat=3):  # an action for each place between the objects
        environment, returns = GoToColour(seed=1), {}
        while len(returns) < 4:
            timesteps = play(environment, lambda past, p=policy: p[past[-1].observation['board'][0].argmax() - 1])
            first = timesteps[0].observation
            returns[bool(first['board'][1, 0]), int(first['instruction'][-1])] = episode_return(timesteps)
        outcomes[policy] = np.mean(list(returns.values()))
    assert set(outcomes.values()) == {0}
