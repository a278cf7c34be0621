"""Two objects, and an instruction that says which to go to (in the spirit of DMLab-30's language levels)."""

from __future__ import annotations

import dm_env
import numpy as np
from dm_env import specs

from impala_jax.types import INSTRUCTION

WORDS = ('', 'go', 'to', 'the', 'red', 'blue')
"""By their ids; 0 is no word."""
_COLOURS = ('red', 'blue')


class GoToColour(dm_env.Environment):
    """A corridor with a red and a blue object at its ends, in either order, and the agent between them.

    Actions are left, stay and right. An episode ends at an object, with a reward of 1 if it is of the colour that the
    instruction names and -1 if not, or after `time_limit` steps without a reward. Nothing but the instruction tells the
    colours apart: the best expected return is 1, and 0 for whoever does not read it.
    """

    def __init__(self, columns: int = 5, time_limit: int = 8, seed: int | None = None):
        self._columns = columns
        self._time_limit = time_limit
        self._rng = np.random.RandomState(seed)
        self._agent = columns // 2
        self._objects = (0, columns - 1)  # where the red one is, and the blue one
        self._wanted = 0
        self._time = 0
        self._ended = True

    def reset(self) -> dm_env.TimeStep:
        self._agent = self._columns // 2
        self._objects = (0, self._columns - 1) if self._rng.randint(2) else (self._columns - 1, 0)
        self._wanted = int(self._rng.randint(2))
        self._time = 0
        self._ended = False
        return dm_env.restart(self._observation())

    def step(self, action: int) -> dm_env.TimeStep:
        if self._ended:
            return self.reset()
        self._time += 1
        self._agent += int(action) - 1
        if self._agent in self._objects:
            self._ended = True
            right = self._agent == self._objects[self._wanted]
            return dm_env.termination(1.0 if right else -1.0, self._observation())
        if self._time == self._time_limit:
            self._ended = True
            return dm_env.termination(0.0, self._observation())
        return dm_env.transition(0.0, self._observation())

    def observation_spec(self) -> dict[str, specs.Array]:
        return {
            'board': specs.BoundedArray((3, self._columns), np.float32, 0, 1, name='agent, red, blue'),
            INSTRUCTION: specs.BoundedArray((4,), np.int32, 0, len(WORDS) - 1, name=INSTRUCTION),
        }

    def action_spec(self) -> specs.DiscreteArray:
        return specs.DiscreteArray(3, name='action')

    def _observation(self) -> dict[str, np.ndarray]:
        board = np.zeros((3, self._columns), np.float32)
        for row, column in enumerate((self._agent, *self._objects)):
            board[row, column] = 1.0
        words = ('go', 'to', 'the', _COLOURS[self._wanted])
        return {'board': board, INSTRUCTION: np.array([WORDS.index(word) for word in words], np.int32)}
