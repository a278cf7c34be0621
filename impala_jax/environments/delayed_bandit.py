"""A contextual bandit whose reward comes many steps after the choice (in the spirit of bsuite's umbrella_length)."""

from __future__ import annotations

import dm_env
import numpy as np
from dm_env import specs


class DelayedBandit(dm_env.Environment):
    """A task that tests credit assignment: only the first action matters, and its reward comes `length` steps later.

    The final reward is 1 if the first action was the correct one for the context, and -1 otherwise. The steps in
    between have a random reward of +-`noise`. The observation is Markov: the one-hot context, the one-hot choice (zeros
    before it is made), and the elapsed fraction of the episode. The best expected return is 1; a uniform policy has
    2 / arms - 1.

    Args:
      length: Number of steps of an episode.
      arms: Number of contexts and of actions.
      noise: Magnitude of the rewards before the last.
      seed: Seed for contexts and noise.
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
        """Starts an episode with a random context."""
        self._context = int(self._rng.randint(self._arms))
        self._choice = None
        self._time = 0
        self._ended = False
        return dm_env.restart(self._observation())

    def step(self, action: int) -> dm_env.TimeStep:
        """Takes a step; the first action of an episode is the choice, later ones have no effect."""
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
        """Context, choice and elapsed fraction of the episode, [2 * arms + 1] float32."""
        return specs.BoundedArray((2 * self._arms + 1,), np.float32, 0, 1, name='state')

    def action_spec(self) -> specs.DiscreteArray:
        """One action per arm."""
        return specs.DiscreteArray(self._arms, name='action')

    def _observation(self) -> np.ndarray:
        state = np.zeros([2 * self._arms + 1], np.float32)
        state[self._context] = 1.0
        if self._choice is not None:
            state[self._arms + self._choice] = 1.0
        state[-1] = self._time / self._length
        return state
