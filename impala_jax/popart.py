"""PopArt: normalisation of value targets per task, with preserved outputs.

See van Hasselt et al. (2016) and Hessel et al. (2018). The baseline has one output n per task, and V = scale n + mean.
V-trace uses V and raw rewards. The baseline's errors and the advantages of the policy gradient are divided by the
scale, so that tasks with large returns do not dominate the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.config import PopArtConfig
from impala_jax.types import Array, PyTree


class PopArtState(NamedTuple):
    """Statistics of the value targets per task."""

    mean: Array  # [K] float32
    second_moment: Array  # [K] float32
    scale: Array  # [K] float32, standard deviation, clipped to the bounds of the configuration.


def init(num_tasks: int) -> PopArtState:
    """Returns mean 0 and scale 1 for each task."""
    ones = np.ones([num_tasks], np.float32)
    return PopArtState(mean=0 * ones, second_moment=ones, scale=ones)


def unnormalise(state: PopArtState, normalised: Array, task: Array) -> tuple[Array, Array]:
    """Returns the values of the trajectories' tasks.

    Args:
      state: Statistics of K tasks.
      normalised: Outputs of the baseline, [T, B, K].
      task: Task ids, [B] int32.

    Returns:
      Values, [T, B], and their scales, [B].
    """
    own = jnp.take_along_axis(normalised, task[None, :, None], axis=-1)[..., 0]
    scale = state.scale[task]
    return scale[None] * own + state.mean[task][None], scale


def update(state: PopArtState, targets: Array, mask: Array, task: Array, config: PopArtConfig) -> PopArtState:
    """Moves the statistics towards the value targets of a batch.

    The statistics of a task with n targets move by n steps of `config.step_size` towards the mean of the targets, which
    is as far as the targets would move them one by one. A single step of n times the size would overshoot.

    Args:
      state: Statistics of K tasks.
      targets: Value targets, not normalised, [T, B].
      mask: Targets that are not masked, [T, B] bool.
      task: Task ids, [B] int32.
      config: Configuration with the step size and the bounds of the scale.
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
    """Returns parameters of the baseline that give the same values under `new` as the old ones under `old`.

    Args:
      baseline: Parameters of the baseline: `kernel` [D, K] and `bias` [K].
      old: Statistics before the update.
      new: Statistics after the update.
    """
    ratio = old.scale / new.scale
    return {
        'kernel': baseline['kernel'] * ratio[None],
        'bias': ratio * baseline['bias'] + (old.mean - new.mean) / new.scale,
    }
