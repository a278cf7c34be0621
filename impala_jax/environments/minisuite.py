"""A suite of small tasks with one observation and action space, which two cores solve in minutes.

| task | what it tests |
|---|---|
| `minisuite/catch` | Catch on a smaller board |
| `minisuite/catch_memory` | memory: the ball is visible in the first frame only |
| `minisuite/delayed_bandit` | credit assignment: a choice whose reward comes ten steps later |
| `minisuite/go_to_colour` | language: two objects, of which the instruction names one |

Every task has 3 actions and a best expected return of 1. An observation is {'board': [6, 5] float32, 'instruction': [4]
int32}. The task's own observation fills the first cells of the board, and in tasks without an instruction all word ids
are 0, as in DeepMind Lab's levels without language.
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

BOARD = (6, 5)
NUM_WORDS = 4


class MinisuiteTask(dm_env.Environment):
    """Wrapper that converts an environment's observations to those of the suite."""

    def __init__(self, environment: Any):
        self._environment = environment

    def reset(self) -> dm_env.TimeStep:
        """See `dm_env.Environment.reset`."""
        return self._convert(self._environment.reset())

    def step(self, action: int) -> dm_env.TimeStep:
        """See `dm_env.Environment.step`."""
        return self._convert(self._environment.step(action))

    def observation_spec(self) -> dict[str, specs.Array]:
        """The board, [6, 5] float32, and the instruction, [4] int32 word ids."""
        return {
            'board': specs.BoundedArray(BOARD, np.float32, 0, 1, name='board'),
            INSTRUCTION: specs.BoundedArray((NUM_WORDS,), np.int32, 0, len(WORDS) - 1, name=INSTRUCTION),
        }

    def action_spec(self) -> specs.DiscreteArray:
        """The actions of the wrapped environment."""
        return self._environment.action_spec()

    def _convert(self, timestep: dm_env.TimeStep) -> dm_env.TimeStep:
        seen: Any = timestep.observation
        if not isinstance(seen, dict):
            seen = {'board': seen, INSTRUCTION: np.zeros(NUM_WORDS, np.int32)}
        board = np.zeros(BOARD, np.float32)
        board.flat[: seen['board'].size] = seen['board'].ravel()
        return timestep._replace(observation={'board': board, INSTRUCTION: seen[INSTRUCTION]})


def _task(builder: Callable[..., dm_env.Environment], seed: int) -> MinisuiteTask:
    return MinisuiteTask(builder(seed=seed))


_ENVIRONMENTS: dict[str, Callable[..., dm_env.Environment]] = {
    'catch': functools.partial(Catch, *BOARD),
    'catch_memory': functools.partial(Catch, *BOARD, memory=True),
    # Little noise, so that the return shows how good the choice was.
    'delayed_bandit': functools.partial(DelayedBandit, length=10, noise=0.02),
    'go_to_colour': functools.partial(GoToColour, columns=BOARD[1]),
}
TASKS: dict[str, Callable[..., MinisuiteTask]] = {
    name: functools.partial(_task, builder) for name, builder in _ENVIRONMENTS.items()
}
"""Functions that build a task from a seed, by the task's name."""
