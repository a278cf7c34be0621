"""The tasks of the minisuite in JAX; see `environments.minisuite`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from impala_jax.environments.functional.base import Arrival, Task
from impala_jax.environments.functional.catch import Catch
from impala_jax.environments.functional.delayed_bandit import DelayedBandit
from impala_jax.environments.functional.go_to_colour import GoToColour
from impala_jax.environments.minisuite import BOARD, NUM_WORDS
from impala_jax.types import INSTRUCTION, Array, ArraySpec, PyTree


class MinisuiteTask:
    """A task whose observations are converted to those of the suite."""

    def __init__(self, task: Any):
        self._task = task
        words = GoToColour().spec.observation[INSTRUCTION]
        board = ArraySpec(BOARD, np.dtype(np.float32))
        self.spec = task.spec._replace(observation={'board': board, INSTRUCTION: words})

    def reset(self, key: Array) -> tuple[PyTree, PyTree]:
        """See `Task.reset`."""
        state, seen = self._task.reset(key)
        return state, _converted(seen)

    def step(self, state: PyTree, action: Array, key: Array) -> tuple[PyTree, Arrival]:
        """See `Task.step`."""
        state, arrival = self._task.step(state, action, key)
        return state, arrival._replace(observation=_converted(arrival.observation))


def _converted(seen: Any) -> dict[str, Array]:
    if not isinstance(seen, dict):
        seen = {'board': seen, INSTRUCTION: jnp.zeros(NUM_WORDS, jnp.int32)}
    cells = seen['board'].ravel()
    board = jnp.pad(cells, (0, BOARD[0] * BOARD[1] - cells.size)).reshape(BOARD)
    return {'board': board, INSTRUCTION: seen[INSTRUCTION]}


def _task(make: Callable[[], Task]) -> MinisuiteTask:
    return MinisuiteTask(make())


TASKS: dict[str, Callable[[], MinisuiteTask]] = {
    name: functools.partial(_task, make)
    for name, make in {
        'catch': functools.partial(Catch, *BOARD),
        'catch_memory': functools.partial(Catch, *BOARD, memory=True),
        'delayed_bandit': functools.partial(DelayedBandit, length=10, noise=0.02),
        'go_to_colour': functools.partial(GoToColour, columns=BOARD[1]),
    }.items()
}
"""Functions that build a task, by its name."""
