"""A contextual bandit whose reward comes many steps after the choice (in the spirit of bsuite's umbrella_length)."""

from __future__ import annotations

import dm_env
import numpy as np
from dm_env import specs


class DelayedBandit(dm_env.Environment):
    """The first action chooses; after `length` steps it is worth 1 if it was the context's right one, else -1.

    The observation is Markov: one-hot context, one-hot choice (zeros before), and the share of the episode that is
    over. All actions but the first change nothing, and each step in between has a reward of +-`noise` by chance: what
    is tested is how far credit travels. The best expected return is 1, that of a uniform policy 2 / arms - 1.
    """

    def __init__(self, length: int = 20, arms: int = 3, noise: float = 0.1, seed: int | None = None):
        self._length = length
        self._arms = arms
        self._noise = noise
        self._rng = np.random.RandomState(seed)
        self._context = 0
        self._choice: int | None = None
        self._time = 0
        self._ended = True

    def reset(self) -> dm_env.TimeStep:
        self._context = int(self._rng.randint(self._arms))
        self._choice = None
        self._time = 0
        self._ended = False
        return dm_env.restart(self._observation())

    def step(self, action: int) -> dm_env.TimeStep:
        if self._ended:
            return self.reset()
        if self._choice is None:
            self._choice = int(action)
        self._time += 1
        if self._time < self._length:
            return dm_env.transition(float(self._noise * self._rng.choice([-1, 1])), self._observation())
        self._ended = True
        return dm_env.termination(1.0 if self._choice == self._context else -1.0, self._observation())

    def observation_spec(self) -> specs.BoundedArray:
        return specs.BoundedArray((2 * self._arms + 1,), np.float32, 0, 1, name='state')

    def action_spec(self) -> specs.DiscreteArray:
        return specs.DiscreteArray(self._arms, name='action')

    def _observation(self) -> np.ndarray:
        state = np.zeros([2 * self._arms + 1], np.float32)
        state[self._context] = 1.0
        if self._choice is not None:
            state[self._arms + self._choice] = 1.0
        state[-1] = self._time / self._length
        return state
