"""The learner: one compiled update over a mesh of devices, of one host or of several, and the loop that feeds it.

On several hosts (`jax.distributed`) every host runs the same loop with its own part of each batch, and they meet only
inside the compiled update. It also tells each of them what is counted of the others' parts, and whether one of them has
to stop: then nobody learns from that batch, and all stop after the same update.
"""

from __future__ import annotations

import logging
import queue as queue_lib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from impala_jax import pbt, popart
from impala_jax.agent import Agent
from impala_jax.config import Config, ConfigError, OptimizerConfig
from impala_jax.loss import LOG_RHO_EDGES, impala_loss
from impala_jax.parameter_store import ParameterStore
from impala_jax.pbt import Hyperparameters, Member
from impala_jax.rundir.checkpoint import Checkpointer
from impala_jax.rundir.metrics import MetricsLogger
from impala_jax.rundir.run_config import write_run_config
from impala_jax.rundir.stats import Histogram, LearnerStats
from impala_jax.types import Array, Closed, PyTree, StepInfo, Trajectory

_logger = logging.getLogger(__name__)


class LearnerState(NamedTuple):
    """All that an update changes; replicated over the mesh, donated to each update."""

    params: PyTree  # float32
    opt_state: PyTree
    popart: PyTree  # PopArtState, or () without PopArt
    num_updates: Array  # int32, batches consumed, skipped updates included
    skipped: Array  # int32, updates skipped because the gradient was not finite
    skipped_in_a_row: Array  # int32


class HostNote(NamedTuple):
    """What a host says of itself with its part of a batch; one entry a device, D in all."""

    stop: Array  # bool [D], it has to stop
    waited_s: Array  # float32 [D], how long it waited for its part


class Gathered(NamedTuple):
    """What all hosts' parts of a batch hold beside what is learned from, the same on every host."""

    info: StepInfo  # [T, B]
    version: Array  # [B] int32
    task: Array  # [B] int32
    game_version: Array  # [T, B] int32
    note: HostNote  # [D]


class NonFiniteGradients(RuntimeError):
    """Too many updates in a row had gradients that are not finite."""


class HostLost(RuntimeError):
    """An update over several hosts failed: most likely one of them is gone."""


def make_schedule(kind: Literal['linear', 'constant'], start: Array | float, num_updates: int) -> optax.Schedule:
    """Updates applied -> `start`, a scalar; if `linear`, less and less of it, and 0 from `num_updates` on."""
    return optax.linear_schedule(start, 0.0 if kind == 'linear' else start, num_updates)


def scheduled(config: Config, hyperparameters: Hyperparameters, applied: Array | int) -> tuple[Array, Array]:
    """Learning rate and entropy cost after so many updates, scalars."""
    learning_rate = make_schedule(config.optimizer.schedule, hyperparameters.learning_rate, config.schedule_updates)
    entropy_cost = make_schedule(config.loss.entropy_schedule, hyperparameters.entropy_cost, config.schedule_updates)
    return jnp.asarray(learning_rate(applied)), jnp.asarray(entropy_cost(applied))


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, epsilon: Array | float | None = None
) -> optax.GradientTransformation:
    """Gradient clipping, then RMSProp as TensorFlow defines it (eps inside the root, accumulator from 1), or Adam.

    Args:
      config: which of them, and its constants.
      schedule: updates applied -> learning rate.
      epsilon: a scalar in place of the configuration's.
    """
    epsilon = config.epsilon if epsilon is None else epsilon
    if config.name == 'rmsprop':
        optimizer = optax.rmsprop(
            schedule,
            decay=config.decay,
            eps=epsilon,  # pyright: ignore[reportArgumentType]
            initial_scale=1.0,
            eps_in_sqrt=True,
            momentum=config.momentum or None,
        )
    else:
        optimizer = optax.adam(schedule, b1=config.b1, b2=config.b2, eps=epsilon)  # pyright: ignore[reportArgumentType]
    if np.isinf(config.max_grad_norm):
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)


