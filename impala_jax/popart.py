"""PopArt: value targets normalised per task, with outputs preserved (van Hasselt et al., 2016; Hessel et al., 2018).

The baseline has one output a task, n, and V = scale n + mean. V-trace sees V and raw rewards; the baseline's error and
the policy gradient's advantage are divided by the scale, so that tasks with large returns do not drown the others.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.config import PopArtConfig
from impala_jax.types import Array, PyTree


class PopArtState(NamedTuple):
    """Statistics of each task's value targets."""

    mean: Array  # [K] float32
    second_moment: Array  # [K] float32
    scale: Array  # [K] float32, the standard deviation within the configuration's bounds


def init(num_tasks: int) -> PopArtState:
    """Mean 0 and scale 1 for each task."""
    ones = np.ones([num_tasks], np.float32)
    return PopArtState(mean=0 * ones, second_moment=ones, scale=ones)


def unnormalise(state: PopArtState, normalised: Array, task: Array) -> tuple[Array, Array]:
    """The values of the tasks at hand.

    Args:
      state: the statistics, of K tasks.
      normalised: [T, B, K], the baseline's outputs.
      task: [B] int32.

    Returns:
      Values [T, B], and their scales [B].
    """
    own = jnp.take_along_axis(normalised, task[None, :, None], axis=-1)[..., 0]
    scale = state.scale[task]
    return scale[None] * own + state.mean[task][None], scale


def update(state: PopArtState, targets: Array, mask: Array, task: Array, config: PopArtConfig) -> PopArtState:
    """Moves the statistics towards a batch's targets.

    A task with n targets moves by n steps of `config.step_size`, all towards their mean: as far as one target after the
    other would move it, which a sum over the batch would overshoot.

    Args:
      state: the statistics, of K tasks.
      targets: [T, B], not normalised.
      mask: bool [T, B], the targets that count.
      task: [B] int32.
      config: the step size and the scale's bounds.
    """
    weights = mask[..., None] * jax.nn.one_hot(task, state.mean.size)[None]  # [T, B, K]
    counts = jnp.sum(weights, axis=(0, 1))
    step = -jnp.expm1(counts * jnp.log1p(-config.step_size))

    def move(statistic, values):
        average = jnp.sum(weights * values[..., None], axis=(0, 1)) / jnp.maximum(counts, 1)
        return statistic + step * (average - statistic)

    mean = move(state.mean, targets)
    second_moment = move(state.second_moment, jnp.square(targets))
    variance = jnp.clip(second_moment - jnp.square(mean), config.min_scale**2, config.max_scale**2)
    return PopArtState(mean, second_moment, jnp.sqrt(variance))


def preserve_outputs(baseline: PyTree, old: PopArtState, new: PopArtState) -> PyTree:
    """The baseline's parameters with which `new` gives the values that `old` gave.

    Args:
      baseline: `kernel` [D, K] and `bias` [K].
      old: the statistics that the parameters belong to.
      new: the statistics that they shall belong to.
    """
    ratio = old.scale / new.scale
    return {
        'kernel': baseline['kernel'] * ratio[None],
        'bias': ratio * baseline['bias'] + (old.mean - new.mean) / new.scale,
    }
