"""The adapter by which every runtime steps environments of pure functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.environments import base
from impala_jax.environments.functional.base import EnvironmentState, FunctionalEnvironment
from impala_jax.rundir import plain_state
from impala_jax.seeds import derived_seed
from impala_jax.types import PyTree, StepInfo, TimeStep


class FunctionalVectorEnvironment:
    """A `VectorEnvironment` of a `FunctionalEnvironment`: one compiled call on the CPU steps all of them.

    Args:
      environment: The environment.
      num_envs: Number of environments, N.
      seed: Seed from which each environment's own key is derived.
    """

    def __init__(self, environment: FunctionalEnvironment, num_envs: int, seed: int):
        self.num_envs = num_envs
        self.spec = environment.spec
        self.environment = environment
        self._name = environment.name
        self._device = jax.local_devices(backend='cpu')[0]
        self._step = jax.jit(jax.vmap(environment.step))
        self._observation: Any = None  # The latest, [N, ...], for rendering.
        with jax.default_device(self._device):
            keys = jnp.stack([jax.random.PRNGKey(derived_seed(seed, i)) for i in range(num_envs)])
            self.state: EnvironmentState = jax.jit(jax.vmap(environment.init))(keys)
            """State of the environments, [N, ...]."""

    def reset(self) -> TimeStep:
        """See `VectorEnvironment.reset`."""
        self.state = self.state._replace(over=np.ones(self.num_envs, bool))
        return self.step(np.zeros(self.num_envs, np.int32))[0]

    def step(self, actions: np.ndarray) -> tuple[TimeStep, StepInfo]:
        """See `VectorEnvironment.step`.

        Raises:
          EnvironmentFailure: A reward or an observation is not finite. Environments are not rebuilt: pure functions
            would do the same again.
          ValueError: An action is out of range.
        """
        actions = base.check_actions(actions, self.num_envs, self.spec.num_actions)
        with jax.default_device(self._device):
            self.state, timestep, info = self._step(self.state, actions)
        timestep, info = jax.tree.map(np.asarray, (timestep, info))
        self._check(timestep)
        self._observation = timestep.observation
        return timestep, info

    def get_state(self) -> bytes:
        """See `VectorEnvironment.get_state`."""
        return plain_state.encode([np.asarray(leaf) for leaf in jax.tree.leaves(self.state)])

    def set_state(self, state: bytes) -> None:
        """See `VectorEnvironment.set_state`."""
        own, structure = jax.tree.flatten(self.state)
        saved = plain_state.decode(state)
        if [(x.shape, x.dtype) for x in saved] != [(x.shape, x.dtype) for x in own]:
            raise ValueError(f'the saved state of {self._name!r} is of another version of the environment')
        self.state = jax.tree.unflatten(structure, saved)

    def render(self) -> np.ndarray:
        """Shows the observation of environment 0.

        Raises:
          NotImplementedError: There is no image of the environment.
        """
        if self._observation is None:
            raise NotImplementedError('there is no image before the first reset')
        return base.picture(next(base.leaves(self._observation))[0])

    def close(self) -> None:
        """Does nothing; see `VectorEnvironment.close`."""

    def _check(self, timestep: TimeStep) -> None:
        parts: dict[str, PyTree] = {'reward': timestep.reward, 'observation': timestep.observation}
        for what, part in parts.items():
            for leaf in base.leaves(part):
                if leaf.dtype.kind == 'f' and not np.isfinite(leaf).all():
                    i = int(np.flatnonzero(~np.isfinite(leaf.reshape(self.num_envs, -1)).all(axis=1))[0])
                    raise base.EnvironmentFailure(
                        f'environment {i} of {self._name!r} returned a value of the {what} that is not finite, at step '
                        f'{int(self.state.num_steps[i])} of an episode'
                    )
