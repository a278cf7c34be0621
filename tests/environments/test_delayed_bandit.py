"""The delayed bandit: the first action decides, and nothing else does."""

import itertools

import numpy as np
import pytest

from impala_jax.environments.delayed_bandit import DelayedBandit


def play(environment, first, others):
    """An episode; `first` is added to the context to choose."""
    timesteps = [environment.reset()]
    context = int(timesteps[0].observation[:3].argmax())
    actions = itertools.chain([(context + first) % 3], others)
    while not timesteps[-1].last():
        timesteps.append(environment.step(next(actions)))
    return context, timesteps


@pytest.mark.parametrize('first', [0, 1, 2])
def test_the_first_action_decides(first):
    environment = DelayedBandit(seed=0)
    contexts = set()
    for seed in range(20):
        others = np.random.RandomState(seed).randint(3, size=30)
        context, timesteps = play(environment, first, others)
        contexts.add(context)
        assert len(timesteps) == 21
        assert timesteps[-1].reward == (1 if first == 0 else -1) and timesteps[-1].discount == 0
        assert {abs(timestep.reward) for timestep in timesteps[1:-1]} == {0.1}
        # Markov: what was chosen shows until the end.
        for time, timestep in enumerate(timesteps[1:], start=1):
            expected = np.concatenate([np.eye(3)[context], np.eye(3)[(context + first) % 3], [time / 20]])
            np.testing.assert_allclose(timestep.observation, expected, rtol=1e-6)
    assert contexts == {0, 1, 2}


def test_the_noise_has_no_bias():
    environment = DelayedBandit(length=200, seed=1)
    rewards = [t.reward for _ in range(50) for t in play(environment, 0, itertools.repeat(0))[1][1:-1]]
    assert abs(np.mean(rewards)) < 4 * 0.1 / len(rewards) ** 0.5
