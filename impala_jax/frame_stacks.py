"""Frame stacks in trajectories: each frame is queued, stored and transferred once, and stacked by the learner."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from impala_jax.types import FIRST, Array, ArraySpec, EnvironmentSpec, FrameStacks, TimeStep


def empty_timesteps(num_steps: int, timestep: TimeStep, spec: EnvironmentSpec) -> TimeStep:
    """Returns timesteps of zeros, [num_steps, B, ...], in NumPy, with stacked leaves as FrameStacks.

    Args:
      num_steps: Number of timesteps.
      timestep: Timestep with the shapes and dtypes, [B, ...].
      spec: Spec of the environment, which determines the stacked leaves.
    """

    def rows(leaf: np.ndarray) -> np.ndarray:
        return np.zeros([num_steps, *leaf.shape], leaf.dtype)

    def stacks(leaf: np.ndarray) -> FrameStacks:
        num_envs, *frame, K = leaf.shape
        frames = np.zeros([num_steps + K - 1, num_envs, *frame], leaf.dtype)
        return FrameStacks(frames, np.zeros([num_steps, num_envs], np.uint8))

    observation = jax.tree.map(
        lambda leaf_spec, leaf: stacks(leaf) if leaf_spec.stacked else rows(leaf),
        spec.observation,
        timestep.observation,
        is_leaf=lambda x: isinstance(x, ArraySpec),
    )
    return jax.tree.map(rows, timestep._replace(observation=None))._replace(observation=observation)


def write(stacks: FrameStacks, t: int, step_type: np.ndarray, stack: np.ndarray) -> None:
    """Writes timestep `t`; earlier timesteps must have been written.

    Args:
      stacks: FrameStacks of NumPy arrays, modified in place.
      t: Index of the timestep, from 0 to T.
      step_type: Step types, [B] int32.
      stack: Stacked frames, [B, ..., K]; see `ArraySpec.stacked`.
    """
    earlier = stack.shape[-1] - 1
    stacks.frames[t + earlier] = stack[..., -1]
    if t == 0:
        stacks.frames[:earlier] = np.moveaxis(stack[..., :-1], -1, 0)
        stacks.num_earlier[0] = earlier
        return
    stacks.num_earlier[t] = np.minimum(stacks.num_earlier[t - 1] + 1, earlier)
    for i in np.flatnonzero(step_type == FIRST):
        if not stack[i, ..., :-1].any():
            stacks.num_earlier[t, i] = 0


def stacked(stacks: FrameStacks) -> Array:
    """Returns the stacks as an array, [T + 1, B, ..., K]."""
    num_steps = stacks.num_earlier.shape[0]
    K = stacks.frames.shape[0] - num_steps + 1
    num_earlier = jnp.expand_dims(stacks.num_earlier, tuple(range(2, stacks.frames.ndim)))
    channels = [jnp.where(num_earlier >= K - 1 - k, stacks.frames[k : k + num_steps], 0) for k in range(K)]
    # Not `jnp.stack(channels, axis=-1)`: with jax 0.12 this takes three to four times as long on CPUs.
    return jnp.moveaxis(jnp.stack(channels), 0, -1)  # pyright: ignore[reportArgumentType]


def unpacked(timesteps: TimeStep) -> TimeStep:
    """Replaces the FrameStacks in timesteps [T + 1, B, ...] by arrays [T + 1, B, ..., K]."""
    observation = jax.tree.map(
        lambda leaf: stacked(leaf) if isinstance(leaf, FrameStacks) else leaf,
        timesteps.observation,
        is_leaf=lambda x: isinstance(x, FrameStacks),
    )
    return timesteps._replace(observation=observation)
