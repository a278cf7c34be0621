"""An environment that shows given timesteps."""

import dm_env
from dm_env import specs

from impala_jax.environments.serial import SerialVectorEnvironment


class Shows(dm_env.Environment):
    """Returns the timesteps of a list, one after the other."""

    def __init__(self, spec, timesteps):
        self.spec = spec
        self.timesteps = iter(timesteps)

    def observation_spec(self):
        return self.spec

    def action_spec(self):
        return specs.DiscreteArray(2)

    def reset(self):
        return next(self.timesteps)

    def step(self, action):
        return next(self.timesteps)


def shown(spec, *timesteps, max_failures=1, **kwargs):
    """A vector of one such environment."""
    return SerialVectorEnvironment(
        lambda seed: Shows(spec, timesteps), 1, 0, name='shows', max_failures=max_failures, **kwargs
    )
