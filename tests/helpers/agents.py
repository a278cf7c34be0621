"""Small agents, and random timesteps for them."""

import jax
import numpy as np

from impala_jax.config import NetworkConfig
from impala_jax.types import FIRST, LAST, MID, ArraySpec, EnvironmentSpec, TimeStep

A = 4
VECTOR = EnvironmentSpec(ArraySpec((3,), np.dtype(np.float32)), A)
DICT = EnvironmentSpec(
    {
        'count': ArraySpec((), np.dtype(np.int32)),
        'image': ArraySpec((20, 24, 3), np.dtype(np.uint8)),
        'vector': ArraySpec((5,), np.dtype(np.float32)),
    },
    A,
)
LSTM = NetworkConfig('mlp', core='lstm', lstm_size=8, mlp_sizes=(8,))
FEEDFORWARD = NetworkConfig('mlp', mlp_sizes=(8,))
# Rows are timesteps, columns environments: an episode's end inside the unroll, at its start, at its end, and none.
STEP_TYPES = np.array(
    [
        [FIRST, LAST, MID, MID],
        [MID, FIRST, MID, MID],
        [LAST, MID, MID, MID],
        [FIRST, MID, MID, MID],
        [MID, MID, LAST, MID],
        [MID, LAST, FIRST, MID],
    ],
    np.int32,
)


def random_timesteps(spec, step_types=STEP_TYPES, seed=0):
    """Timesteps [T, B] of a spec."""
    rng = np.random.RandomState(seed)
    T, B = step_types.shape

    def observe(leaf):
        if leaf.dtype.kind in 'iu':
            return rng.randint(256, size=(T, B, *leaf.shape)).astype(leaf.dtype)
        return rng.randn(T, B, *leaf.shape).astype(leaf.dtype)

    return TimeStep(
        step_type=step_types,
        reward=rng.randn(T, B).astype(np.float32),
        discount=np.ones([T, B], np.float32),
        observation=jax.tree.map(observe, spec.observation, is_leaf=lambda x: hasattr(x, 'shape')),
        previous_action=rng.randint(A, size=(T, B)).astype(np.int32),
    )


def row(timesteps, t):
    """Timesteps [B] at time t."""
    return jax.tree.map(lambda x: x[t], timesteps)


def random_state(agent, batch_size, seed=1):
    """A state [B] of the core."""
    rng = np.random.RandomState(seed)
    return jax.tree.map(lambda x: rng.randn(*x.shape).astype(np.float32), agent.initial_state(batch_size))
