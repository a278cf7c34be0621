"""A corridor with two objects and an instruction that names one (in the spirit of DMLab-30's language levels)."""

from __future__ import annotations

import dm_env
import numpy as np
from dm_env import specs

from impala_jax.types import INSTRUCTION

WORDS = ('', 'go', 'to', 'the', 'red', 'blue')
"""The words by id; id 0 is padding."""
COLOURS = ('red', 'blue')


class GoToColour(dm_env.Environment):
    """A corridor with a red and a blue object at its ends, in either order, and the agent between them.

    The actions are left, stay and right. An episode ends at an object, with a reward of 1 if it has the colour that the
    instruction names and -1 otherwise, or after `time_limit` steps without a reward. Only the instruction determines
    the correct colour: the best expected return is 1, and 0 for policies that ignore the instruction.

    Args:
      columns: Length of the corridor.
      time_limit: Longest episode, in steps.
      seed: Seed for the order of the objects and the instructions.
    """

    def __init__(self, columns: int = 5, time_limit: int = 8, seed: int | None = None):
        self._columns = columns
        self._time_limit = time_limit
        self._rng = np.random.RandomState(seed)
        self._agent = columns // 2
        self._objects = (0, columns - 1)  # columns of the red and the blue object
        self._wanted = 0
        self._time = 0
        self._ended = True

    def reset(self) -> dm_env.TimeStep:
        """Starts an episode with the agent in the centre, and a random order and instruction."""
        self._agent = self._columns // 2
        self._objects = (0, self._columns - 1) if self._rng.randint(2) else (self._columns - 1, 0)
        self._wanted = int(self._rng.randint(2))
        self._time = 0
        self._ended = False
        return dm_env.restart(self._observation())

    def step(self, action: int) -> dm_env.TimeStep:
        """Moves the agent; `action` is 0 (left), 1 (stay) or 2 (right)."""
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
        """The board, [3, columns] float32, one-hot in each row, and the instruction, [4] int32 word ids."""
        return {
            'board': specs.BoundedArray((3, self._columns), np.float32, 0, 1, name='agent, red, blue'),
            INSTRUCTION: specs.BoundedArray((4,), np.int32, 0, len(WORDS) - 1, name=INSTRUCTION),
        }

    def action_spec(self) -> specs.DiscreteArray:
        """Three actions: left, stay, right."""
        return specs.DiscreteArray(3, name='action')

    def _observation(self) -> dict[str, np.ndarray]:
        board = np.zeros((3, self._columns), np.float32)
        for row, column in enumerate((self._agent, *self._objects)):
            board[row, column] = 1.0
        words = ('go', 'to', 'the', COLOURS[self._wanted])
        return {'board': board, INSTRUCTION: np.array([WORDS.index(word) for word in words], np.int32)}
