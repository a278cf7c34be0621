"""A suite of small tasks with one observation and action space, which two cores solve in minutes.

| task | what it is about |
|---|---|
| `minisuite/catch` | Catch, on a smaller board |
| `minisuite/catch_memory` | the same, with the ball in sight in the first frame only: needs memory |
| `minisuite/delayed_bandit` | a choice whose reward comes ten steps later |
| `minisuite/go_to_colour` | two objects, of which the instruction names one: needs the words |

In all of them there are 3 actions, and the best expected return is 1. An observation is {'board': [6, 5] float32,
'instruction': [4] int32}: what the task itself shows fills the board's first cells, and where a task has no instruction
all words are 0, as on DeepMind Lab's levels without language.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import dm_env
import numpy as np
from dm_env import specs

from impala_jax.environments.catch import Catch
from impala_jax.environments.delayed_bandit import DelayedBandit
from impala_jax.environments.go_to_colour import WORDS, GoToColour
from impala_jax.types import INSTRUCTION

_BOARD = (6, 5)
_NUM_WORDS = 4


class MinisuiteTask(dm_env.Environment):
    """An environment with the suite's observations."""

    def __init__(self, environment: Any):
        self._environment = environment

    def reset(self) -> dm_env.TimeStep:
        return self._convert(self._environment.reset())

    def step(self, action: int) -> dm_env.TimeStep:
        return self._convert(self._environment.step(action))

    def observation_spec(self) -> dict[str, specs.Array]:
        return {
            'board': specs.BoundedArray(_BOARD, np.float32, 0, 1, name='board'),
            INSTRUCTION: specs.BoundedArray((_NUM_WORDS,), np.int32, 0, len(WORDS) - 1, name=INSTRUCTION),
        }

    def action_spec(self) -> specs.DiscreteArray:
        return self._environment.action_spec()

    def _convert(self, timestep: dm_env.TimeStep) -> dm_env.TimeStep:
        seen: Any = timestep.observation
        if not isinstance(seen, dict):
            seen = {'board': seen, INSTRUCTION: np.zeros(_NUM_WORDS, np.int32)}
        board = np.zeros(_BOARD, np.float32)
        board.flat[: seen['board'].size] = seen['board'].ravel()
        return timestep._replace(observation={'board': board, INSTRUCTION: seen[INSTRUCTION]})


def _task(builder: Callable[..., dm_env.Environment], seed: int) -> MinisuiteTask:
    return MinisuiteTask(builder(seed=seed))


_ENVIRONMENTS: dict[str, Callable[..., dm_env.Environment]] = {
    'catch': functools.partial(Catch, *_BOARD),
    'catch_memory': functools.partial(Catch, *_BOARD, memory=True),
    # Little noise: a return should tell how good the choice was.
    'delayed_bandit': functools.partial(DelayedBandit, length=10, noise=0.02),
    'go_to_colour': functools.partial(GoToColour, columns=_BOARD[1]),
}
TASKS: dict[str, Callable[..., MinisuiteTask]] = {
    name: functools.partial(_task, builder) for name, builder in _ENVIRONMENTS.items()
}
"""By name: builds the task from a seed."""
