"""Catch: a ball falls through a small board, and a paddle at the bottom must catch it.

As in bsuite (Osband et al., 2020): a 10 x 5 board, the actions left, stay and right, and a reward of 1 or -1 when the
ball lands.
"""

from __future__ import annotations

import dm_env
import numpy as np
from dm_env import specs


class Catch(dm_env.Environment):
    """Catch, with a variant that agents without memory cannot play better than by chance.

    In the variant, the ball is visible in the first observation of an episode only, and the paddle, which starts in the
    centre, cannot move before the ball has fallen half way. Neither later observations nor the position of the paddle
    therefore depend on the position of the ball. The expected return of every policy without memory is
    2 / columns - 1; the best expected return with memory is 1.

    Args:
      rows: Height of the board.
      columns: Width of the board.
      seed: Seed for the columns of the balls.
      memory: Whether to play the variant that requires memory.
    """

    def __init__(self, rows: int = 10, columns: int = 5, seed: int | None = None, memory: bool = False):
        self._rows = rows
        self._columns = columns
        self._memory = memory
        self._rng = np.random.RandomState(seed)
        self._ball_row = 0
        self._ball_column = 0
        self._paddle = columns // 2
        self._ended = True

    def reset(self) -> dm_env.TimeStep:
        """Starts an episode with the ball in a random column."""
        self._ended = False
        self._ball_row = 0
        self._ball_column = int(self._rng.randint(self._columns))
        self._paddle = self._columns // 2
        return dm_env.restart(self._observation())

    def step(self, action: int) -> dm_env.TimeStep:
        """Moves the paddle and lets the ball fall by one row; `action` is 0 (left), 1 (stay) or 2 (right)."""
        if self._ended:
            return self.reset()
        if not self._memory or self._ball_row >= self._rows // 2:
            self._paddle = min(max(self._paddle + int(action) - 1, 0), self._columns - 1)
        self._ball_row += 1
        if self._ball_row < self._rows - 1:
            return dm_env.transition(0.0, self._observation())
        self._ended = True
        return dm_env.termination(1.0 if self._paddle == self._ball_column else -1.0, self._observation())

    def observation_spec(self) -> specs.BoundedArray:
        """The board, [rows, columns] float32, with 1 at the ball and the paddle."""
        return specs.BoundedArray((self._rows, self._columns), np.float32, 0, 1, name='board')

    def action_spec(self) -> specs.DiscreteArray:
        """Three actions: left, stay, right."""
        return specs.DiscreteArray(3, name='action')

    def render(self) -> np.ndarray:
        """Returns the board with the ball, also where observations hide it."""
        return self._board(ball=True)

    def _observation(self) -> np.ndarray:
        return self._board(ball=not self._memory or self._ball_row == 0)

    def _board(self, ball: bool) -> np.ndarray:
        board = np.zeros((self._rows, self._columns), np.float32)
        if ball:
            board[self._ball_row, self._ball_column] = 1.0
        board[-1, self._paddle] = 1.0
        return board
