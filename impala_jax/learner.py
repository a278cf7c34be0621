"""The learner: one compiled update over a mesh of devices, and the loop that feeds it."""

from __future__ import annotations

import logging
import queue as queue_lib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from impala_jax import pbt, popart
from impala_jax.agent import Agent
from impala_jax.checkpoint import Checkpointer
from impala_jax.config import Config, ConfigError, OptimizerConfig
from impala_jax.loss import LOG_RHO_EDGES, impala_loss
from impala_jax.metrics import Histogram, LearnerStats, MetricsLogger
from impala_jax.parameter_store import ParameterStore
from impala_jax.pbt import Hyperparameters, Member
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


class NonFiniteGradients(RuntimeError):
    """Too many updates in a row had gradients that are not finite."""


def learning_rate_schedule(
    config: OptimizerConfig, total_updates: int, learning_rate: Array | float | None = None
) -> optax.Schedule:
    """Updates applied -> learning rate, from the configuration's or from `learning_rate`, a scalar."""
    start = config.learning_rate if learning_rate is None else learning_rate
    return optax.linear_schedule(start, 0.0 if config.schedule == 'linear' else start, total_updates)


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
      devices: the mesh, of jax.Device; by default `config.learner.num_devices` local devices, or all of them.

    Raises:
      ConfigError: a batch that the devices do not divide, or more devices asked for than there are.
    """

    def __init__(self, config: Config, agent: Agent, devices: Sequence[Any] | None = None):
        devices = _choose_devices(config) if devices is None else devices
        mesh = Mesh(np.array(devices), ('batch',))
        if config.learner.batch_size % len(devices):
            raise ConfigError(
                f'learner.batch_size {config.learner.batch_size} does not divide over {len(devices)} devices; '
                f'choose a multiple of {len(devices)}, or set learner.num_devices'
            )
        self._config = config
        self._agent = agent
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._time_major = NamedSharding(mesh, PartitionSpec(None, 'batch'))
        self._batch_major = NamedSharding(mesh, PartitionSpec('batch'))
        self._hyperparameters = Hyperparameters.of(config)
        self._compiled = jax.jit(self._update, donate_argnums=0, out_shardings=self._replicated)

    def init(self, key: Array) -> LearnerState:
        """A fresh state, on the mesh."""
        params = self._agent.init(key)
        statistics = popart.init(self._agent.spec.num_tasks) if self._config.popart.enabled else ()
        optimizer = make_optimizer(self._config.optimizer, self._schedule(self._hyperparameters))
        zero = np.zeros([], np.int32)
        return self.restore(LearnerState(params, optimizer.init(params), statistics, zero, zero, zero))

    def restore(self, state: LearnerState) -> LearnerState:
        """Puts a state on the mesh, in memory of its own (the update donates it)."""
        return jax.tree.map(lambda x: jax.device_put(np.array(x), self._replicated), state)

    def put(self, trajectories: Trajectory) -> Trajectory:
        """Puts this host's part of a batch, numpy [T + 1, B], on the mesh; what is only counted stays behind."""

        def put(sharding, tree):
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

        return Trajectory(
            timesteps=put(self._time_major, trajectories.timesteps),
            behaviour_logits=put(self._time_major, trajectories.behaviour_logits),
            initial_state=put(self._batch_major, trajectories.initial_state),
            info=None,  # pyright: ignore[reportArgumentType]
            version=None,
            task=put(self._batch_major, trajectories.task),
        )

    def update(
        self, state: LearnerState, batch: Trajectory, hyperparameters: Hyperparameters | None = None
    ) -> tuple[LearnerState, dict[str, Array]]:
        """The state after a batch of `put`, and scalars; other hyperparameters than the last time's compile nothing.

        Args:
          state: donated.
          batch: [T + 1, B].
          hyperparameters: in place of the configuration's.
        """
        values = self._hyperparameters if hyperparameters is None else hyperparameters
        return self._compiled(state, batch, Hyperparameters(*map(np.float32, values)))

    def _schedule(self, hyperparameters: Hyperparameters) -> optax.Schedule:
        config = self._config
        return learning_rate_schedule(config.optimizer, config.total_updates, hyperparameters.learning_rate)

    def _update(
        self, state: LearnerState, batch: Trajectory, hyperparameters: Hyperparameters
    ) -> tuple[LearnerState, dict[str, Array]]:
        def loss_fn(params):
            output, _ = self._agent.unroll(params, batch.timesteps, batch.initial_state)
            scale = None
            if self._config.popart.enabled:
                values, scale = popart.unnormalise(state.popart, output.values, batch.task)
                output = output._replace(values=values)
            return impala_loss(
                output, batch, self._config.loss, self._config.vtrace, scale, hyperparameters.entropy_cost
            )

        (loss, details), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(gradient)
        # By this state's count, not the optimiser's own: a state copied from another run has that one's.
        learning_rate = self._schedule(hyperparameters)(state.num_updates - state.skipped)
        optimizer = make_optimizer(self._config.optimizer, lambda _: learning_rate, hyperparameters.epsilon)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        statistics = state.popart
        if self._config.popart.enabled:
            statistics = popart.update(
                state.popart, details.value_targets, details.mask, batch.task, self._config.popart
            )
            baseline = popart.preserve_outputs(params['params']['baseline'], state.popart, statistics)
            params = {**params, 'params': {**params['params'], 'baseline': baseline}}

        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        params, opt_state, statistics = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, statistics),
            (state.params, state.opt_state, state.popart),
        )
        state = LearnerState(
            params=params,
            opt_state=opt_state,
            popart=statistics,
            num_updates=state.num_updates + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        return state, {
            'loss': loss,
            **details.logs,
            'grad_norm': grad_norm,
            'learning_rate': learning_rate,
            'skipped_updates': state.skipped,
            'skipped_in_a_row': state.skipped_in_a_row,
        }


class Batch(NamedTuple):
    """A batch on the mesh, and what of it is only counted, on the host."""

    data: Trajectory
    info: StepInfo  # [T, B]
    version: np.ndarray  # [B] int32
    task: np.ndarray  # [B] int32


class Prefetcher:
    """Fetches, assembles and transfers the next batch in a thread of its own while this one computes.

    Args:
      fetch: called in the thread; may raise, also `Closed`, which `get` then raises.
    """

    def __init__(self, fetch: Callable[[], Batch]):
        self._batches: queue_lib.Queue[Batch | BaseException] = queue_lib.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(fetch,), name='prefetch', daemon=True)
        self._thread.start()

    def get(self, stop: threading.Event) -> Batch:
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

    def _run(self, fetch: Callable[[], Batch]) -> None:
        item: Batch | BaseException
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

    Args:
      config: the experiment.
      agent: the agent.
      workdir: where the run lives.
      store: where parameters are published.
      devices: see `Learner`.
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
        self._store = store
        self._learner = Learner(config, agent, devices)
        self._checkpointer = Checkpointer(workdir / 'checkpoints', config, config.checkpoint.keep)
        self._state = self._learner.init(jax.random.PRNGKey(config.seed))
        self._runtime_state: Callable[[], dict[str, Any]] = dict
        self._runtime_metrics: Callable[[], dict[str, Any]] = dict
        self.restored_runtime_state: dict[str, Any] = {}
        """What the runtime had saved with the checkpoint that this run resumes; empty in a new run."""

        self._logger = MetricsLogger(workdir, config)
        self._stats = LearnerStats(agent.spec.tasks)
        self._tasks = agent.spec.tasks or (config.environment.name,)
        self._member = None if config.pbt.member is None else Member(config, workdir)
        self.num_updates = 0
        checkpoint = self._checkpointer.restore_latest({'learner': self._state, 'runtime': None})
        if checkpoint is not None:
            self._state = self._learner.restore(checkpoint.state['learner'])
            self.restored_runtime_state = checkpoint.state['runtime'] or {}
            self.num_updates = checkpoint.step
            self._stats.restore(self.restored_runtime_state['stats'])
        if self._member is not None:
            self._member.resume(self.frames, None if checkpoint is None else checkpoint.metadata['pbt'])
        self._logger.resume(self.frames, checkpoint.metadata['wall_time_s'] if checkpoint is not None else None)
        self._prefetcher: Prefetcher | None = None
        self._last_skipped: Array | None = None
        self._logs: dict[str, Array] = {}
        self._last_row = self._last_save = time.monotonic()
        self._evolved = False  # since the last checkpoint
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

    def save_with(self, runtime_state: Callable[[], dict[str, Any]]) -> None:
        """Lets every checkpoint hold what this returns (arrays by name), beside the learner's own state."""
        self._runtime_state = runtime_state

    def log_with(self, runtime_metrics: Callable[[], dict[str, Any]]) -> None:
        """Lets every row of metrics hold what this returns, beside the learner's own."""
        self._runtime_metrics = runtime_metrics

    def publish(self) -> None:
        """Publishes the current parameters."""
        self._store.publish(self.num_updates, self.params)

    def batch(self, trajectories: Trajectory) -> Batch:
        """Puts trajectories [T + 1, B] on the mesh."""
        return Batch(self._learner.put(trajectories), trajectories.info, trajectories.version, trajectories.task)

    def step(self, batch: Batch, waited_s: float = 0.0) -> None:
        """One update and what goes with it; `waited_s` is how long the batch was waited for.

        Raises:
          NonFiniteGradients: too many updates in a row were skipped.
        """
        self._stats.add_batch(batch.info, self.num_updates - batch.version, self._config.num_fresh, batch.task)
        hyperparameters = None if self._member is None else self._member.hyperparameters
        self._state, self._logs = self._learner.update(self._state, batch.data, hyperparameters)
        self.num_updates += 1
        self._stats.add_wait(waited_s)
        if self._member is not None and self._member.is_due(self.num_updates):
            self._evolve(self._member)
        self.params = _to_host(self._state.params)
        self.publish()
        self._check_finite()

    def run(self, fetch: Callable[[], Trajectory], stop: threading.Event) -> None:
        """Updates until the budget is spent or `stop` is set; logs and saves by the clock.

        Args:
          fetch: gives the next trajectories [T + 1, B]; called from the prefetch thread.
          stop: ends the run after the update in flight.
        """
        self._prefetcher = prefetcher = Prefetcher(lambda: self.batch(fetch()))
        try:
            self.publish()
            while not self.done and not stop.is_set():
                start = time.monotonic()
                batch = prefetcher.get(stop)
                self.step(batch, time.monotonic() - start)
                if time.monotonic() - self._last_row >= self._config.logging.interval_s:
                    self.log()
                if self.save_due:
                    self.save()
        except Closed:
            # The run was stopped while the learner waited for a batch, or handed out parameters.
            return

    def log(self) -> None:
        """Writes a row of metrics."""
        row = {
            'frames': self.frames,
            'learner_steps': self.num_updates,
            **self._stats.row(),
            **self._runtime_metrics(),
            **{name: _to_metric(name, value) for name, value in self._logs.items()},
        }
        for name in ('skipped_updates', 'skipped_in_a_row'):
            row[name] = int(row.get(name, 0))
        self._logger.write(row)
        self._last_row, self._last_row_frames = time.monotonic(), self.frames

    @property
    def save_due(self) -> bool:
        """Whether it is time for a checkpoint: by the clock, or because a population waits for it."""
        return self._evolved or time.monotonic() - self._last_save >= self._config.checkpoint.interval_s

    def save(self) -> None:
        """Writes a checkpoint."""
        state = {'learner': self._state, 'runtime': {'stats': self._stats.state(), **self._runtime_state()}}
        metadata: dict[str, Any] = {'wall_time_s': self._logger.wall_time_s}
        if self._member is not None:
            metadata['pbt'] = self._member.metadata(self._fitness)
        self._checkpointer.save(self.num_updates, state, metadata)
        self._last_save, self._evolved = time.monotonic(), False

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
        self._logger.close()

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
            self._stats.forget_returns()
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


def _choose_devices(config: Config) -> Sequence[Any]:
    devices = jax.local_devices()
    wanted = config.learner.num_devices
    if wanted is None:
        return devices
    if wanted > len(devices):
        raise ConfigError(
            f'learner.num_devices is {wanted}, but this machine has {len(devices)} {devices[0].platform} device(s)'
        )
    return devices[:wanted]


def _to_metric(name: str, value: Array) -> float | Histogram:
    if name == 'log_rho_histogram':
        return Histogram(LOG_RHO_EDGES.tolist(), np.asarray(value).tolist())
    return float(value)


def _to_host(tree: PyTree) -> PyTree:
    """Numpy copies: the device's own buffers are donated to the next update."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)
