"""The optimiser and its schedules, as functions of hyperparameters that are inputs of the compiled update."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from impala_jax.config import LossConfig, OptimizerConfig
from impala_jax.types import Array


class Hyperparameters(NamedTuple):
    """Values that can change during a run without recompilation; floats or float32 scalars."""

    learning_rate: Any
    entropy_cost: Any
    epsilon: Any  # Epsilon of the optimiser.


def make_schedule(kind: Literal['linear', 'constant'], start: Array | float, num_updates: int) -> optax.Schedule:
    """Returns a schedule of the number of applied updates.

    Args:
      kind: `constant`, or `linear` for a decay to 0.
      start: Value at the start, a scalar.
      num_updates: Number of updates after which a linear schedule is 0.
    """
    return optax.linear_schedule(start, 0.0 if kind == 'linear' else start, num_updates)


def scheduled(
    values: Hyperparameters, applied: Array | int, optimizer: OptimizerConfig, loss: LossConfig, num_updates: int
) -> Hyperparameters:
    """Returns the hyperparameters after a number of applied updates.

    Args:
      values: Hyperparameters at the start.
      applied: Number of applied updates, [] int32.
      optimizer: Configuration with the schedule of the learning rate.
      loss: Configuration with the schedule of the entropy cost.
      num_updates: Number of updates after which linear schedules are 0.
    """
    learning_rate = make_schedule(optimizer.schedule, values.learning_rate, num_updates)
    entropy_cost = make_schedule(loss.entropy_schedule, values.entropy_cost, num_updates)
    return values._replace(
        learning_rate=jnp.asarray(learning_rate(applied)), entropy_cost=jnp.asarray(entropy_cost(applied))
    )


def make_optimizer(config: OptimizerConfig, values: Hyperparameters) -> optax.GradientTransformation:
    """Returns gradient clipping by global norm, followed by RMSProp or Adam.

    RMSProp follows TensorFlow: epsilon is inside the square root, and the accumulator starts at 1.

    Args:
      config: Configuration with the optimiser's name and constants.
      values: Learning rate and epsilon, which replace the configuration's.
    """

    # A function, because it gives the optimiser a state with a count, which checkpoints contain; the count is not read.
    def learning_rate(_: Array) -> Array:
        return values.learning_rate

    epsilon: Any = values.epsilon
    if config.name == 'rmsprop':
        optimizer = optax.rmsprop(
            learning_rate,
            decay=config.decay,
            eps=epsilon,
            initial_scale=1.0,
            eps_in_sqrt=True,
            momentum=config.momentum or None,
        )
    else:
        optimizer = optax.adam(learning_rate, b1=config.b1, b2=config.b2, eps=epsilon)
    if np.isinf(config.max_grad_norm):
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
