"""One thread: act, learn, act, learn, so that a run can be repeated bit for bit and the policy lag is exact."""

from __future__ import annotations

import collections
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np

from impala_jax.agent import Agent
from impala_jax.config import Config, ConfigError
from impala_jax.learner import LearnerLoop
from impala_jax.parameter_store import LocalParameterStore
from impala_jax.runtimes import nodes
from impala_jax.trajectory_queue import concatenate
from impala_jax.types import PyTree

_logger = logging.getLogger(__name__)


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int:
    """Trains until the budget is spent or `stop` is set; returns the updates done in all.

    An update consumes one batch, acted with the parameters of exactly `config.policy_lag` updates before (of the
    first parameters, in the first updates). With a lag of 0 this is batched A2C.

    Raises:
      ConfigError: a batch that is no multiple of all actors' environments.
    """
    num_envs = config.actor.num_actors * config.actor.num_envs
    if config.num_fresh % num_envs:
        fresh = f'the {config.num_fresh} fresh trajectories of ' if config.num_replayed else ''
        raise ConfigError(
            f'lockstep: {fresh}learner.batch_size {config.learner.batch_size} is no multiple of the '
            f'{num_envs} environments (actor.num_actors x actor.num_envs)'
        )
    loop = LearnerLoop(config, agent, workdir, LocalParameterStore(config.timeout_s))
    actors = [nodes.make_actor(config, agent, i, loop.num_updates) for i in range(config.actor.num_actors)]
    replay = nodes.make_replay(config)
    history: collections.deque[tuple[int, PyTree]] = collections.deque(maxlen=config.policy_lag + 1)

    def runtime_state() -> dict[str, Any]:
        state: dict[str, Any] = {
            'history': {str(version): params for version, params in history},
            'replay': replay.state(),
        }
        try:
            state['actors'] = {str(i): np.frombuffer(actor.get_state(), np.uint8) for i, actor in enumerate(actors)}
        except NotImplementedError as reason:
            _logger.warning('a resumed run will start its episodes anew: %s', reason)
        return state

    try:
        restored = loop.restored_runtime_state
        for version in sorted(restored.get('history', {}), key=int):
            history.append((int(version), restored['history'][version]))
        for i, state in restored.get('actors', {}).items():
            actors[int(i)].set_state(np.asarray(state).tobytes())
        if 'replay' in restored:
            replay.restore(restored['replay'], agent.trajectory_structure())
        if not history:
            history.append((loop.num_updates, loop.params))
        loop.save_with(runtime_state)
        while not loop.done and not stop.is_set():
            version, params = history[0]
            unrolls = [actor.unroll(version, params) for _ in range(config.num_fresh // num_envs) for actor in actors]
            loop.step(loop.batch(replay.mix(concatenate(unrolls))))
            history.append((loop.num_updates, loop.params))
            if loop.num_updates % config.logging.interval_updates == 0:
                loop.log()
            if loop.save_due:
                loop.save()
        loop.finish()
    except BaseException:
        # What was learned is kept; the environments may be what failed, and are not.
        loop.save_with(dict)
        loop.save()
        raise
    finally:
        loop.close()
        for actor in actors:
            actor.environment.close()
    return loop.num_updates
