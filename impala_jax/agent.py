"""The agent: pure functions of parameters, common to actors, learner and evaluator."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from impala_jax import frame_stacks, readings
from impala_jax.config import ConfigError
from impala_jax.networks import NetworkOutput
from impala_jax.types import FIRST, Array, ArraySpec, EnvironmentSpec, PyTree, StepInfo, TimeStep, Trajectory

Unroll = Callable[[PyTree, TimeStep, PyTree], tuple[NetworkOutput, PyTree]]

_logger = logging.getLogger(__name__)


class AgentStep(NamedTuple):
    """Result of acting at one timestep."""

    action: Array  # [B] int32
    logits: Array  # [B, A] float32, from which the action was sampled.
    state: PyTree  # [B, ...], state of the core after the timestep.


class Agent:
    """A network and action sampling for one kind of environment, without parameters or state.

    Args:
      network: Module that maps a TimeStep [T, B, ...] and the state of the core [B, ...] to a NetworkOutput and the
        state after the last timestep; built by `networks.build`, or any other. A recurrent network has a method
        `initial_state(batch_size)`.
      spec: Spec of the environment.
    """

    def __init__(self, network: nn.Module, spec: EnvironmentSpec):
        self.spec = spec
        self._network: Any = network
        self._readings: tuple[readings.Reading, ...] = getattr(network, 'readings', ())
        self._embedded = [(i, reading) for i, reading in enumerate(self._readings) if reading.num_values]

    @property
    def reads(self) -> str:
        """Description of how each leaf of an observation is read, in one line."""
        if not self._readings:
            return f'observations by {type(self._network).__name__}'
        return readings.describe(self._readings, self.spec.observation)

    def init(self, key: Array) -> PyTree:
        """Returns initial parameters, float32."""
        timesteps = jax.tree.map(lambda x: x[None], dummy_timestep(self.spec, 1))
        return self._network.init(key, timesteps, self.initial_state(1))

    def initial_state(self, batch_size: int) -> PyTree:
        """Returns the state of the core at the start of an episode, [B, ...]; `()` without a recurrent core."""
        initial_state = getattr(self._network, 'initial_state', None)
        return () if initial_state is None else initial_state(batch_size)

    def check_observation(self, observation: PyTree) -> None:
        """Checks the range of word ids and categories; a value without an embedding would make the output NaN.

        Args:
          observation: NumPy arrays, [N, ...].

        Raises:
          ConfigError: If a value has no embedding.
        """
        if self._embedded:
            leaves = jax.tree.leaves(observation)
            for i, reading in self._embedded:
                reading.check(leaves[i])

    def report_small_bytes(self, observation: PyTree) -> None:
        """Logs once if uint8 values are divided by a number that is much larger than the values seen.

        Args:
          observation: NumPy arrays, [N, ...].
        """
        # A user's network has no readings.
        for reading, leaf in zip(self._readings, jax.tree.leaves(observation), strict=False):
            if reading.is_default_scale and leaf.dtype == np.uint8 and 0 < 8 * int(leaf.max()) <= reading.scale:
                _report_small_bytes(reading.name, reading.scale)

    def unroll(self, params: PyTree, timesteps: TimeStep, state: PyTree) -> tuple[NetworkOutput, PyTree]:
        """Evaluates the network on a sequence of timesteps.

        Args:
          params: Parameters of the network.
          timesteps: Timesteps, [T, B, ...].
          state: State of the core before the first timestep, [B, ...].

        Returns:
          A NetworkOutput with logits [T, B, A] and values [T, B] (with PopArt [T, B, K]), and the state of the core
          after the last timestep, [B, ...].

        Raises:
          ConfigError: If the network returns something else.
        """
        returned = self._network.apply(params, timesteps, state)
        problem = self._problem(returned, timesteps.step_type.shape, state)
        if problem:
            name = type(self._network).__name__
            raise ConfigError(f'the network {name} returned {problem} (docs/extending.md)')
        return returned

    def _problem(self, returned: Any, shape: tuple[int, ...], state: PyTree) -> str:
        """Describes how a network's result for timesteps of `shape` differs from its contract; '' if it does not."""
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], NetworkOutput)):
            return f'a value of type {type_name(returned)}; return a tuple of a NetworkOutput and the state of the core'
        output, new_state = returned
        num_values = getattr(self._network, 'num_normalised_values', 0)
        expected = {
            'logits': (*shape, self.spec.num_actions),
            'values': (*shape, num_values) if num_values else shape,
        }
        for name, wanted in expected.items():
            array = getattr(output, name)
            if jnp.shape(array) != wanted or jnp.result_type(array) != jnp.float32:
                return f'{name} of {_array_name(array)}; for timesteps {list(shape)} return float32 {list(wanted)}'
        before, after = (jax.tree.map(_array_name, tree) for tree in (state, new_state))
        return '' if before == after else f'the state {after} for the state {before}; return one of the same shapes'

    def step(
        self,
        params: PyTree,
        key: Array,
        timestep: TimeStep,
        state: PyTree,
        *,
        greedy: bool = False,
        unroll: Unroll | None = None,
    ) -> AgentStep:
        """Acts at one timestep.

        Args:
          params: Parameters of the network.
          key: Key for sampling.
          timestep: Timestep, [B, ...].
          state: State of the core before the timestep, [B, ...].
          greedy: Whether to take the most likely action instead of a sample.
          unroll: Function that takes the place of `Agent.unroll`, such as `Learner.unroll`.
        """
        unroll = self.unroll if unroll is None else unroll
        output, state = unroll(params, jax.tree.map(lambda x: x[None], timestep), state)
        logits = output.logits[0]
        action = jnp.argmax(logits, -1) if greedy else jax.random.categorical(key, logits)
        return AgentStep(action.astype(jnp.int32), logits, state)

    def empty_trajectory(self, unroll_length: int, batch_size: int) -> Trajectory:
        """Returns a trajectory of zeros with the shapes and dtypes that actors write, [T + 1, B], in NumPy."""
        shape = [unroll_length, batch_size]
        return Trajectory(
            timesteps=frame_stacks.empty_timesteps(unroll_length + 1, dummy_timestep(self.spec, batch_size), self.spec),
            behaviour_logits=np.zeros([*shape, self.spec.num_actions], np.float32),
            initial_state=self.initial_state(batch_size),
            info=StepInfo(np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, np.int32)),
            version=np.zeros([batch_size], np.int32),
            task=np.zeros([batch_size], np.int32),
            game_version=np.zeros(shape, np.int32),
        )

    def trajectory_structure(self) -> PyTree:
        """Returns the treedef of the trajectories that actors write."""
        return jax.tree.structure(self.empty_trajectory(1, 1))