class Learner:
    """The pure update, compiled over a one-axis mesh: parameters replicated, the batch split.

    Args:
      config: the experiment.
      agent: the agent.
      devices: the mesh, of jax.Device; by default those of `choose_devices`.

    Raises:
      ConfigError: a batch that the devices do not divide, or more devices asked for than there are.
    """

    def __init__(self, config: Config, agent: Agent, devices: Sequence[Any] | None = None):
        devices = choose_devices(config) if devices is None else devices
        mesh = Mesh(np.array(devices), ('batch',))
        if config.learner.batch_size % len(devices):
            raise ConfigError(
                f'learner.batch_size {config.learner.batch_size} does not divide over {len(devices)} devices; '
                f'choose a multiple of {len(devices)}, or set learner.num_devices'
            )
        self._config = config
        self._agent = agent
        self._num_local_devices = len(mesh.local_devices)
        replicated, time_major, batch_major = PartitionSpec(), PartitionSpec(None, 'batch'), PartitionSpec('batch')
        self._replicated = NamedSharding(mesh, replicated)
        self._time_major = NamedSharding(mesh, time_major)
        self._batch_major = NamedSharding(mesh, batch_major)
        # By itself XLA would gather all frames on every device: of time x batch in one axis it cannot split the batch.
        self._unroll: Any = jax.shard_map(
            agent.unroll,
            mesh=mesh,
            in_specs=(replicated, time_major, batch_major),
            out_specs=(time_major, batch_major),
            check_vma=False,  # It does not know `impala_jax.kernels.cpu`.
        )
        self._hyperparameters = Hyperparameters.of(config)
        self._compiled = jax.jit(self._update, donate_argnums=0, out_shardings=self._replicated)

    def init(self, key: Array) -> LearnerState:
        """A fresh state, on the mesh."""
        params = jax.jit(self._agent.init)(key)  # One program, which is cached.
        statistics = popart.init(self._agent.spec.num_tasks) if self._config.popart.enabled else ()
        optimizer = make_optimizer(self._config.optimizer, lambda _: self._hyperparameters.learning_rate)
        zero = np.zeros([], np.int32)
        return self.restore(LearnerState(params, optimizer.init(params), statistics, zero, zero, zero))

    def restore(self, state: LearnerState) -> LearnerState:
        """Puts a state, of several hosts that of the first, on the mesh, in memory of its own: updates donate it.

        Raises:
          HostLost: One of several hosts is gone.
        """
        try:
            state = multihost_utils.broadcast_one_to_all(state)
        except Exception as error:  # JAX raises what its transport does.
            if jax.process_count() == 1:
                raise
            raise HostLost(f'the state was not received from the first host: {str(error).splitlines()[0]}') from error
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, self._replicated, lambda _: np.array(x)), state
        )

    def put(self, trajectories: Trajectory) -> Trajectory:
        """Puts this host's part of a batch, numpy [T + 1, B], on the mesh."""
        time_major = {'timesteps', 'behaviour_logits', 'info', 'game_version'}
        return Trajectory(
            *(
                self._put(self._time_major if name in time_major else self._batch_major, part)
                for name, part in trajectories._asdict().items()
            )
        )

    def update(
        self,
        state: LearnerState,
        batch: Trajectory,
        hyperparameters: Hyperparameters | None = None,
        *,
        stop: bool = False,
        waited_s: float = 0.0,
    ) -> tuple[LearnerState, dict[str, Array], Gathered]:
        """The state after a batch of `put`, and scalars; other hyperparameters than the last time's compile nothing.

        Args:
          state: donated.
          batch: [T + 1, B].
          hyperparameters: in place of the configuration's.
          stop: this host has to stop. If any host has to, the state that is returned is the one before.
          waited_s: how long this host waited for its part of the batch.
        """
        values = self._hyperparameters if hyperparameters is None else hyperparameters
        note = HostNote(
            np.full([self._num_local_devices], stop), np.full([self._num_local_devices], waited_s, np.float32)
        )
        note = self._put(self._batch_major, note)
        return self._compiled(state, batch, Hyperparameters(*map(np.float32, values)), note)

    def _put(self, sharding: NamedSharding, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

    def _update(
        self, state: LearnerState, batch: Trajectory, hyperparameters: Hyperparameters, note: HostNote
    ) -> tuple[LearnerState, dict[str, Array], Gathered]:
        config = self._config
        # By this state's count, not the optimiser's own: a state copied from another run has that one's.
        applied = state.num_updates - state.skipped
        learning_rate, entropy_cost = scheduled(config, hyperparameters, applied)

        def loss_fn(params):
            output, _ = self._unroll(params, batch.timesteps, batch.initial_state)
            scale = None
            if config.popart.enabled:
                values, scale = popart.unnormalise(state.popart, output.values, batch.task)
                output = output._replace(values=values)
            return impala_loss(output, batch, config.loss, config.vtrace, scale, entropy_cost)

        (loss, details), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(gradient)
        optimizer = make_optimizer(config.optimizer, lambda _: learning_rate, hyperparameters.epsilon)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        statistics = state.popart
        if config.popart.enabled:
            statistics = popart.update(state.popart, details.value_targets, details.mask, batch.task, config.popart)
            baseline = popart.preserve_outputs(params['params']['baseline'], state.popart, statistics)
            params = {**params, 'params': {**params['params'], 'baseline': baseline}}

        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        goes_on = ~jnp.any(note.stop)
        params, opt_state, statistics = jax.tree.map(
            lambda new, old: jnp.where(finite & goes_on, new, old),
            (params, opt_state, statistics),
            (state.params, state.opt_state, state.popart),
        )
        state = LearnerState(
            params=params,
            opt_state=opt_state,
            popart=statistics,
            num_updates=state.num_updates + goes_on,
            skipped=state.skipped + (goes_on & ~finite),
            skipped_in_a_row=jnp.where(goes_on & finite, 0, state.skipped_in_a_row + (goes_on & ~finite)),
        )
        logs = {
            'loss': loss,
            **details.logs,
            'grad_norm': grad_norm,
            'learning_rate': learning_rate,
            'entropy_cost': entropy_cost,
            'skipped_updates': state.skipped,
            'skipped_in_a_row': state.skipped_in_a_row,
        }
        return state, logs, Gathered(batch.info, batch.version, batch.task, batch.game_version, note)


class Prefetcher:
    """Fetches, assembles and transfers the next batch in a thread of its own while this one computes.

    Args:
      fetch: called in the thread; may raise, also `Closed`, which `get` then raises.
    """

    def __init__(self, fetch: Callable[[], Trajectory]):
        self._batches: queue_lib.Queue[Trajectory | BaseException] = queue_lib.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(fetch,), name='prefetch', daemon=True)
        self._thread.start()

    def get(self, stop: threading.Event) -> Trajectory:
        """The next batch. The fetch itself is bounded in time, so this wait is, too.

        Raises:
          Closed: the queue was closed, or `stop` was set.
        """
        while not stop.is_set():
            try:
                item = self._batches.get(timeout=0.1)
            except queue_lib.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        raise Closed

    def close(self) -> None:
        """Ends the thread; the queue it fetches from must have been closed before."""
        self._closed.set()
        self._thread.join(timeout=10.0)
        if self._thread.is_alive():
            _logger.warning('the prefetch thread did not end within 10 s')

    def _run(self, fetch: Callable[[], Trajectory]) -> None:
        item: Trajectory | BaseException
        while not self._closed.is_set():
            try:
                item = fetch()
            except BaseException as error:  # noqa: BLE001 - handed to the learner's thread, which raises it.
                item = error
            while not self._closed.is_set():
                try:
                    self._batches.put(item, timeout=0.1)
                    break
                except queue_lib.Full:
                    continue
            if isinstance(item, BaseException):
                return


