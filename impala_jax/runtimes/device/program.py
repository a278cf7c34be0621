"""Updates as one compiled program: environments, acting, replay and learning, without the host in between."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from impala_jax.actor import ActorState, game_versions
from impala_jax.agent import Agent
from impala_jax.config import Config, ConfigError
from impala_jax.environments.functional.base import EnvironmentState, FunctionalEnvironment
from impala_jax.learner import Learner, LearnerState
from impala_jax.trajectory_queue import map_batch_axis
from impala_jax.types import Array, Counts, PyTree, TimeStep, Trajectory


class ReplayState(NamedTuple):
    """A ring of trajectories. The capacity is the size of the first axis of `items`."""

    items: Trajectory | tuple[()]  # Leaves [capacity, T + 1, ...] or [capacity, ...]; () without replay.
    num_added: Array  # [] int32
    num_batches: Array  # [] int32, batches sampled; with `key` it determines the next samples.
    key: Array


class Carry(NamedTuple):
    """All that an update changes."""

    learner: LearnerState
    history: PyTree  # Parameters, [slots, ...]; those of version n are at n modulo the number of slots.
    oldest: Array  # [] int32, the first version in the history; the policy lag grows from 0 after it.
    actor: ActorState
    environments: EnvironmentState  # [N, ...]
    replay: ReplayState


class Output(NamedTuple):
    """Results of an update, for the host."""

    logs: dict[str, Array]
    counts: Counts  # New trajectories come first.
    replay_size: Array  # [] int32
    finite: Array  # [2] bool, whether the new trajectories have only finite rewards, and only finite observations.


class DeviceProgram:
    """The updates of lockstep as pure functions.

    With the same keys and without replay, the results are those of the runtime `lockstep` with one actor: each update
    consumes one unroll of all environments, acted with the parameters of exactly `lag` updates before.

    Args:
      agent: Agent that acts.
      learner: Learner that is updated; its mesh is that of the program.
      environment: The environment.
      unroll_length: Number of steps per trajectory, T.
      num_fresh: Number of environments, N.
      num_replayed: Number of replayed trajectories per batch.
    """

    def __init__(
        self,
        agent: Agent,
        learner: Learner,
        environment: FunctionalEnvironment,
        unroll_length: int,
        num_fresh: int,
        num_replayed: int = 0,
    ):
        self._agent, self._learner, self._environment = agent, learner, environment
        self._unroll_length, self._num_fresh, self._num_replayed = unroll_length, num_fresh, num_replayed

    def shardings(self, carry: Carry) -> Carry:
        """Returns where the leaves of a carry lie: environments are split over the mesh, the rest is replicated."""
        replicated = self._learner.replicated

        def split(tree: PyTree, axis: int = 0) -> Any:
            spec = PartitionSpec(*[None] * axis, 'batch')
            return jax.tree.map(lambda _: NamedSharding(replicated.mesh, spec), tree)

        everywhere = jax.tree.map(lambda _: replicated, carry)
        actor = everywhere.actor._replace(
            timestep=split(carry.actor.timestep),
            core=split(carry.actor.core),
            game_version=split(carry.actor.game_version),
            game_over=split(carry.actor.game_over, 1),
        )
        return everywhere._replace(actor=actor, environments=split(carry.environments))

    def run(
        self, carry: Carry, hyperparameters: Any, lag: Array, num_updates: Array, size: int
    ) -> tuple[Carry, Output]:
        """Makes updates.

        Args:
          carry: State before the first one.
          hyperparameters: As for `Learner.pure_update`.
          lag: Policy lag, [] int32, at most the number of slots of the history less one.
          num_updates: Number of updates, [] int32, at most `size`. It is an input of the compiled program.
          size: Number of rows of the output.

        Returns:
          The state after the last one, and the output of each update, [size, ...].
        """
        step = functools.partial(self.update, hyperparameters=hyperparameters, lag=lag)
        _, output = jax.eval_shape(step, carry)
        rows = jax.tree.map(lambda x: jnp.zeros([size, *x.shape], x.dtype), output)

        def body(i: Array, state: tuple[Carry, Output]) -> tuple[Carry, Output]:
            carry, row = step(state[0])
            return carry, jax.tree.map(lambda rows, x: rows.at[i].set(x), state[1], row)

        return jax.lax.fori_loop(0, num_updates, body, (carry, rows))

    def update(self, carry: Carry, hyperparameters: Any, lag: Array) -> tuple[Carry, Output]:
        """Makes one update; see `run`."""
        num_updates = carry.learner.num_updates
        version = jnp.maximum(num_updates - lag, carry.oldest)
        params = jax.tree.map(lambda ring: ring[_slot(ring, version)], carry.history)
        actor, environments, trajectories = self._act(params, version, carry.actor, carry.environments)
        timesteps = trajectories.timesteps
        finite = jnp.stack([_all_finite(timesteps.reward), _all_finite(timesteps.observation)])
        replay = carry.replay
        if self._num_replayed:
            replay, trajectories = self._mix(replay, trajectories)
        learner, logs = self._learner.pure_update(carry.learner, trajectories.experience, hyperparameters)
        history = jax.tree.map(
            lambda ring, new: ring.at[_slot(ring, learner.num_updates)].set(new), carry.history, learner.params
        )
        carry = Carry(learner, history, carry.oldest, actor, environments, replay)
        return carry, Output(logs, trajectories.counts, _size(replay), finite)

    def _act(
        self, params: PyTree, version: Array, actor: ActorState, environments: EnvironmentState
    ) -> tuple[ActorState, EnvironmentState, Trajectory]:
        """Takes T steps, as `Actor.act` does."""

        def step(state, t: Array):
            environments, timestep, core = state
            key = jax.random.fold_in(actor.key, actor.num_steps + t)
            acted = self._agent.step(params, key, timestep, core, unroll=self._learner.unroll)
            environments, timestep, info = jax.vmap(self._environment.step)(environments, acted.action)
            return (environments, timestep, acted.state), (timestep, acted.logits, info)

        state = (environments, actor.timestep, actor.core)
        state, (arrived, logits, info) = jax.lax.scan(step, state, jnp.arange(self._unroll_length, dtype=jnp.int32))
        environments, timestep, core = state
        timesteps: TimeStep = jax.tree.map(
            lambda first, rest: jnp.concatenate([first[None], rest]), actor.timestep, arrived
        )
        over = jnp.concatenate([actor.game_over, info.game_over])
        game_version = game_versions(version, timesteps.step_type, over, actor.game_version, jnp)
        versions = jnp.full([self._num_fresh], version, jnp.int32)
        task = jnp.zeros([self._num_fresh], jnp.int32)
        trajectories = Trajectory(timesteps, logits, actor.core, info, versions, task, game_version)
        num_steps = actor.num_steps + self._unroll_length
        return (
            ActorState(actor.key, num_steps, timestep, core, game_version[-1], over[-2:]),
            environments,
            trajectories,
        )

    def _mix(self, replay: ReplayState, fresh: Trajectory) -> tuple[ReplayState, Trajectory]:
        """Adds new trajectories to replay and samples from it, as `Replay.mix` does."""
        capacity = jax.tree.leaves(replay.items)[0].shape[0]
        num_kept = min(self._num_fresh, capacity)
        first = replay.num_added + self._num_fresh - num_kept
        slots = (first + jnp.arange(num_kept, dtype=jnp.int32)) % capacity

        def add(ring: Array, new: Array) -> Array:
            return ring.at[slots].set(new[-num_kept:], unique_indices=True)

        items: Any = jax.tree.map(add, replay.items, batch_first(fresh))
        replay = replay._replace(items=items, num_added=replay.num_added + self._num_fresh)
        key = jax.random.fold_in(replay.key, replay.num_batches)
        indices = jax.random.randint(key, [self._num_replayed], 0, _size(replay))
        sampled = batch_second(jax.tree.map(lambda ring: ring[indices], items))
        mixed = map_batch_axis(lambda axis, *parts: jnp.concatenate(parts, axis), fresh, sampled)
        return replay._replace(num_batches=replay.num_batches + 1), mixed


def no_replay() -> ReplayState:
    """Returns the state without replay."""
    zero = np.int32(0)
    return ReplayState((), zero, zero, np.zeros([2], np.uint32))


def empty_items(agent: Agent, unroll_length: int, capacity: int, xp: Any) -> Trajectory:
    """Returns `ReplayState.items` of zeros, as arrays of the module `xp`, `numpy` or `jax.numpy`."""
    empty = batch_first(agent.empty_trajectory(unroll_length, 1))
    return jax.tree.map(lambda x: xp.zeros([capacity, *x.shape[1:]], x.dtype), empty)


def history(versions: dict[int, PyTree], slots: int) -> PyTree:
    """Returns the ring of parameters, in NumPy; the newest `slots` of `versions` are consecutive."""
    newest = max(versions)
    kept = {version % slots: params for version, params in versions.items() if version > newest - slots}
    rows = [kept.get(slot, versions[newest]) for slot in range(slots)]
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *rows)


def batch_first(trajectories: Trajectory) -> Trajectory:
    """Returns trajectories with the batch as first axis of all leaves."""
    return map_batch_axis(lambda axis, x: x.swapaxes(0, axis), trajectories)


batch_second = batch_first  # The exchange of the first two axes is its own inverse.


def describe_not_finite(finite: np.ndarray, name: str, num_updates: int) -> str:
    """Describes values of an environment that are not finite; '' if all are.

    Args:
      finite: `Output.finite` of several updates, [updates, 2].
      name: Name of the environment.
      num_updates: Number of updates before the first of these.
    """
    if finite.all():
        return ''
    update, part = np.argwhere(~finite)[0]
    what = ('reward', 'observation')[part]
    update += num_updates
    return f'an environment of {name!r} returned a value of the {what} that is not finite, for update {update}'


def require_memory(num_bytes: int, config: Config) -> None:
    """Raises ConfigError if the state of a run exceeds the memory of this machine."""
    there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    if num_bytes > there:
        replay = f'replay.capacity {config.replay.capacity}, ' if config.num_replayed else ''
        raise ConfigError(
            f'device: the state of the run takes {num_bytes / 2**30:.1f} GiB, and this machine has '
            f'{there / 2**30:.1f}; lower {replay}policy_lag {config.policy_lag} or the network'
        )


def _all_finite(tree: PyTree) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves] or [True]).all()


def _slot(ring: Array, version: Array) -> Array:
    return version % ring.shape[0]


def _size(replay: ReplayState) -> Array:
    """Number of trajectories in replay."""
    leaves = jax.tree.leaves(replay.items)
    return jnp.minimum(replay.num_added, leaves[0].shape[0] if leaves else 0)
