"""The learner: one compiled update over a mesh of devices, of one host or of several.

On several hosts (`jax.distributed`) every host makes the same update with its own part of each batch.
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
from impala_jax.agent import Agent
from impala_jax.config import PopArtConfig
from impala_jax.loss import Loss
from impala_jax.optimizer import Hyperparameters
from impala_jax.types import Array, Experience, PyTree, Trajectory, batch_axis

OptimizerFactory = Callable[[Hyperparameters], optax.GradientTransformation]
Schedule = Callable[[Hyperparameters, Array], Hyperparameters]


class LearnerState(NamedTuple):
    """All that an update changes; replicated over the mesh, donated to each update."""

    params: PyTree  # float32
    opt_state: PyTree
    popart: PyTree  # PopArtState, or () without PopArt
    num_updates: Array  # int32, batches consumed, skipped updates included
    skipped: Array  # int32, updates skipped because the gradient was not finite
    skipped_in_a_row: Array  # int32


class HostLost(RuntimeError):
    """An update over several hosts failed: most likely one of them is gone."""


class Learner:
    """The pure update, compiled over a one-axis mesh: parameters replicated, the batch split.

    Args:
      agent: The agent.
      optimizer: An optax transformation; with `hyperparameters` also a function from them to one.
      loss: The loss.
      hyperparameters: Inputs of the compiled update at the start of a run: the learning rate and epsilon that
        `optimizer` is given, and the entropy cost that `loss` is given. None: both have their own.
      schedule: Hyperparameters and the number of updates applied, int32 -> hyperparameters of the next update.
      popart: PopArt's constants; None for a single value that is not normalised.
      devices: The mesh, of jax.Device; None: all.
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
        self._make_optimizer: OptimizerFactory = (
            (lambda _: optimizer) if isinstance(optimizer, optax.GradientTransformation) else optimizer
        )
        self._loss = loss
        self.hyperparameters = hyperparameters
        """Those at the start of a run; None without any."""
        self.schedule = schedule
        self._popart = popart
        mesh = Mesh(np.array(jax.devices() if devices is None else devices), ('batch',))
        self.num_local_devices = len(mesh.local_devices)
        replicated = PartitionSpec()
        batched = {0: PartitionSpec('batch'), 1: PartitionSpec(None, 'batch')}  # by the axis of the batch
        self.replicated = NamedSharding(mesh, replicated)
        self._batched = {axis: NamedSharding(mesh, spec) for axis, spec in batched.items()}
        # By itself XLA would gather all frames on every device: of time x batch in one axis it cannot split the batch.
        self._unroll: Any = jax.shard_map(
            lambda params, timesteps, state: agent.unroll(params, frame_stacks.unpacked(timesteps), state),
            mesh=mesh,
            in_specs=(replicated, batched[1], batched[0]),
            out_specs=(batched[1], batched[0]),
            check_vma=False,  # It does not know `impala_jax.kernels.cpu`.
        )
        self._compiled = jax.jit(self.pure_update, donate_argnums=0, out_shardings=self.replicated)

    def init(self, key: Array) -> LearnerState:
        """A fresh state, on the mesh."""
        params = jax.jit(self._agent.init)(key)  # One program, which is cached.
        statistics = () if self._popart is None else popart.init(self._agent.spec.num_tasks)
        optimizer = self._make_optimizer(self.inputs(None))
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
            lambda x: jax.make_array_from_callback(x.shape, self.replicated, lambda _: np.array(x)), state
        )

    def put(self, batch: Any) -> Any:
        """Puts this host's part of a batch on the mesh.

        Args:
          batch: Experience, or another NamedTuple of fields of Trajectory, numpy [T + 1, B].
        """
        return type(batch)(*(self._put(batch_axis(name), part) for name, part in batch._asdict().items()))

    def put_rows(self, rows: PyTree) -> PyTree:
        """Puts this host's rows, numpy [num_local_devices], on the mesh, one per device."""
        return self._put(0, rows)

    def _put(self, axis: int, tree: PyTree) -> PyTree:
        """Splits arrays along this axis."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._batched[axis], x), tree)

    def update(
        self,
        state: LearnerState,
        batch: Trajectory | Experience,
        hyperparameters: Hyperparameters | None = None,
    ) -> tuple[LearnerState, dict[str, Array]]:
        """The state after a batch, and scalars that tell how it went.

        Args:
          state: Is donated: it cannot be used again.
          batch: Trajectories [T + 1, B], numpy, or experience that `put` has put on the mesh.
          hyperparameters: Replace those that the learner was made with; nothing is compiled for them.
        """
        experience = self.put(batch.experience) if isinstance(batch, Trajectory) else batch
        return self._compiled(state, experience, self.inputs(hyperparameters))

    def inputs(self, hyperparameters: Hyperparameters | None) -> Any:
        """These hyperparameters, or those of the learner, as inputs of `pure_update`."""
        values = self.hyperparameters if hyperparameters is None else hyperparameters
        return () if values is None else Hyperparameters(*map(np.float32, values))

    def pure_update(
        self, state: LearnerState, experience: Experience, hyperparameters: Any, goes_on: Array | bool = True
    ) -> tuple[LearnerState, dict[str, Array]]:
        """The update itself, a pure function.

        Args:
          state: Replicated.
          experience: [T + 1, B], of all hosts.
          hyperparameters: Hyperparameters of float32 scalars, or () without any.
          goes_on: bool scalar; where it is not, nothing is learned, and the state is that of before.
        """
        # By this state's count, not the optimiser's own: a state copied from another run has that one's.
        applied = state.num_updates - state.skipped
        values = self.schedule(hyperparameters, applied) if hyperparameters else hyperparameters
        given: dict[str, Any] = {'entropy_cost': values.entropy_cost} if hyperparameters else {}

        def loss_fn(params):
            output, _ = self._unroll(params, experience.timesteps, experience.initial_state)
            if self._popart is None:
                return self._loss(output, experience, **given)
            unnormalised, scale = popart.unnormalise(state.popart, output.values, experience.task)
            return self._loss(output._replace(values=unnormalised), experience, value_scale=scale, **given)

        (loss, details), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(gradient)
        updates, opt_state = self._make_optimizer(values).update(gradient, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        statistics = state.popart
        if self._popart is not None:
            statistics = popart.update(state.popart, details.value_targets, details.mask, experience.task, self._popart)
            baseline = popart.preserve_outputs(params['params']['baseline'], state.popart, statistics)
            params = {**params, 'params': {**params['params'], 'baseline': baseline}}

        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        params, opt_state, statistics = jax.tree.map(
            lambda new, old: jnp.where(finite & goes_on, new, old),
            (params, opt_state, statistics),
            (state.params, state.opt_state, state.popart),
        )
        state = LearnerState(
            params=params,
            opt_state=opt_state,
            popart=statistics,
            num_updates=state.num_updates + jnp.int32(goes_on),
            skipped=state.skipped + (goes_on & ~finite),
            skipped_in_a_row=jnp.where(goes_on & finite, 0, state.skipped_in_a_row + (goes_on & ~finite)),
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
