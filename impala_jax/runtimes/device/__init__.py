"""Runtime `device`: environments in JAX, acting, replay and learning in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np

from impala_jax.agent import Agent
from impala_jax.build import Training
from impala_jax.config import Config, ConfigError
from impala_jax.environments import EnvironmentFailure
from impala_jax.environments.functional.twins import twin
from impala_jax.environments.functional.vector import FunctionalVectorEnvironment
from impala_jax.runtimes import nodes
from impala_jax.runtimes.device import program
from impala_jax.runtimes.device.pace import Pace
from impala_jax.runtimes.device.program import Carry, DeviceProgram, Output, ReplayState
from impala_jax.runtimes.host_share import HostShare, host, host_share
from impala_jax.trajectory_queue import Replay, from_arrays, to_arrays

_MAX_UPDATES = 256  # Largest number of updates in a call.

_logger = logging.getLogger(__name__)


def require_supported(config: Config) -> None:
    """Raises ConfigError if the runtime does not support the configuration."""
    own, wanted = config.environment.name, twin(config.environment).name
    if own != wanted:
        raise ConfigError(
            f"environment.name {own!r}: the runtime 'device' compiles environments in JAX; use --environment.name "
            f'{wanted}, or another runtime'
        )
    if host()[1] > 1:
        raise ConfigError(f"the runtime 'device' runs on one host, not on {host()[1]}; use another runtime")
    if config.pbt.member is not None:
        raise ConfigError("the runtime 'device' has no population based training; use --runtime lockstep")


def one_actor(config: Config) -> Config:
    """Returns the configuration with one actor, whose environments fill the new part of a batch."""
    return dataclasses.replace(config, actor=dataclasses.replace(config.actor, num_actors=1, num_envs=config.num_fresh))


def run(config: Config, agent: Agent, workdir: Path, stop: threading.Event) -> int:
    """Trains until the budget is spent or `stop` is set.

    The updates are those of `lockstep` with one actor of `num_fresh` environments, and so are the checkpoints: either
    runtime continues a run of the other. Only the samples from replay are drawn by another generator.

    Args:
      config: Configuration returned by `one_actor`.
      agent: Agent to train.
      workdir: Folder of the run.
      stop: Event that ends the run.

    Returns:
      The total number of updates.

    Raises:
      ConfigError: If the environments do not divide over the devices.
    """
    share = host_share(config)
    training = nodes.make_training(config, agent, workdir, publish=lambda *_: None)
    num_devices = training.learner.num_local_devices
    if config.num_fresh % num_devices:
        raise ConfigError(
            f'device: the {config.num_fresh} new trajectories of a batch do not divide over {num_devices} devices; '
            f'choose a multiple of {num_devices}, or set learner.num_devices'
        )
    loop, metrics, checkpoints, _ = training
    updates = _Updates(config, share, agent, training, workdir)
    try:
        loop.begin()
        if config.num_replayed:
            metrics.log_with(lambda: {'replay_size': updates.replay_size})
        checkpoints.save_with(updates.state)
        pace = Pace(config, updates.size)
        while not loop.done and not stop.is_set():
            with pace.call(loop.num_updates) as count:
                updates.make(count)
            if loop.num_updates % config.logging.interval_updates == 0:
                metrics.log(loop)
            if checkpoints.is_due:
                checkpoints.save(loop)
        loop.finish()
    except BaseException:
        if updates.can_be_saved:
            checkpoints.save(loop)
        raise
    finally:
        loop.close()
    return loop.num_updates


class _Updates:
    """The state of the program, and its conversion from and to the checkpoints of `lockstep`."""

    def __init__(self, config: Config, share: HostShare, agent: Agent, training: Training, workdir: Path):
        self.replay_size = 0
        """Number of trajectories in replay."""
        self.can_be_saved = True
        """Whether the state is there; it is donated to each call."""
        self._training, self._agent = training, agent
        self._lag = np.int32(config.policy_lag)
        self._actor = nodes.make_actor(share, agent, 0, training.loop.num_updates)
        environment = self._actor.environment
        assert isinstance(environment, FunctionalVectorEnvironment)
        self._environment = environment
        self._capacity = share.replay_capacity
        self._replay_seed = share.node_seed(2, 0)
        carry = self._restored(config, workdir)
        inner = DeviceProgram(
            agent, training.learner, environment.environment, share.unroll_length, share.num_fresh, share.num_replayed
        )
        shardings = inner.shardings(carry)
        self._carry: Carry = jax.device_put(carry, shardings)
        self.size = min(_MAX_UPDATES, config.logging.interval_updates)
        """Largest number of updates in a call."""
        self._run = jax.jit(
            functools.partial(inner.run, size=self.size),
            donate_argnums=0,
            out_shardings=(shardings, None),
        )

    def make(self, num_updates: int) -> None:
        """Makes updates in one call, and counts them."""
        loop, learner = self._training.loop, self._training.learner
        state = loop.state
        assert state is not None
        self.can_be_saved = False
        carry, output = self._run(
            self._carry._replace(learner=state), learner.inputs(loop.hyperparameters), self._lag, np.int32(num_updates)
        )
        self._carry = carry
        rows: Output = jax.tree.map(np.asarray, output)
        problem = program.describe_not_finite(
            rows.finite[:num_updates], self._environment.environment.name, loop.num_updates
        )
        if problem:
            raise EnvironmentFailure(problem)
        self.replay_size = int(rows.replay_size[num_updates - 1])
        updates = []
        for i in range(num_updates):
            row: Output = jax.tree.map(lambda x, i=i: x[i], rows)
            updates.append((row.logs, row.counts))
        self.can_be_saved = True
        loop.advance(carry.learner, updates)

    def state(self) -> dict[str, Any]:
        """Returns the arrays for a checkpoint."""
        carry: Any = jax.tree.map(np.asarray, self._carry._replace(learner=None))  # pyright: ignore
        newest, oldest = self._training.loop.num_updates, int(carry.oldest)
        slots = int(self._lag) + 1
        versions = range(max(oldest, newest - slots + 1), newest + 1)
        self._actor.state, self._environment.state = carry.actor, carry.environments
        return {
            'history': {str(v): jax.tree.map(lambda ring, v=v: ring[v % slots], carry.history) for v in versions},
            'replay': self._saved_replay(carry.replay),
            'actors': {'0': np.frombuffer(self._actor.get_state(), np.uint8)},
        }

    def _restored(self, config: Config, workdir: Path) -> Carry:
        """The state from the checkpoint, or that of a new run."""
        loop, checkpoints = self._training.loop, self._training.checkpoints
        restored = checkpoints.restored_runtime_state
        if 'actors' in restored:
            assert checkpoints.restored_config is not None
            old = checkpoints.restored_config.actor
            if (old.num_actors, old.num_envs) != (1, config.num_fresh):
                raise ConfigError(
                    f'device: the checkpoint has actor.num_actors {old.num_actors} with actor.num_envs {old.num_envs}, '
                    f'and this run 1 with {config.num_fresh}, but a resumed run continues with the same environments; '
                    'use --runtime lockstep, or another --workdir'
                )
            self._actor.set_state(np.asarray(restored['actors']['0']).tobytes())
        elif loop.num_updates:
            _logger.warning(
                'the checkpoint is of another runtime: new episodes start, and the policy lag grows from 0 to %d',
                config.policy_lag,
            )
        versions = {int(version): params for version, params in restored.get('history', {}).items()}
        versions[loop.num_updates] = loop.params
        slots = config.policy_lag + 1
        actor = self._actor.begin()
        assert loop.state is not None
        return Carry(
            learner=loop.state,
            history=program.history(versions, slots),
            oldest=np.int32(max(min(versions), loop.num_updates - slots + 1)),
            actor=actor,
            environments=self._environment.state,
            replay=self._restored_replay(nodes.restored_replay(config, workdir, self._training), config),
        )

    def _restored_replay(self, saved: dict[str, Any], config: Config) -> ReplayState:
        if not config.num_replayed:
            return program.no_replay()
        unroll_length = config.learner.unroll_length
        of_one = self._agent.empty_trajectory(unroll_length, 1)
        program.require_memory(self._capacity * sum(x.nbytes for x in jax.tree.leaves(of_one)), config)
        # The host's replay checks the arrays, and orders them.
        replay = Replay(self._capacity, config.num_replayed, self._replay_seed)
        replay.restore(saved, self._agent.trajectory_structure())
        ordered = replay.state()
        trajectories = from_arrays(ordered, self._agent.trajectory_structure())
        items = program.empty_items(self._agent, unroll_length, self._capacity, np)
        num_added, num_batches = ordered['counts']
        if trajectories is not None:
            size = len(replay)
            slots = np.arange(num_added - size, num_added) % self._capacity
            for ring, own in zip(
                jax.tree.leaves(items), jax.tree.leaves(program.batch_first(trajectories)), strict=True
            ):
                ring[slots] = own
        self.replay_size = len(replay)
        with jax.default_device(jax.local_devices(backend='cpu')[0]):
            key = np.asarray(jax.random.PRNGKey(self._replay_seed))
        return ReplayState(items, np.int32(num_added), np.int32(num_batches), key)

    def _saved_replay(self, replay: ReplayState) -> dict[str, Any]:
        num_added, num_batches = int(replay.num_added), int(replay.num_batches)
        counts = {'counts': np.array([num_added, num_batches], np.int64)}
        if not self.replay_size:
            return {**counts, **to_arrays(None)}
        slots = np.arange(num_added - self.replay_size, num_added) % self._capacity
        items: Any = jax.tree.map(lambda ring: ring[slots], replay.items)
        return {**counts, **to_arrays(program.batch_second(items))}
