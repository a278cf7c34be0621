"""CartPole in JAX: a pole on a cart, which the agent keeps upright by pushing the cart."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.environments.functional.base import Arrival
from impala_jax.types import Array, ArraySpec, EnvironmentSpec

_GRAVITY = 9.8  # m/s^2
_CART_MASS, _POLE_MASS = 1.0, 0.1  # kg
_HALF_LENGTH = 0.5  # m, from the pivot to the pole's centre of mass.
_FORCE = 10.0  # N
_INTERVAL = 0.02  # s
_MAX_POSITION = 2.4  # m
_MAX_ANGLE = 12 * np.pi / 180


class CartPoleState(NamedTuple):
    """State of an episode."""

    physics: Array  # [4] float32: position (m), speed (m/s), angle (rad) and angular speed (rad/s).
    time: Array  # int32


class CartPole:
    """The rules of Gymnasium's `CartPole-v1`, computed in float32 (Gymnasium computes in float64).

    The actions push the cart to the left and to the right. Each step has reward 1. The episode terminates when the cart
    is further than 2.4 m from the centre or the pole leans by more than 12 degrees, and is truncated after `time_limit`
    steps. Dynamics: Barto, Sutton and Anderson (1983), without friction, by Euler's method.

    Args:
      time_limit: Longest episode, in steps.
    """

    def __init__(self, time_limit: int = 500):
        self._time_limit = time_limit
        self.spec = EnvironmentSpec(ArraySpec((4,), np.dtype(np.float32)), 2, render_fps=1 / _INTERVAL)

    def reset(self, key: Array) -> tuple[CartPoleState, Array]:
        """Starts an episode close to the upright position."""
        state = CartPoleState(jax.random.uniform(key, (4,), jnp.float32, -0.05, 0.05), jnp.int32(0))
        return state, state.physics

    def step(self, state: CartPoleState, action: Array, key: Array) -> tuple[CartPoleState, Arrival]:
        """Pushes the cart for 20 ms."""
        force = jnp.where(action == 1, _FORCE, -_FORCE)
        position, speed, angle, angular_speed = state.physics
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        mass = _CART_MASS + _POLE_MASS
        push = (force + _POLE_MASS * _HALF_LENGTH * angular_speed**2 * sine) / mass
        inertia = _HALF_LENGTH * (4 / 3 - _POLE_MASS * cosine**2 / mass)
        angular_acceleration = (_GRAVITY * sine - cosine * push) / inertia
        acceleration = push - _POLE_MASS * _HALF_LENGTH * angular_acceleration * cosine / mass
        changes = jnp.stack([speed, acceleration, angular_speed, angular_acceleration])
        state = CartPoleState(state.physics + _INTERVAL * changes, state.time + 1)
        fallen = (jnp.abs(state.physics[0]) > _MAX_POSITION) | (jnp.abs(state.physics[2]) > _MAX_ANGLE)
        return state, Arrival(state.physics, jnp.float32(1), fallen, state.time >= self._time_limit)
