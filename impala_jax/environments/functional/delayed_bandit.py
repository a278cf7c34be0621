"""The delayed bandit in JAX; see `environments.delayed_bandit`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.environments.functional.base import Arrival
from impala_jax.types import Array, ArraySpec, EnvironmentSpec


class BanditState(NamedTuple):
    """State of an episode, int32."""

    context: Array
    choice: Array  # -1 before it is made.
    time: Array


class DelayedBandit:
    """The delayed bandit.

    Args:
      length: Number of steps of an episode.
      arms: Number of contexts and of actions.
      noise: Magnitude of the rewards before the last.
    """

    def __init__(self, length: int = 20, arms: int = 3, noise: float = 0.1):
        self._length, self._arms, self._noise = length, arms, noise
        self.spec = EnvironmentSpec(ArraySpec((2 * arms + 1,), np.dtype(np.float32)), arms)

    def reset(self, key: Array) -> tuple[BanditState, Array]:
        """Starts an episode with a random context."""
        context = jax.random.randint(key, (), 0, self._arms, jnp.int32)
        state = BanditState(context, jnp.int32(-1), jnp.int32(0))
        return state, self._observation(state)

    def step(self, state: BanditState, action: Array, key: Array) -> tuple[BanditState, Arrival]:
        """Takes a step; the first action of an episode is the choice, later ones have no effect."""
        choice = jnp.where(state.choice < 0, action, state.choice)
        state = BanditState(state.context, choice, state.time + 1)
        ended = state.time >= self._length
        final = jnp.where(choice == state.context, 1.0, -1.0)
        noise = jnp.where(jax.random.bernoulli(key), self._noise, -self._noise)
        return state, Arrival(self._observation(state), jnp.float32(jnp.where(ended, final, noise)), ended)

    def _observation(self, state: BanditState) -> Array:
        one_hot = jnp.concatenate([jax.nn.one_hot(x, self._arms) for x in (state.context, state.choice)])
        return jnp.append(one_hot, jnp.float32(state.time) / self._length)
