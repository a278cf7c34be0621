"""Batches for a small recurrent network, a learner of them, and what compares its states."""

import jax
import numpy as np

from impala_jax.config import Config, LearnerConfig, NetworkConfig, OptimizerConfig
from impala_jax.types import FIRST, LAST, MID, ArraySpec, EnvironmentSpec, StepInfo, TimeStep, Trajectory

A, T, B = 3, 4, 8
SPEC = EnvironmentSpec(ArraySpec((5,), np.dtype(np.float32)), A)
NETWORK = NetworkConfig('mlp', core='lstm', lstm_size=6, mlp_sizes=(7,))


def make_config(total_updates=20, optimizer=OptimizerConfig(), network=NETWORK, **learner):  # noqa: B008 - frozen
    """Configuration of a learner of `make_batch`."""
    learner = LearnerConfig(**({'batch_size': B, 'unroll_length': T} | learner))
    return Config(total_frames=total_updates * B * T, network=network, learner=learner, optimizer=optimizer)


def make_batch(seed=0, version=0):
    """Trajectories [T + 1, B] with episodes that end inside."""
    rng = np.random.RandomState(seed)
    step_type = rng.choice([FIRST, MID, MID, LAST], size=(T + 1, B)).astype(np.int32)
    timesteps = TimeStep(
        step_type=step_type,
        reward=rng.randn(T + 1, B).astype(np.float32),
        discount=(step_type != LAST).astype(np.float32),
        observation=rng.randn(T + 1, B, 5).astype(np.float32),
        previous_action=rng.randint(A, size=(T + 1, B)).astype(np.int32),
    )
    return Trajectory(
        timesteps=timesteps,
        behaviour_logits=rng.randn(T, B, A).astype(np.float32),
        initial_state=tuple(rng.randn(B, 6).astype(np.float32) for _ in range(2)),
        info=StepInfo(np.zeros([T, B], np.float32), np.zeros([T, B], bool), np.zeros([T, B], np.int32)),
        version=np.full([B], version, np.int32),
        task=np.zeros([B], np.int32),
        game_version=np.full([T, B], version, np.int32),
    )


def poison(batch):
    """The batch with one reward that is not a number."""
    reward = batch.timesteps.reward.copy()
    reward[2, 1] = np.nan
    step_type = batch.timesteps.step_type.copy()
    step_type[2, 1] = MID
    return batch._replace(timesteps=batch.timesteps._replace(reward=reward, step_type=step_type))


def host(tree):
    """The tree in arrays of NumPy, copied."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def assert_equal(a, b):
    """Asserts that two trees are bit-identical."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    """Whether two trees differ anywhere."""
    return any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), a, b)))