class LearnerLoop:
    """The learner's life: resume, update, publish, count, log, checkpoint. Every runtime drives this one.

    On several hosts each drives its own, in step; the first one reads and writes the files of the run, for all. Nothing
    is written before `begin`, so a runtime that refuses to resume leaves the workdir as it was.

    Args:
      config: the experiment.
      agent: the agent.
      workdir: where the run lives.
      store: where parameters are published.
      devices: see `Learner`.

    Raises:
      ConfigError: as `Learner`; a member of a population on several hosts.
      CheckpointError: as `Checkpointer`, on the first host.
    """

    def __init__(
        self,
        config: Config,
        agent: Agent,
        workdir: Path,
        store: ParameterStore,
        devices: Sequence[Any] | None = None,
    ):
        self._config = config
        self._agent = agent
        self._store = store
        self._learner = Learner(config, agent, devices)
        self._num_hosts = jax.process_count()
        self._keeps_files = jax.process_index() == 0
        if config.pbt.member is not None and self._num_hosts > 1:
            raise ConfigError(
                f'pbt.member {config.pbt.member} on {self._num_hosts} hosts: members of a population train on one '
                'host each; use launch/pbt.py on each of them'
            )
        state = self._learner.init(jax.random.PRNGKey(config.seed))
        self._runtime_state: Callable[[], dict[str, Any]] = dict
        self._runtime_metrics: list[Callable[[], dict[str, Any]]] = []
        self.restored_runtime_state: dict[str, Any] = {}
        """What the runtime had saved with the checkpoint that this run resumes; empty in a new run."""
        self.restored_config: Config | None = None
        """The configuration of that checkpoint; None in a new run, and on other hosts than the first."""

        self._stats = LearnerStats(agent.spec.tasks)
        self._tasks = agent.spec.tasks or (config.environment.name,)
        self._member = None if config.pbt.member is None else Member(config, workdir)
        self._fresh_first = _fresh_first(config, self._num_hosts)
        checkpoint = None
        if self._keeps_files:
            self._checkpointer = Checkpointer(workdir / 'checkpoints', config, config.checkpoint.keep)
            checkpoint = self._checkpointer.restore_latest({'learner': state, 'runtime': None})
        if checkpoint is not None:
            state = checkpoint.state['learner']
            self.restored_runtime_state = checkpoint.state['runtime'] or {}
            self.restored_config = checkpoint.config
            self._stats.restore(self.restored_runtime_state['stats'])
        self._state = self._learner.restore(state)
        self.num_updates = int(self._state.num_updates)
        self._workdir = workdir
        self._metadata = None if checkpoint is None else checkpoint.metadata
        self._has_begun = False
        if self._keeps_files:
            self._logger = MetricsLogger(workdir, config)
        self._prefetcher: Prefetcher | None = None
        self._last_skipped: Array | None = None
        self._logs: dict[str, Array] = {}
        self._last_row = self._last_save = time.monotonic()
        self._evolved = False  # since the last checkpoint
        self._state_is_whole = True
        self._last_row_frames = self.frames
        self.params = _to_host(self._state.params)

    @property
    def frames(self) -> int:
        """Environment frames consumed so far."""
        return self.num_updates * self._config.frames_per_update

    @property
    def done(self) -> bool:
        """Whether the run's budget is spent."""
        return self.num_updates >= self._config.total_updates

    def begin(self) -> None:
        """Makes the workdir that of this start: `config.json`, and no rows beyond the checkpoint; once."""
        if self._has_begun:
            return
        self._has_begun = True
        write_run_config(self._workdir, self._config)
        if self._member is not None:
            self._member.resume(self.frames, None if self._metadata is None else self._metadata['pbt'])
        self._report_jumps()
        if self._keeps_files:
            self._logger.resume(self.frames, None if self._metadata is None else self._metadata['wall_time_s'])

    def _report_jumps(self) -> None:
        """Says where a longer run makes a schedule go back to a higher value."""
        if self.restored_config is None:
            return
        hyperparameters = Hyperparameters.of(self._config) if self._member is None else self._member.hyperparameters
        applied = self.num_updates - int(self._state.skipped)
        before, now = (scheduled(config, hyperparameters, applied) for config in (self.restored_config, self._config))
        for name, old, new in zip(('learning rate', 'entropy cost'), map(float, before), map(float, now), strict=True):
            if new > 1.001 * old:
                _logger.warning(
                    'the %s jumps back from %.3g to %.3g at %d frames, because its linear schedule ends later now; '
                    'optimizer.schedule_frames, given from the start, keeps a schedule when total_frames is raised',
                    name,
                    old,
                    new,
                    self.frames,
                )

    def save_with(self, runtime_state: Callable[[], dict[str, Any]]) -> None:
        """Lets every checkpoint hold what this returns (arrays by name), beside the learner's own state."""
        self._runtime_state = runtime_state

    def log_with(self, runtime_metrics: Callable[[], dict[str, Any]]) -> None:
        """Lets every row of metrics hold what this returns, beside the learner's own."""
        self._runtime_metrics.append(runtime_metrics)

    def publish(self) -> None:
        """Publishes the current parameters."""
        self._store.publish(self.num_updates, self.params)

    def batch(self, trajectories: Trajectory) -> Trajectory:
        """Puts this host's trajectories [T + 1, B] on the mesh."""
        return self._learner.put(trajectories)

    def step(self, batch: Trajectory, waited_s: float = 0.0) -> bool:
        """One update and what goes with it; `waited_s` is how long the batch was waited for.

        Returns:
          False: another host has to stop, and nothing was learned.

        Raises:
          NonFiniteGradients: too many updates in a row were skipped.
          HostLost: the update failed, and had to be made by several hosts.
        """
        self.begin()
        if not self._update(batch, stop=False, waited_s=waited_s):
            return False
        if self._member is not None and self._member.is_due(self.num_updates):
            self._evolve(self._member)
            self.params = _to_host(self._state.params)
        self.publish()
        self._check_finite()
        return True

    def run(self, fetch: Callable[[], Trajectory], stop: threading.Event) -> None:
        """Updates until the budget is spent or a host stops; logs and saves by the clock.

        Args:
          fetch: gives this host's next trajectories [T + 1, B]; called from the prefetch thread.
          stop: ends the run after the update in flight.
        """
        self.begin()
        self._prefetcher = prefetcher = Prefetcher(lambda: self.batch(fetch()))
        try:
            self.publish()
            while not self.done:
                start = time.monotonic()
                batch = prefetcher.get(stop)
                if not self.step(batch, time.monotonic() - start):
                    return
                if time.monotonic() - self._last_row >= self._config.logging.interval_s:
                    self.log()
                if self.save_due:
                    self.save()
        except Closed:
            # The run was stopped while the learner waited for a batch, or handed out parameters.
            self._tell_others_to_stop()
        except HostLost:
            raise
        except Exception:
            self._tell_others_to_stop()
            raise

    def log(self) -> None:
        """Writes a row of metrics."""
        self.begin()
        self._last_row, self._last_row_frames = time.monotonic(), self.frames
        if not self._keeps_files:
            return
        row = {
            'frames': self.frames,
            'learner_steps': self.num_updates,
            **self._stats.row(),
            **{name: value for metrics in self._runtime_metrics for name, value in metrics().items()},
            **{name: _to_metric(name, value) for name, value in self._logs.items()},
        }
        for name in ('skipped_updates', 'skipped_in_a_row'):
            row[name] = int(row.get(name, 0))
        self._logger.write(row)

    @property
    def save_due(self) -> bool:
        """Whether it is time for a checkpoint: by the clock, or because a population waits for it."""
        return self._evolved or time.monotonic() - self._last_save >= self._config.checkpoint.interval_s

    def save(self) -> None:
        """Writes a checkpoint; not after an update that failed, which took the state with it: the last one stands."""
        self.begin()
        self._last_save, self._evolved = time.monotonic(), False
        if not (self._keeps_files and self._state_is_whole):
            return
        state = {'learner': self._state, 'runtime': {'stats': self._stats.state(), **self._runtime_state()}}
        metadata: dict[str, Any] = {'wall_time_s': self._logger.wall_time_s}
        if self._member is not None:
            metadata['pbt'] = self._member.metadata(self._fitness)
        self._checkpointer.save(self.num_updates, state, metadata)

    def finish(self) -> None:
        """Writes the last checkpoint, and the last row if the budget is spent: what a run that is resumed has not
        logged yet, it logs then."""
        if self.done and self._last_row_frames != self.frames:
            self.log()
        self.save()

    def close(self) -> None:
        """Ends the prefetch thread, whose queue must be closed, and the log."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._keeps_files:
            self._logger.close()

    def _update(self, batch: Trajectory, stop: bool, waited_s: float) -> bool:
        """Takes part in an update; False if a host has to stop, and nothing was learned."""
        hyperparameters = None if self._member is None else self._member.hyperparameters
        self._state_is_whole = False  # It is donated.
        try:
            self._state, logs, gathered = self._learner.update(
                self._state, batch, hyperparameters, stop=stop, waited_s=waited_s
            )
            # Waits for the update.
            params = _to_host(self._state.params)
            gathered = _to_host(gathered)
        except Exception as error:  # JAX raises a ValueError for a connection that broke.
            if self._num_hosts > 1:
                lines = str(error).splitlines() or ['']
                raise HostLost(
                    f'update {self.num_updates + 1} of {self._num_hosts} hosts failed: {lines[0]}'
                ) from error
            raise
        self._state_is_whole = True
        if gathered.note.stop.any():
            return False
        if self._keeps_files:
            info, version, task, game_version = _columns(gathered, self._fresh_first)
            self._stats.add_batch(info, self.num_updates - version, self._config.num_fresh, task, game_version)
            self._stats.add_wait(float(gathered.note.waited_s.max()))
        self.params, self._logs = params, logs
        self.num_updates += 1
        return True

    def _tell_others_to_stop(self) -> None:
        """Takes part in the other hosts' next update, with nothing to learn from, so that all stop before it."""
        if self._num_hosts > 1 and not self.done:
            learner = self._config.learner
            empty = self._agent.empty_trajectory(learner.unroll_length, learner.batch_size // self._num_hosts)
            self._update(self.batch(empty), stop=True, waited_s=0.0)

    @property
    def _fitness(self) -> float | None:
        """For a population; None while it is not known."""
        returns = self._stats.mean_returns
        return None if returns is None else pbt.fitness(self._tasks, returns)

    def _evolve(self, member: Member) -> None:
        """A step of population based training; the checkpoint that follows it makes it last."""
        copied = member.evolve(self.frames, self._fitness, {'learner': self._state})
        if copied is not None:
            own = self._state
            self._state = self._learner.restore(
                copied['learner']._replace(num_updates=own.num_updates, skipped=own.skipped)
            )
            self._stats.forget_returns(self.num_updates)
        self._evolved = True

    def _check_finite(self) -> None:
        """Looks at the update BEFORE the last one, whose result is there, so that the device never waits."""
        previous, self._last_skipped = self._last_skipped, self._logs['skipped_in_a_row']
        if previous is None:
            return
        in_a_row = int(previous)
        if in_a_row:
            _logger.warning('update %d skipped: its gradient was not finite', self.num_updates - 1)
        if in_a_row >= self._config.learner.max_nonfinite_updates:
            raise NonFiniteGradients(
                f'{in_a_row} updates in a row had gradients that are not finite (learner.max_nonfinite_updates); '
                'lower optimizer.learning_rate, or look for NaN in the environment'
            )


def choose_devices(config: Config) -> list[Any]:
    """`config.learner.num_devices` devices of each host, or all of them; those of a host stand together.

    Raises:
      ConfigError: a host has fewer.
    """
    hosts = [[device for device in jax.devices() if device.process_index == i] for i in range(jax.process_count())]
    wanted = config.learner.num_devices
    fewest = min(hosts, key=len)
    if wanted is not None and wanted > len(fewest):
        machine = 'this machine' if len(hosts) == 1 else f'host {fewest[0].process_index}'
        raise ConfigError(
            f'learner.num_devices is {wanted}, but {machine} has {len(fewest)} {fewest[0].platform} device(s)'
        )
    return [device for devices in hosts for device in devices[:wanted]]


def _fresh_first(config: Config, num_hosts: int) -> np.ndarray:
    """[B], the columns of all hosts' batches with what is new before what is replayed; each host's part has both."""
    replayed = np.arange(config.learner.batch_size) % (config.learner.batch_size // num_hosts)
    return np.argsort(replayed >= config.num_fresh // num_hosts, kind='stable')


def _columns(gathered: Gathered, order: np.ndarray) -> tuple[StepInfo, np.ndarray, np.ndarray, np.ndarray]:
    """Info, version, task and game_version of the trajectories in this order."""
    info = StepInfo(*(x[:, order] for x in gathered.info))
    return info, gathered.version[order], gathered.task[order], gathered.game_version[:, order]


def _to_metric(name: str, value: Array) -> float | Histogram:
    if name == 'log_rho_histogram':
        return Histogram(LOG_RHO_EDGES.tolist(), np.asarray(value).tolist())
    return float(value)


def _to_host(tree: PyTree) -> PyTree:
    """Numpy copies: the device's own buffers are donated to the next update."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)
