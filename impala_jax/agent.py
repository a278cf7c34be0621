"""The agent: pure functions of parameters, used alike by actors, learner and evaluator."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from impala_jax import frame_stacks, networks
from impala_jax.networks import NetworkOutput
from impala_jax.types import FIRST, Array, ArraySpec, EnvironmentSpec, PyTree, StepInfo, TimeStep, Trajectory

_logger = logging.getLogger(__name__)


class AgentStep(NamedTuple):
    """What acting at one timestep yields."""

    action: Array  # [B] int32
    logits: Array  # [B, A] float32, the very ones the action was sampled from
    state: PyTree  # [B, ...], the core's state after the timestep


class Agent:
    """Network and action sampling for one kind of environment. Holds no parameters and no state.

    Args:
      network: Maps TimeStep [T, B, ...] and the core's state [B, ...] to NetworkOutput and the state after the last
        timestep; one of `networks.build`, or any other. A recurrent one has a method `initial_state(batch_size)`.
      spec: That of the environment.
    """

    def __init__(self, network: nn.Module, spec: EnvironmentSpec):
        self.spec = spec
        self._network: Any = network
        self._readings: tuple[networks.Reading, ...] = getattr(network, 'readings', ())
        self._embedded = [(i, reading) for i, reading in enumerate(self._readings) if reading.num_values]

    @property
    def reads(self) -> str:
        """How each leaf of an observation is read, one line."""
        if not self._readings:
            return f'observations by {type(self._network).__name__}'
        return networks.describe(self._readings, self.spec.observation)

    def init(self, key: Array) -> PyTree:
        """Parameters, float32."""
        timesteps = jax.tree.map(lambda x: x[None], dummy_timestep(self.spec, 1))
        return self._network.init(key, timesteps, self.initial_state(1))

    def initial_state(self, batch_size: int) -> PyTree:
        """The core's state before an episode, [B, ...]; `()` without a recurrent core."""
        initial_state = getattr(self._network, 'initial_state', None)
        return () if initial_state is None else initial_state(batch_size)

    def check_observation(self, observation: PyTree) -> None:
        """Checks what only the values tell: a word id or category without an embedding would make the output NaN.

        Args:
          observation: [N, ...], numpy.

        Raises:
          ConfigError: there is one.
        """
        if self._embedded:
            leaves = jax.tree.leaves(observation)
            for i, reading in self._embedded:
                reading.check(leaves[i])

    def report_small_bytes(self, observation: PyTree) -> None:
        """Logs, once per process, that bytes are divided by far more than their values so far, [N, ...] numpy."""
        # A network of the user's own has no readings.
        for reading, leaf in zip(self._readings, jax.tree.leaves(observation), strict=False):
            if reading.is_default_scale and leaf.dtype == np.uint8 and 0 < 8 * int(leaf.max()) <= reading.scale:
                _report_small_bytes(reading.name, reading.scale)

    def unroll(self, params: PyTree, timesteps: TimeStep, state: PyTree) -> tuple[NetworkOutput, PyTree]:
        """Logits [T, B, A] and values [T, B] (with PopArt [T, B, K]) of timesteps [T, B, ...], and the state after the
        last, from `state` before the first."""
        output, state = self._network.apply(params, timesteps, state)
        return output, state  # pyright: ignore[reportReturnType]

    def step(self, params: PyTree, key: Array, timestep: TimeStep, state: PyTree, *, greedy: bool = False) -> AgentStep:
        """Acts at one timestep [B, ...]: an unroll of length one, and an action sampled (or the most likely one)."""
        output, state = self.unroll(params, jax.tree.map(lambda x: x[None], timestep), state)
        logits = output.logits[0]
        action = jnp.argmax(logits, -1) if greedy else jax.random.categorical(key, logits)
        return AgentStep(action.astype(jnp.int32), logits, state)

    def empty_trajectory(self, unroll_length: int, batch_size: int) -> Trajectory:
        """Zeros of the shapes and dtypes that this agent's actors write, [T + 1, B], numpy."""
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
        """The treedef of a Trajectory that this agent's actors write."""
        return jax.tree.structure(self.empty_trajectory(1, 1))


@functools.cache
def _report_small_bytes(name: str, scale: float) -> None:
    _logger.warning(
        '%s is divided by %g, and its first values are below an eighth of that; if they stay so small, set '
        '--network.uint8-scale to the greatest',
        name,
        scale,
    )


def dummy_timestep(spec: EnvironmentSpec, batch_size: int) -> TimeStep:
    """A timestep of zeros, [B, ...], of an environment's shapes and dtypes; numpy."""
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
