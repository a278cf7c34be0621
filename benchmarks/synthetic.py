"""Environments whose step takes a set time and no core, and the configuration that `scaling.py` runs them with."""

from __future__ import annotations

import os
import time

import dm_env
import numpy as np
from dm_env import specs

from impala_jax import Config, EnvironmentConfig, LearnerConfig, NetworkConfig


class Synthetic(dm_env.Environment):
    """A step is ready SYNTHETIC_STEP_S seconds after the one before.

    Those of one actor, which are stepped one after the other, wait at the same time: as environments in processes of
    their own would.
    """

    def __init__(self):
        self._step_s = float(os.environ['SYNTHETIC_STEP_S'])
        self._ready = 0.0
        self._steps = 0

    def reset(self) -> dm_env.TimeStep:
        self._steps = 0
        return dm_env.restart(self._observation())

    def step(self, action) -> dm_env.TimeStep:
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
        return specs.Array([64], np.float32)

    def action_spec(self):
        return specs.DiscreteArray(4)


def environment(seed: int) -> dm_env.Environment:
    """The factory of the configuration below."""
    del seed
    return Synthetic()


def get_config() -> Config:
    """A small network: neither actors nor learner are to be the limit. `scaling.py` sets batch and actors."""
    return Config(
        total_frames=10**9,
        environment=EnvironmentConfig(name='synthetic:environment'),
        network=NetworkConfig(torso='mlp', mlp_sizes=(64,)),
        learner=LearnerConfig(unroll_length=20, num_devices=1),
    )
