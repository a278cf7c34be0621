"""Statistics of the trajectories that a learner consumes: returns, policy lag, restarts and waiting time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from impala_jax.types import Counts, StepInfo

Number = float | int | np.number
RECENT_EPISODES = 100


class Histogram(NamedTuple):
    """A histogram; in `metrics.jsonl` an object of two lists."""

    edges: Sequence[float]  # [N + 1] edges of the bins.
    counts: list[int]  # [N] counts per bin.


class LearnerStats:
    """Statistics of batches other than the loss; `row` returns those since the last row.

    Args:
      tasks: Names of a suite's tasks, for statistics per task; () for a single environment.
    """

    def __init__(self, tasks: Sequence[str] = ()):
        self.episodes = 0  # Since the start of the run.
        self._recent: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._restarts = 0  # Since the start of the run.
        self._first_version = 0
        self._row_returns: list[float] = []
        self._tasks = tasks
        self._task_recent: list[deque[float]] = [deque(maxlen=RECENT_EPISODES) for _ in tasks]
        self._task_row_returns: list[list[float]] = [[] for _ in tasks]
        self._row_lags: list[np.ndarray] = []
        self._row_replay_lags: list[np.ndarray] = []
        self._row_wait_s = 0.0
        self._row_start = time.monotonic()

    def add_batch(
        self,
        info: StepInfo,
        lag: np.ndarray,
        num_fresh: int,
        task: np.ndarray | None = None,
        game_version: np.ndarray | None = None,
    ) -> None:
        """Adds a batch to the statistics.

        Args:
          info: `StepInfo` of the batch, [T, B].
          lag: Policy lag, [B]: number of updates between the parameters of the actor and those of the learner.
          num_fresh: Number of new trajectories, which come first in the batch; the replayed ones were counted before.
          task: Task ids, [B] int32; required if there are tasks.
          game_version: Version of the parameters at the start of the game, [T, B] int32, as in `Trajectory`; None
            counts all returns.
        """
        returns = np.asarray(info.episode_return, np.float64)[:, :num_fresh]
        did_end = np.asarray(info.episode_ended)[:, :num_fresh]
        self.episodes += int(did_end.sum())
        if game_version is not None:
            did_end = did_end & (game_version[:, :num_fresh] >= self._first_version)
        ended = returns[did_end].tolist()
        self._recent.extend(ended)
        self._row_returns.extend(ended)
        for task_id, (recent, row_returns) in enumerate(zip(self._task_recent, self._task_row_returns, strict=True)):
            own = np.asarray(task)[:num_fresh] == task_id
            ended = returns[:, own][did_end[:, own]].tolist()
            recent.extend(ended)
            row_returns.extend(ended)
        self._restarts += int(np.sum(info.restarts[:, :num_fresh]))
        self._row_lags.append(np.asarray(lag[:num_fresh]))
        if num_fresh < lag.size:
            self._row_replay_lags.append(np.asarray(lag[num_fresh:]))

    def add_batches(self, counts: Counts, lag: np.ndarray, num_fresh: int) -> None:
        """Adds the batches of several updates of a single task.

        Args:
          counts: Counts, [updates, T, B] or [updates, B].
          lag: Policy lag, [updates, B].
          num_fresh: As for `add_batch`.
        """
        returns, ended, restarts = (x[:, :, :num_fresh].reshape(-1, num_fresh) for x in counts.info)
        fresh = StepInfo(returns, ended, restarts)
        self.add_batch(fresh, lag[:, :num_fresh].ravel(), lag[:, :num_fresh].size)
        if num_fresh < lag.shape[1]:
            self._row_replay_lags.append(lag[:, num_fresh:].ravel())

    def add_wait(self, wait_s: float) -> None:
        """Adds time that the learner waited for a batch, in seconds."""
        self._row_wait_s += wait_s

    @property
    def mean_returns(self) -> list[float] | None:
        """The mean return of the last 100 episodes per task; None while a task has fewer episodes."""
        windows = self._task_recent or [self._recent]
        full = all(len(recent) == RECENT_EPISODES for recent in windows)
        return [float(np.mean(recent)) for recent in windows] if full else None

    def forget_returns(self, version: int = 0) -> None:
        """Drops all returns, and ignores later ones of games that began with parameters older than `version`.

        Such games are still being played, or wait in the queue.
        """
        self._first_version = version
        for returns in (self._recent, self._row_returns, *self._task_recent, *self._task_row_returns):
            returns.clear()

    def row(self) -> dict[str, Number | Histogram]:
        """The statistics since the last row, the totals of the run, and `learner_wait_fraction`.

        `policy_lag_mean`, `_min` and `_max` cover new trajectories, `policy_lag_histogram` covers replayed ones too. A
        suite adds `episode_return/<task>` and `episode_return_last_100/<task>`, and, when every task has finished an
        episode, `suite_return_last_100`, the mean of the latter over the tasks.
        """
        now = time.monotonic()
        row: dict[str, Number | Histogram] = {'episodes': self.episodes}
        if self._row_returns:
            row['episode_return'] = float(np.mean(self._row_returns))
        if self._recent:
            row['episode_return_last_100'] = float(np.mean(self._recent))
        for name, recent, returns in zip(self._tasks, self._task_recent, self._task_row_returns, strict=True):
            if returns:
                row[f'episode_return/{name}'] = float(np.mean(returns))
            if recent:
                row[f'episode_return_last_100/{name}'] = float(np.mean(recent))
        if self._tasks and all(self._task_recent):
            row['suite_return_last_100'] = float(np.mean([np.mean(recent) for recent in self._task_recent]))
        if self._row_lags:
            lags = np.concatenate(self._row_lags)
            row |= {
                'policy_lag_mean': float(lags.mean()),
                'policy_lag_min': int(lags.min()),
                'policy_lag_max': int(lags.max()),
                'policy_lag_histogram': _lag_histogram(np.concatenate(self._row_lags + self._row_replay_lags)),
            }
        if self._row_replay_lags:
            row['replay_lag_mean'] = float(np.concatenate(self._row_replay_lags).mean())
        row['environment_restarts'] = self._restarts
        row['learner_wait_fraction'] = min(1.0, self._row_wait_s / max(now - self._row_start, 1e-9))
        self._row_returns, self._row_lags, self._row_replay_lags = [], [], []
        self._task_row_returns = [[] for _ in self._tasks]
        self._row_wait_s, self._row_start = 0.0, now
        return row

    def state(self) -> dict[str, Any]:
        """The statistics as arrays of varying length, for a checkpoint."""
        tasks = {
            str(i): {'recent': np.array(recent, np.float64), 'row_returns': np.array(returns, np.float64)}
            for i, (recent, returns) in enumerate(zip(self._task_recent, self._task_row_returns, strict=True))
        }
        return {
            **({'tasks': tasks} if tasks else {}),
            'counts': np.array([self.episodes, self._restarts], np.int64),
            'first_version': np.array(self._first_version, np.int64),
            'recent': np.array(self._recent, np.float64),
            'row_returns': np.array(self._row_returns, np.float64),
            'row_lags': _joined(self._row_lags),
            'row_replay_lags': _joined(self._row_replay_lags),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`, a result of the method `state`."""
        for i in range(len(self._tasks)):
            self._task_recent[i] = deque(state['tasks'][str(i)]['recent'].tolist(), maxlen=RECENT_EPISODES)
            self._task_row_returns[i] = state['tasks'][str(i)]['row_returns'].tolist()
        self.episodes, self._restarts = (int(count) for count in state['counts'])
        self._first_version = int(state.get('first_version', 0))  # Older checkpoints lack it.
        self._recent = deque(state['recent'].tolist(), maxlen=RECENT_EPISODES)
        self._row_returns = state['row_returns'].tolist()
        self._row_lags = [state['row_lags']] if state['row_lags'].size else []
        self._row_replay_lags = [state['row_replay_lags']] if state['row_replay_lags'].size else []


def _lag_histogram(lags: np.ndarray) -> Histogram:
    """Histogram with the bins 0, 1, 2-3, 4-7, 8-15 and so on, up to the largest lag."""
    edges = [0, 1]
    while edges[-1] <= lags.max():
        edges.append(2 * edges[-1])
    return Histogram(edges, np.histogram(lags, np.array(edges) - 0.5)[0].tolist())


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