def _array_name(array: Any) -> str:
    return f'{jnp.result_type(array)} {list(jnp.shape(array))}'


def type_name(value: Any) -> str:
    """Returns the type of a value for messages; `Array` for all arrays of JAX, also while they are traced."""
    if type(value) is tuple:
        return f'tuple of {", ".join(map(type_name, value))}'
    return 'Array' if isinstance(value, jax.Array) else type(value).__name__


@functools.cache
def _report_small_bytes(name: str, scale: float) -> None:
    _logger.warning(
        '%s is divided by %g, and its first values are below an eighth of that; if all values are that small, set '
        '--network.uint8-scale to the largest one',
        name,
        scale,
    )


def dummy_timestep(spec: EnvironmentSpec, batch_size: int) -> TimeStep:
    """Returns a timestep of zeros with an environment's shapes and dtypes, [B, ...], in NumPy."""
    return TimeStep(
        step_type=np.full([batch_size], FIRST, np.int32),
        reward=np.zeros([batch_size], np.float32),
        discount=np.ones([batch_size], np.float32),
        observation=jax.tree.map(
            lambda leaf: np.zeros([batch_size, *leaf.shape], leaf.dtype),
            spec.observation,
            is_leaf=lambda x: isinstance(x, ArraySpec),
        ),
        previous_action=np.zeros([batch_size], np.int32),
    )
