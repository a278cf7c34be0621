"""Environments whose step takes a fixed time but no CPU time, and the configuration for `scaling.py`."""

from __future__ import annotations

import os
import time

import dm_env
import numpy as np
from dm_env import specs

from impala_jax import Config, EnvironmentConfig, LearnerConfig, NetworkConfig


class Synthetic(dm_env.Environment):
    """An environment whose steps are ready SYNTHETIC_STEP_S seconds after the previous one.

    The environments of one actor are stepped one after the other but wait concurrently, as environments in separate
    processes would.
    """

    def __init__(self):
        self._step_s = float(os.environ['SYNTHETIC_STEP_S'])
        self._ready = 0.0
        self._steps = 0

    def reset(self) -> dm_env.TimeStep:
        """Starts an episode of 100 steps."""
        self._steps = 0
        return dm_env.restart(self._observation())

    def step(self, action) -> dm_env.TimeStep:
        """Waits until the step is ready; the action has no effect."""
        del action
        left = self._ready - time.monotonic()
        if left > 0:
            time.sleep(left)
        self._ready = time.monotonic() + self._step_s
        self._steps += 1
        if self._steps == 100:
            return dm_env.termination(1.0, self._observation())
        return dm_env.transition(0.0, self._observation())

    def _observation(self) -> np.ndarray:
        return np.full([64], self._steps, np.float32)

    def observation_spec(self):
        """A vector, [64] float32."""
        return specs.Array([64], np.float32)

    def action_spec(self):
        """Four actions."""
        return specs.DiscreteArray(4)


def environment(seed: int) -> dm_env.Environment:
    """Builds the environment of the configuration below."""
    del seed
    return Synthetic()


def get_config() -> Config:
    """Returns a configuration with a small network, so that neither actors nor learner are the bottleneck.

    `scaling.py` sets the batch size and the numbers of actors and environments.
    """
    return Config(
        total_frames=10**9,
        environment=EnvironmentConfig(name='synthetic:environment'),
        network=NetworkConfig(torso='mlp', mlp_sizes=(64,)),
        learner=LearnerConfig(unroll_length=20, num_devices=1),
    )
