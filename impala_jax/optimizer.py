"""The optimiser and its schedules: functions of hyperparameters that are inputs of the compiled update."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from impala_jax.config import LossConfig, OptimizerConfig
from impala_jax.types import Array


class Hyperparameters(NamedTuple):
    """What may change during a run without compiling anything; each a float or a float32 scalar."""

    learning_rate: Any
    entropy_cost: Any
    epsilon: Any  # the optimiser's


def make_schedule(kind: Literal['linear', 'constant'], start: Array | float, num_updates: int) -> optax.Schedule:
    """Updates applied -> `start`, a scalar; if `linear`, less and less of it, and 0 from `num_updates` on."""
    return optax.linear_schedule(start, 0.0 if kind == 'linear' else start, num_updates)


def scheduled(
    values: Hyperparameters, applied: Array | int, optimizer: OptimizerConfig, loss: LossConfig, num_updates: int
) -> Hyperparameters:
    """The hyperparameters after so many updates were applied.

    Args:
      values: Those at the start.
      applied: Updates applied, int32 scalar.
      optimizer: Schedule of the learning rate.
      loss: Schedule of the entropy cost.
      num_updates: Updates over which linear schedules fall to 0.
    """
    learning_rate = make_schedule(optimizer.schedule, values.learning_rate, num_updates)
    entropy_cost = make_schedule(loss.entropy_schedule, values.entropy_cost, num_updates)
    return values._replace(
        learning_rate=jnp.asarray(learning_rate(applied)), entropy_cost=jnp.asarray(entropy_cost(applied))
    )


def make_optimizer(config: OptimizerConfig, values: Hyperparameters) -> optax.GradientTransformation:
    """Gradient clipping, then RMSProp as TensorFlow defines it (eps inside the root, accumulator from 1), or Adam.

    Args:
      config: Which of them, and its constants.
      values: Learning rate and epsilon in place of the configuration's.
    """

    # Of a function, for it has a state, which checkpoints hold; the count in that is not read.
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
