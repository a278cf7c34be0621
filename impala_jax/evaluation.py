"""Playing whole games with the training's own unroll code, and scoring them."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np

from impala_jax import environments
from impala_jax.actor import Actor
from impala_jax.agent import Agent
from impala_jax.config import EnvironmentConfig
from impala_jax.types import Closed, PyTree


_UNROLL_LENGTH = 20  # Steps between two looks at whether enough games have ended.


class Evaluation(NamedTuple):
    """Scores of whole games."""

    returns: list[float]  # undiscounted, raw

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def median(self) -> float:
        return float(np.median(self.returns))

    @property
    def stderr(self) -> float:
        """Standard error of the mean; 0 for a single game."""
        n = len(self.returns)
        return float(np.std(self.returns, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


class Evaluator:
    """Plays games; its environments are made once.

    Args:
      agent: the agent.
      config: the task; evaluation always plays whole games, not lives.
      episodes: games a call of `play`.
      num_envs: games played at the same time, at most `episodes`.
      seed: of environments and actions.
      greedy: play the most likely action instead of sampling.
    """

    def __init__(
        self, agent: Agent, config: EnvironmentConfig, *, episodes: int, num_envs: int, seed: int, greedy: bool = False
    ):
        num_envs = min(num_envs, episodes)
        # A fixed number of games each: the first N to end over all environments would favour short games.
        self._quota = np.full([num_envs], episodes // num_envs) + (np.arange(num_envs) < episodes % num_envs)
        environment = environments.make(config, num_envs, seed, evaluation=True)
        self._actor = Actor(agent, environment, _UNROLL_LENGTH, seed, greedy=greedy)
        self._seed = seed

    def play(self, version: int, params: PyTree, stop: threading.Event | None = None) -> Evaluation:
        """Plays `episodes` games from their start.

        Raises:
          Closed: `stop` was set.
        """
        # From a reset, so that no game half played with older parameters is counted.
        self._seed += 1
        self._actor.reset(self._seed)
        returns: list[list[float]] = [[] for _ in self._quota]
        while any(len(r) < quota for r, quota in zip(returns, self._quota, strict=True)):
            if stop is not None and stop.is_set():
                raise Closed
            episode_return = self._actor.unroll(version, params).info.episode_return
            for t, i in np.argwhere(~np.isnan(episode_return)):
                if len(returns[i]) < self._quota[i]:
                    returns[i].append(float(episode_return[t, i]))
        return Evaluation([value for r in returns for value in r])

    def close(self) -> None:
        """Ends the environments."""
        self._actor.environment.close()
