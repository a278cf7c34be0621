"""The learner: a compiled update over a mesh of devices, on one host or several.

On several hosts (`jax.distributed`), every host makes the same update with its own part of each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from impala_jax import frame_stacks, popart
from impala_jax.agent import Agent, Unroll, type_name
from impala_jax.config import ConfigError, PopArtConfig
from impala_jax.loss import Loss, LossDetails
from impala_jax.networks import NetworkOutput
from impala_jax.optimizer import Hyperparameters
from impala_jax.types import Array, Experience, PyTree, TimeStep, Trajectory, batch_axis

OptimizerFactory = Callable[[Hyperparameters], optax.GradientTransformation]
Schedule = Callable[[Hyperparameters, Array], Hyperparameters]


class LearnerState(NamedTuple):
    """State of a learner, replicated over the mesh and donated to each update."""

    params: PyTree  # float32
    opt_state: PyTree
    popart: PyTree  # PopArtState; () without PopArt.
    num_updates: Array  # [] int32, number of batches consumed, including those of skipped updates.
    skipped: Array  # [] int32, number of updates skipped because of a non-finite gradient.
    skipped_in_a_row: Array  # [] int32, number of consecutive skipped updates up to the last one.


class HostLost(RuntimeError):
    """An update over several hosts failed, most likely because one of them is lost."""


class Learner:
    """An update compiled over a mesh with one axis: parameters are replicated, the batch is split.

    Args:
      agent: Agent to train.
      optimizer: Optax transformation or, with `hyperparameters`, a function from them to one.
      loss: Loss to minimise.
      hyperparameters: Inputs of the compiled update at the start of a run: learning rate and epsilon for `optimizer`,
        entropy cost for `loss`. None uses the values of `optimizer` and `loss` themselves.
      schedule: Function from the hyperparameters at the start and the number of applied updates, int32, to the
        hyperparameters of the next update.
      popart: Constants of PopArt; None trains a single value that is not normalised.
      devices: Devices of the mesh, of type `jax.Device`; None uses all devices.

    `update` raises ConfigError if the network, the loss or the optimiser returns a value of another form or shape.
    """

    def __init__(
        self,
        agent: Agent,
        optimizer: optax.GradientTransformation | OptimizerFactory,
        loss: Loss,
        *,
        hyperparameters: Hyperparameters | None = None,
        schedule: Schedule = lambda hyperparameters, applied: hyperparameters,
        popart: PopArtConfig | None = None,
        devices: Sequence[Any] | None = None,
    ):
        self._agent = agent
        self._optimizer = optimizer
        self._loss = loss
        self.hyperparameters = hyperparameters
        """Hyperparameters at the start of a run, or None."""
        self.schedule = schedule
        self._popart = popart
        mesh = Mesh(np.array(jax.devices() if devices is None else devices), ('batch',))
        self.num_local_devices = len(mesh.local_devices)
        replicated = PartitionSpec()
        batched = {0: PartitionSpec('batch'), 1: PartitionSpec(None, 'batch')}  # Keyed by the axis of the batch.
        self.replicated = NamedSharding(mesh, replicated)
        self._batched = {axis: NamedSharding(mesh, spec) for axis, spec in batched.items()}

        def unroll(params: PyTree, timesteps: TimeStep, state: PyTree) -> tuple[NetworkOutput, PyTree]:
            return agent.unroll(params, frame_stacks.unpacked(timesteps), state)

        self.unroll: Unroll = unroll
        """`Agent.unroll` with the batch split over the mesh; observations may be FrameStacks."""
        if mesh.size > 1:
            # Without shard_map, XLA gathers all frames on every device: it cannot split a joint axis of time and batch.
            self.unroll = jax.shard_map(  # pyright: ignore
                unroll,
                mesh=mesh,
                in_specs=(replicated, batched[1], batched[0]),
                out_specs=(batched[1], batched[0]),
                check_vma=False,  # The check does not support `impala_jax.kernels.cpu`.
            )
        self._compiled = jax.jit(self.pure_update, donate_argnums=0, out_shardings=self.replicated)

    def init(self, key: Array) -> LearnerState:
        """Returns an initial state, on the mesh."""
        # As one program, which the compilation cache stores.
        return self.restore(jax.jit(self.pure_init)(key, self.inputs(None)))

    def pure_init(self, key: Array, hyperparameters: Any) -> LearnerState:
        """The initial state as a pure function; `hyperparameters` are those of `pure_update`."""
        params = self._agent.init(key)
        statistics = () if self._popart is None else popart.init(self._agent.spec.num_tasks)
        zero = jnp.zeros([], jnp.int32)
        opt_state = self._transformation(hyperparameters).init(params)
        return LearnerState(params, opt_state, statistics, zero, zero, zero)

    def restore(self, state: LearnerState) -> LearnerState:
        """Copies a state to the mesh; on several hosts, the state of host 0.

        Raises:
          HostLost: If the broadcast from host 0 fails.
        """
        try:
            state = multihost_utils.broadcast_one_to_all(state)
        except Exception as error:  # JAX raises the errors of its transport.
            if jax.process_count() == 1:
                raise
            raise HostLost(f'the state was not received from host 0: {str(error).splitlines()[0]}') from error
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, self.replicated, lambda _: np.array(x)), state
        )

    def put(self, batch: Any) -> Any:
        """Puts this host's part of a batch on the mesh.

        Args:
          batch: Experience, or another NamedTuple with fields of Trajectory; NumPy arrays, [T + 1, B].
        """
        return type(batch)(*(self._put(batch_axis(name), part) for name, part in batch._asdict().items()))

    def put_rows(self, rows: PyTree) -> PyTree:
        """Puts this host's rows, NumPy arrays [num_local_devices], on the mesh, one per device."""
        return self._put(0, rows)

    def _put(self, axis: int, tree: PyTree) -> PyTree:
        """Splits arrays along `axis` over the devices."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._batched[axis], x), tree)

    def update(
        self,
        state: LearnerState,
        batch: Trajectory | Experience,
        hyperparameters: Hyperparameters | None = None,
    ) -> tuple[LearnerState, dict[str, Array]]:
        """Makes one update.

        Args:
          state: State before the update; it is donated and cannot be used afterwards.
          batch: Trajectories [T + 1, B] in NumPy, or Experience on the mesh, as returned by `put`.
          hyperparameters: Values that replace the learner's own, without recompilation.

        Returns:
          The state after the update, and scalars for the log.
        """
        experience = self.put(batch.experience) if isinstance(batch, Trajectory) else batch
        return self._compiled(state, experience, self.inputs(hyperparameters))

    def inputs(self, hyperparameters: Hyperparameters | None) -> Any:
        """Returns `hyperparameters`, or the learner's own for None, as inputs of `pure_update`."""
        values = self.hyperparameters if hyperparameters is None else hyperparameters
        return () if values is None else Hyperparameters(*map(np.float32, values))

    def _transformation(self, hyperparameters: Any) -> optax.GradientTransformation:
        if _is_transformation(self._optimizer):
            return self._optimizer  # pyright: ignore[reportReturnType]
        made = self._optimizer(hyperparameters)  # pyright: ignore[reportCallIssue]
        if not _is_transformation(made):
            raise ConfigError(
                f'the optimiser returned a value of type {type_name(made)}; return an Optax transformation '
                '(docs/extending.md)'
            )
        return made

    def pure_update(
        self, state: LearnerState, experience: Experience, hyperparameters: Any, enabled: Array | bool = True
    ) -> tuple[LearnerState, dict[str, Array]]:
        """The update as a pure function.

        Args:
          state: State before the update, replicated over the mesh.
          experience: Experience of all hosts, [T + 1, B].
          hyperparameters: Hyperparameters, float32 scalars; () without any.
          enabled: Whether to update, [] bool; otherwise the state is returned unchanged.

        Returns:
          The state after the update, and scalars for the log.
        """
        # Counts from this state, not from the optimiser's: a state copied from another run has that run's count.
        applied = state.num_updates - state.skipped
        values = self.schedule(hyperparameters, applied) if hyperparameters else hyperparameters
        given: dict[str, Any] = {'entropy_cost': values.entropy_cost} if hyperparameters else {}

        def loss_fn(params):
            output, _ = self.unroll(params, experience.timesteps, experience.initial_state)
            if self._popart is None:
                return _checked(self._loss(output, experience, **given))
            unnormalised, scale = popart.unnormalise(state.popart, output.values, experience.task)
            return _checked(self._loss(output._replace(values=unnormalised), experience, value_scale=scale, **given))

        (loss, details), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(gradient)
        updates, opt_state = self._transformation(values).update(gradient, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        statistics = state.popart
        if self._popart is not None:
            statistics = popart.update(state.popart, details.value_targets, details.mask, experience.task, self._popart)
            baseline = popart.preserve_outputs(params['params']['baseline'], state.popart, statistics)
            params = {**params, 'params': {**params['params'], 'baseline': baseline}}

        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        params, opt_state, statistics = jax.tree.map(
            lambda new, old: jnp.where(finite & enabled, new, old),
            (params, opt_state, statistics),
            (state.params, state.opt_state, state.popart),
        )
        state = LearnerState(
            params=params,
            opt_state=opt_state,
            popart=statistics,
            num_updates=state.num_updates + jnp.int32(enabled),
            skipped=state.skipped + (enabled & ~finite),
            skipped_in_a_row=jnp.where(enabled & finite, 0, state.skipped_in_a_row + (enabled & ~finite)),
        )
        logs = {
            'loss': loss,
            **details.logs,
            'grad_norm': grad_norm,
            **({'learning_rate': values.learning_rate, **given} if hyperparameters else {}),
            'skipped_updates': state.skipped,
            'skipped_in_a_row': state.skipped_in_a_row,
        }
        return state, logs


def _is_transformation(optimizer: Any) -> bool:
    return callable(getattr(optimizer, 'init', None)) and callable(getattr(optimizer, 'update', None))


def _checked(returned: Any) -> tuple[Array, LossDetails]:
    """Returns the result of a loss; raises ConfigError if it is not a scalar with LossDetails."""
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], LossDetails)):
        problem = f'a value of type {type_name(returned)}'
    elif jnp.shape(returned[0]):
        problem = f'a loss of shape {list(jnp.shape(returned[0]))}'
    else:
        shapes = {name: jnp.shape(log) for name, log in returned[1].logs.items() if name != 'log_rho_histogram'}
        problem = ', '.join(f'the log {name!r} of shape {list(shape)}' for name, shape in shapes.items() if shape)
    if problem:
        raise ConfigError(
            f'the loss returned {problem}; return a scalar and LossDetails, whose logs are scalars (docs/extending.md)'
        )
    return returned
