"""The interface of tasks in JAX, and the environments made of them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from impala_jax.config import ConfigError
from impala_jax.types import FIRST, LAST, MID, Array, ArraySpec, EnvironmentSpec, PyTree, StepInfo, TimeStep


class Arrival(NamedTuple):
    """Result of a step of a task, without batch dimensions."""

    observation: PyTree  # Shapes and dtypes of the spec.
    reward: Array  # float32
    terminated: Array  # bool, whether the episode ends with this step, and its value is 0.
    truncated: Array | bool = False  # bool, whether the episode ends although its value is not 0.


class Task(Protocol):
    """Pure functions of one instance of a task.

    `jax.jit` and `jax.vmap` apply to both functions: they have no side effects, and shapes do not depend on values.
    """

    @property
    def spec(self) -> EnvironmentSpec:
        """Description for the agent."""
        ...

    def reset(self, key: Array) -> tuple[PyTree, PyTree]:
        """Starts an episode.

        Args:
          key: Random key.

        Returns:
          The state of the task, arrays, and the first observation.
        """
        ...

    def step(self, state: PyTree, action: Array, key: Array) -> tuple[PyTree, Arrival]:
        """Takes a step within an episode.

        Args:
          state: State of the task.
          action: Action, [] int32.
          key: Random key.
        """
        ...


class EnvironmentState(NamedTuple):
    """State of a `FunctionalEnvironment`."""

    key: Array
    task: PyTree
    over: Array  # bool, whether the next step starts an episode.
    episode_return: Array  # float32, of the current episode.
    num_steps: Array  # int32, in the current episode.


class FunctionalEnvironment:
    """Episodes of a task, one after the other, as pure functions.

    As in `VectorEnvironment`, the action after a LAST timestep is ignored, and a FIRST timestep follows.

    Args:
      task: The task.
      max_episode_steps: Number of steps after which an episode is truncated; None for the task's own limit only.
      name: Name of the task, for error messages.

    Raises:
      ConfigError: The functions of the task return other shapes or dtypes than they should.
    """

    def __init__(self, task: Task, max_episode_steps: int | None = None, *, name: str = 'environment'):
        self.spec = task.spec
        self.name = name
        self._task = task
        self._max_episode_steps = max_episode_steps
        if problem := _problem(task):
            raise ConfigError(f'environment {name!r}: {problem} (docs/environments.md)')

    def init(self, key: Array) -> EnvironmentState:
        """Returns the state before the first episode; `key` determines all episodes."""
        task, _ = self._task.reset(key)
        return EnvironmentState(key, task, jnp.bool_(True), jnp.float32(0), jnp.int32(0))

    def step(self, state: EnvironmentState, action: Array) -> tuple[EnvironmentState, TimeStep, StepInfo]:
        """Takes a step, or starts an episode.

        Args:
          state: State of the environment.
          action: Action, [] int32; ignored at the start of an episode.

        Returns:
          The next state, and timestep and statistics without batch dimensions.
        """
        # Both are computed, and one is chosen: under `vmap`, some environments start while others continue.
        key, own = jax.random.split(state.key)
        started, first = self._task.reset(own)
        continued, arrival = self._task.step(state.task, action, own)

        def choose(new: PyTree, old: PyTree) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(state.over, a, b), new, old)

        num_steps = choose(jnp.int32(0), state.num_steps + 1)
        reward = choose(jnp.float32(0), jnp.float32(arrival.reward))
        episode_return = choose(jnp.float32(0), state.episode_return + reward)
        truncated = jnp.bool_(arrival.truncated)
        if self._max_episode_steps is not None:
            truncated |= num_steps >= self._max_episode_steps
        ended = ~state.over & (arrival.terminated | truncated)
        timestep = TimeStep(
            step_type=choose(jnp.int32(FIRST), jnp.where(ended, jnp.int32(LAST), jnp.int32(MID))),
            reward=reward,
            discount=choose(jnp.float32(1), jnp.where(arrival.terminated, jnp.float32(0), jnp.float32(1))),
            observation=choose(first, arrival.observation),
            previous_action=choose(jnp.int32(0), action),
        )
        info = StepInfo(jnp.where(ended, episode_return, 0), ended, jnp.int32(0))
        return EnvironmentState(key, choose(started, continued), ended, episode_return, num_steps), timestep, info


def _problem(task: Task) -> str:
    """Describes what a task returns that differs from its contract; '' if nothing does."""
    key = jax.random.PRNGKey(0)
    state, first = jax.eval_shape(task.reset, key)
    new_state, arrival = jax.eval_shape(task.step, state, jnp.int32(0), key)
    wanted = jax.tree.map(
        lambda leaf: f'{leaf.dtype} {list(leaf.shape)}',
        task.spec.observation,
        is_leaf=lambda x: isinstance(x, ArraySpec),
    )
    before, after = _described(state), _described(new_state)
    if before != after:
        return f'step returns the state {after} for the state {before}; return one of the same shapes and dtypes'
    for function, observation in (('reset', first), ('step', arrival.observation)):
        if _described(observation) != wanted:
            return f'{function} returns the observation {_described(observation)}, and its spec is {wanted}'
    if task.spec.num_actions < 1:
        return f'its spec has num_actions {task.spec.num_actions}; there must be at least one'
    found = [_described(x) for x in (arrival.reward, arrival.terminated, arrival.truncated)]
    if found[0] != 'float32 []' or any(x != 'bool []' for x in found[1:]):
        return f'step returns reward, terminated, truncated as {", ".join(found)}; return float32 [], bool [], bool []'
    return ''


def _described(tree: PyTree) -> Any:
    return jax.tree.map(lambda x: f'{jnp.result_type(x)} {list(jnp.shape(x))}', tree)
