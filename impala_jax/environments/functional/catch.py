"""Catch in JAX; see `environments.catch`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.environments.functional.base import Arrival
from impala_jax.types import Array, ArraySpec, EnvironmentSpec


class CatchState(NamedTuple):
    """Positions on the board, int32."""

    ball_row: Array
    ball_column: Array
    paddle: Array


class Catch:
    """Catch, or with `memory` its variant that requires memory.

    Args:
      rows: Height of the board.
      columns: Width of the board.
      memory: Whether to play the variant.
    """

    def __init__(self, rows: int = 10, columns: int = 5, memory: bool = False):
        self._rows, self._columns, self._memory = rows, columns, memory
        self.spec = EnvironmentSpec(ArraySpec((rows, columns), np.dtype(np.float32)), 3)

    def reset(self, key: Array) -> tuple[CatchState, Array]:
        """Starts an episode with the ball in a random column."""
        state = CatchState(
            jnp.int32(0), jax.random.randint(key, (), 0, self._columns, jnp.int32), jnp.int32(self._columns // 2)
        )
        return state, self._board(state)

    def step(self, state: CatchState, action: Array, key: Array) -> tuple[CatchState, Arrival]:
        """Moves the paddle and lets the ball fall by one row."""
        moved = jnp.clip(state.paddle + action - 1, 0, self._columns - 1)
        can_move = jnp.bool_(True) if not self._memory else state.ball_row >= self._rows // 2
        paddle = jnp.where(can_move, moved, state.paddle)
        state = CatchState(state.ball_row + 1, state.ball_column, paddle)
        landed = state.ball_row >= self._rows - 1
        reward = jnp.where(landed, jnp.where(paddle == state.ball_column, 1.0, -1.0), 0.0)
        return state, Arrival(self._board(state), reward, landed)

    def _board(self, state: CatchState) -> Array:
        rows = jnp.arange(self._rows)[:, None]
        columns = jnp.arange(self._columns)[None]
        visible = jnp.bool_(True) if not self._memory else state.ball_row == 0
        ball = (rows == state.ball_row) & (columns == state.ball_column) & visible
        return jnp.float32(ball | ((rows == self._rows - 1) & (columns == state.paddle)))
