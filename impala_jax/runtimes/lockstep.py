"""Runtime `lockstep`: acts and learns in turn in one thread, so runs are reproducible and the policy lag is exact."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from impala_jax.actor import Actor
from impala_jax.agent import Agent
from impala_jax.build import Training
from impala_jax.config import Config, ConfigError, get
from impala_jax.runtimes import nodes
from impala_jax.runtimes.host_share import HostShare, host_share
from impala_jax.trajectory_queue import concatenate
from impala_jax.types import Closed, PyTree, Trajectory

_PATIENCE_S = 2.0  # Time for environments to answer after a signal.

_logger = logging.getLogger(__name__)


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int | None:
    """Trains until the budget is spent or `stop` is set.

    Each update consumes one batch, acted with the parameters of exactly `config.policy_lag` updates before (with the
    initial parameters in the first updates). With a lag of 0 this is batched A2C.

    Returns:
      The total number of updates. None if the run was stopped while environments were busy: actors have acted for an
      update that was not made, so only the last checkpoint continues the same run.

    Raises:
      ConfigError: If the batch size is not a multiple of the number of environments.
    """
    share = host_share(config)
    if config.num_fresh % share.num_envs:
        fresh = f'the {config.num_fresh} fresh trajectories of ' if config.num_replayed else ''
        raise ConfigError(
            f'lockstep: {fresh}learner.batch_size {config.learner.batch_size} is not a multiple of the '
            f'{share.num_envs} environments (actor.num_actors {share.num_actors} x actor.num_envs '
            f'{share.actor.num_envs}); set --actor.num-actors and --actor.num-envs to numbers whose product divides it'
        )
    training = nodes.make_training(config, agent, workdir, publish=lambda *_: None)
    loop, metrics, checkpoints, _ = training
    _require_same_environments(config, training)
    side = _ActingSide(config, share, agent, training, _Patience(stop))
    try:
        side.start(workdir)
        loop.begin()
        if config.num_replayed:
            metrics.log_with(lambda: {'replay_size': len(side.replay)})
        checkpoints.save_with(side.state)
        if not _train(config, training, side, stop):
            return None
    finally:
        loop.close()
        side.close()
    return loop.num_updates


def _train(config: Config, training: Training, side: _ActingSide, stop: threading.Event) -> bool:
    """Acts and learns in turn; returns False if actors have acted for an update that was not made."""
    loop, metrics, checkpoints, _ = training
    started = loop.num_updates
    try:
        while not loop.done and not stop.is_set():
            started = loop.num_updates
            loop.step(loop.put(side.act()))
            side.update()
            if loop.num_updates % config.logging.interval_updates == 0:
                metrics.log(loop)
            if checkpoints.is_due:
                checkpoints.save(loop)
        loop.finish()
    except Closed:
        if side.can_be_saved:
            return False
        checkpoints.save(loop)
    except BaseException:
        if loop.num_updates > started or not side.can_be_saved:
            checkpoints.save(loop)
        else:
            # Actors have acted for an update that was not made, so a checkpoint here would continue as another run.
            _logger.warning('the same command resumes from the last checkpoint, and repeats the updates after it')
        raise
    return True


class _ActingSide:
    """Actors, replay and the last parameters, which a checkpoint contains besides the learner."""

    def __init__(self, config: Config, share: HostShare, agent: Agent, training: Training, patience: _Patience):
        self.replay = nodes.make_replay(share)
        self.can_be_saved = False
        """Whether a resumed run continues with the same environments."""
        self._config, self._share, self._agent, self._training = config, share, agent, training
        self._patience = patience
        self._actors: list[Actor] = []
        self._history: collections.deque[tuple[int, PyTree]] = collections.deque(maxlen=config.policy_lag + 1)

    def start(self, workdir: Path) -> None:
        """Builds the actors, and restores their states, replay and parameters from the checkpoint."""
        loop, checkpoints = self._training.loop, self._training.checkpoints
        for i in range(self._share.num_actors):
            closed = self._patience.is_over
            self._actors.append(nodes.make_actor(self._share, self._agent, i, loop.num_updates, closed=closed))
        restored = checkpoints.restored_runtime_state
        for version in sorted(restored.get('history', {}), key=int):
            self._history.append((int(version), restored['history'][version]))
        for i, state in restored.get('actors', {}).items():
            self._actors[int(i)].set_state(np.asarray(state).tobytes())
        saved_replay = nodes.restored_replay(self._config, workdir, self._training)
        self.replay.restore(saved_replay, self._agent.trajectory_structure())
        if loop.num_updates and not self._history:
            _logger.warning(
                'the checkpoint is not of a lockstep run: new episodes start, and the policy lag grows from 0 to %d',
                self._config.policy_lag,
            )
        self.update()
        self.can_be_saved = _states(self._actors) is not None

    def act(self) -> Trajectory:
        """Returns a batch [T + 1, B], acted with the parameters of `policy_lag` updates before."""
        version, params = self._history[0]
        num_unrolls = self._share.num_fresh // self._share.num_envs
        self._patience.has_end = True
        unrolls = [actor.unroll(version, params) for _ in range(num_unrolls) for actor in self._actors]
        self._patience.has_end = False
        return self.replay.mix(concatenate(unrolls))

    def update(self) -> None:
        """Appends the learner's parameters to the history, if they are new."""
        loop = self._training.loop
        if not self._history or self._history[-1][0] != loop.num_updates:
            self._history.append((loop.num_updates, loop.params))

    def state(self) -> dict[str, Any]:
        """Returns the arrays for a checkpoint."""
        self.update()  # A hook may have raised after the update was made.
        state: dict[str, Any] = {
            'history': {str(version): params for version, params in self._history},
            'replay': self.replay.state(),
        }
        actors = _states(self._actors) if self.can_be_saved else None
        return state if actors is None else state | {'actors': actors}

    def close(self) -> None:
        for actor in self._actors:
            actor.environment.close()


class _Patience:
    """Limit on the wait for environments after `stop` is set."""

    def __init__(self, stop: threading.Event):
        self.has_end = True
        self._stop = stop
        self._since: float | None = None

    def is_over(self) -> bool:
        if not (self.has_end and self._stop.is_set()):
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > _PATIENCE_S


def _states(actors: Sequence[Actor]) -> dict[str, np.ndarray] | None:
    """The states of the actors as bytes, keyed by index; None, with a warning, if environments cannot be saved."""
    try:
        return {str(i): np.frombuffer(actor.get_state(), np.uint8) for i, actor in enumerate(actors)}
    except NotImplementedError as reason:
        _logger.warning('a resumed run will start new episodes: %s', reason)
        return None


def _require_same_environments(config: Config, training: Training) -> None:
    """Raises ConfigError if the number of environments differs from that in the checkpoint."""
    old = training.checkpoints.restored_config
    if old is None or 'actors' not in training.checkpoints.restored_runtime_state:
        return
    for name in ('actor.num_actors', 'actor.num_envs'):
        if get(old, name) != get(config, name):
            raise ConfigError(
                f'lockstep: {name} is {get(old, name)} in the checkpoint, {get(config, name)} now, but a resumed run '
                f'continues with the same environments; use --{name.replace("_", "-")} {get(old, name)}, or another '
                '--workdir'
            )
