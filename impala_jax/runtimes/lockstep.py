"""One thread: act, learn, act, learn, so that a run can be repeated bit for bit and the policy lag is exact."""

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
from impala_jax.runtimes.host_share import host_share
from impala_jax.trajectory_queue import concatenate
from impala_jax.types import Closed, PyTree

_PATIENCE_S = 2.0  # How long environments may take to answer after a signal.

_logger = logging.getLogger(__name__)


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int | None:
    """Trains until the budget is spent or `stop` is set; returns the updates done in all.

    An update consumes one batch, acted with the parameters of exactly `config.policy_lag` updates before (of the
    first parameters, in the first updates). With a lag of 0 this is batched A2C.

    None: it was stopped while environments were busy. Actors have acted for an update that was not made, and going on
    from here would be another run: the last checkpoint stands.

    Raises:
      ConfigError: a batch that is no multiple of all actors' environments.
    """
    share = host_share(config)
    num_envs = share.num_actors * share.actor.num_envs
    if config.num_fresh % num_envs:
        fresh = f'the {config.num_fresh} fresh trajectories of ' if config.num_replayed else ''
        raise ConfigError(
            f'lockstep: {fresh}learner.batch_size {config.learner.batch_size} is no multiple of the '
            f'{num_envs} environments (actor.num_actors x actor.num_envs)'
        )
    training = nodes.make_training(config, agent, workdir, publish=lambda *_: None)
    loop, metrics, checkpoints = training
    _require_same_environments(config, training)
    patience = _Patience(stop)
    actors: list[Actor] = []
    replay = nodes.make_replay(share)
    history: collections.deque[tuple[int, PyTree]] = collections.deque(maxlen=config.policy_lag + 1)
    started = loop.num_updates
    try:
        for i in range(share.num_actors):
            actors.append(nodes.make_actor(share, agent, i, loop.num_updates, closed=patience.is_over))
        restored = checkpoints.restored_runtime_state
        for version in sorted(restored.get('history', {}), key=int):
            history.append((int(version), restored['history'][version]))
        for i, state in restored.get('actors', {}).items():
            actors[int(i)].set_state(np.asarray(state).tobytes())
        replay.restore(nodes.restored_replay(config, workdir, training), agent.trajectory_structure())
        if not history:
            history.append((loop.num_updates, loop.params))
        if loop.num_updates and not restored.get('history'):
            _logger.warning(
                'the checkpoint is not of a lockstep run: new episodes start, and the policy lag grows from 0 to %d',
                config.policy_lag,
            )
        can_save_actors = _states(actors) is not None
        loop.begin()
        if config.num_replayed:
            metrics.log_with(lambda: {'replay_size': len(replay)})

        def runtime_state() -> dict[str, Any]:
            if history[-1][0] != loop.num_updates:  # The update raised after it was made.
                history.append((loop.num_updates, loop.params))
            state: dict[str, Any] = {
                'history': {str(version): params for version, params in history},
                'replay': replay.state(),
            }
            states = _states(actors) if can_save_actors else None
            if states is not None:
                state['actors'] = states
            return state

        checkpoints.save_with(runtime_state)
        try:
            while not loop.done and not stop.is_set():
                started = loop.num_updates
                version, params = history[0]
                patience.has_end = True
                unrolls = [
                    actor.unroll(version, params) for _ in range(config.num_fresh // num_envs) for actor in actors
                ]
                patience.has_end = False
                loop.step(loop.put(replay.mix(concatenate(unrolls))))
                history.append((loop.num_updates, loop.params))
                if loop.num_updates % config.logging.interval_updates == 0:
                    metrics.log(loop)
                if checkpoints.is_due:
                    checkpoints.save(loop)
            loop.finish()
        except Closed:
            if can_save_actors:
                return None
            checkpoints.save(loop)
        except BaseException:
            if loop.num_updates > started or not can_save_actors:
                checkpoints.save(loop)
            else:
                # Actors have acted for an update that was not made: going on from here would be another run.
                _logger.warning('the same command goes on from the last checkpoint, and repeats what came after it')
            raise
    finally:
        loop.close()
        for actor in actors:
            actor.environment.close()
    return loop.num_updates


class _Patience:
    """How long environments are waited for once `stop` is set."""

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
    """The actors' states by index, as bytes; None, with a warning, if their environments cannot be saved."""
    try:
        return {str(i): np.frombuffer(actor.get_state(), np.uint8) for i, actor in enumerate(actors)}
    except NotImplementedError as reason:
        _logger.warning('a resumed run will start new episodes: %s', reason)
        return None


def _require_same_environments(config: Config, training: Training) -> None:
    """Raises ConfigError where the checkpoint's environments do not fit the actors."""
    old = training.checkpoints.restored_config
    if old is None or 'actors' not in training.checkpoints.restored_runtime_state:
        return
    for name in ('actor.num_actors', 'actor.num_envs'):
        if get(old, name) != get(config, name):
            raise ConfigError(
                f'lockstep: {name} is {get(old, name)} in the checkpoint, {get(config, name)} now, but a resumed run '
                'goes on with the environments it had; use the same number, or another --workdir'
            )
