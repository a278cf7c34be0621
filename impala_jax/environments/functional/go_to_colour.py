"""The corridor with two objects and an instruction in JAX; see `environments.go_to_colour`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.environments.functional.base import Arrival
from impala_jax.environments.go_to_colour import COLOURS, WORDS
from impala_jax.types import INSTRUCTION, Array, ArraySpec, EnvironmentSpec


class CorridorState(NamedTuple):
    """State of an episode, int32."""

    agent: Array
    objects: Array  # [2], columns of the red and the blue object.
    wanted: Array  # Index of the wanted object.
    time: Array


class GoToColour:
    """The corridor.

    Args:
      columns: Length of the corridor.
      time_limit: Longest episode, in steps.
    """

    def __init__(self, columns: int = 5, time_limit: int = 8):
        self._columns, self._time_limit = columns, time_limit
        sentences = [[WORDS.index(word) for word in ('go', 'to', 'the', colour)] for colour in COLOURS]
        self._instructions = np.array(sentences, np.int32)
        words = ArraySpec(self._instructions.shape[1:], np.dtype(np.int32), bounds=(0, len(WORDS) - 1))
        board = ArraySpec((3, columns), np.dtype(np.float32))
        self.spec = EnvironmentSpec({'board': board, INSTRUCTION: words}, 3)

    def reset(self, key: Array) -> tuple[CorridorState, dict[str, Array]]:
        """Starts an episode with the agent in the centre, and a random order and instruction."""
        order, wanted = jax.random.randint(key, (2,), 0, 2, jnp.int32)
        ends = jnp.array([0, self._columns - 1], jnp.int32)
        state = CorridorState(jnp.int32(self._columns // 2), jnp.where(order, ends, ends[::-1]), wanted, jnp.int32(0))
        return state, self._observation(state)

    def step(self, state: CorridorState, action: Array, key: Array) -> tuple[CorridorState, Arrival]:
        """Moves the agent."""
        state = state._replace(agent=state.agent + action - 1, time=state.time + 1)
        arrived = (state.agent == state.objects).any()
        final = jnp.where(state.agent == state.objects[state.wanted], 1.0, -1.0)
        ended = arrived | (state.time >= self._time_limit)
        return state, Arrival(self._observation(state), jnp.where(arrived, final, 0.0), ended)

    def _observation(self, state: CorridorState) -> dict[str, Array]:
        board = jax.nn.one_hot(jnp.append(state.agent, state.objects), self._columns)
        return {'board': board, INSTRUCTION: jnp.array(self._instructions)[state.wanted]}
